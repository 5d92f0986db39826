"""Chat with a running `retentive serve` by the official client: pip install openai

    retentive serve runs/demo
    python examples/openai_client.py "Who are you?" "And who am I?"

The session's state stays on the server, so each request holds only the new message, however long the conversation.
"""

import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id

for question in sys.argv[1:] or ["Who are you?"]:
    print(f"> {question}")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=200,
        temperature=0.8,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"session": "example"},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:
            state = (chunk.model_extra or {})["session"]
            print(f"\n[{chunk.usage.completion_tokens} tokens; {state['tokens']} read, in {state['bytes']:,} bytes]")

client.delete("/sessions/example", cast_to=object)
