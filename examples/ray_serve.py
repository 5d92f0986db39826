"""Serve two replicas of a model with Ray on this machine, and hold two conversations: retentive[ray], openai.

    python examples/ray_serve.py runs/demo

On a cluster: `serve run retentive.serve.ray:application run=/shared/runs/demo replicas=8`, see docs/scale-out.md.
"""

import argparse

import openai
import ray
from ray import serve

from retentive.serve.ray import deployed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run directory or model folder")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    ray.init(include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(deployed(args.run, replicas=2, cpus=1), name="retentive")
    try:
        talk(openai.OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="none"))
    finally:
        serve.shutdown()
        ray.shutdown()


def talk(client: openai.OpenAI) -> None:
    """Holds two conversations, each a session whose state stays in one replica; the header lets Ray find it again."""
    model = client.models.list().data[0].id
    for message in ("Hello!", "What did I say?"):
        for name in ("ada", "grace"):
            stream = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": message}],  # only the new message; the state has the rest
                max_tokens=60,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"session": name},
                extra_headers={"X-Session-Id": name},
            )
            print(f"\n[{name}] {message}\n", end="")
            for chunk in stream:
                if chunk.choices:
                    print(chunk.choices[0].delta.content or "", end="", flush=True)
                else:  # the last chunk
                    print(f"\n  {chunk.session['tokens']} tokens read, in {chunk.session['bytes']:,} bytes")


if __name__ == "__main__":
    main()
