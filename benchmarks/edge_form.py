"""Process of one form in `python -m benchmarks edge`: opens the form, and times prefill and decoding.

    python -m benchmarks.edge_form '{"kind": "onnx", "file": …}'      one line of JSON

It imports only what the form needs, since other imports would count in its time and memory.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = 64
"""Tokens of the prompt for the time to first token."""


def opened(kind: str, file: Path, threads: int) -> tuple[Callable[[Sequence[int]], Any], Callable[[], None]]:
    """Open a form; returns functions (read more ids and return the logits after them; reset)."""
    if kind == "onnx":
        from retentive.export.onnx_run import OnnxModel

        graph = OnnxModel(file, threads=threads)
        return graph.read, graph.reset
    import torch

    torch.set_num_threads(threads)
    if kind == "llamacpp":
        from retentive.bench.lab import llamacpp

        session = llamacpp.Session(llamacpp.Model.of(file), tokens=4096)
        return lambda ids: session.read(len(ids)), session.forget
    from retentive.checkpoint import load
    from retentive.native import with_engine

    model: Any = with_engine(load(file.parent)[0], "native" if kind == "native" else "torch")
    state: Any = None

    def read(ids: Sequence[int]) -> np.ndarray:
        nonlocal state
        with torch.inference_mode():
            x, state = model.hidden(torch.tensor([ids]), state)
            return model.head(x[:, -1])[0].float().numpy()

    def forget() -> None:
        nonlocal state
        state = None

    return read, forget


def main(argument: str) -> None:
    """Print a form's numbers as one line of JSON."""
    task = json.loads(argument)
    if task["kind"] == "browser":
        from benchmarks import edge_browser

        folder = Path(task["file"]).parents[1]
        print(json.dumps(edge_browser.measure(folder, prompt=PROMPT, tokens=task["tokens"], steps=task["steps"])))
        return
    read, forget = opened(task["kind"], Path(task["file"]), task["threads"])
    ids = [n % task["vocab_size"] for n in range(1, task["tokens"] + 1)]
    logits = read(ids[:PROMPT])
    first = time.time() - task["began"]
    forget()
    read(ids)
    reading, writing = [], []
    for _ in range(2):
        forget()
        began = time.perf_counter()
        read(ids)
        reading.append(time.perf_counter() - began)
        began = time.perf_counter()
        for n in range(task["steps"]):
            read([n])
        writing.append(time.perf_counter() - began)
    status = Path("/proc/self/status")
    peak = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    print(
        json.dumps(
            {
                "logits": [] if logits is None else [float(x) for x in logits],
                "first_seconds": first,
                "read_per_second": len(ids) / min(reading),
                "write_per_second": task["steps"] / min(writing),
                "peak_bytes": 1024 * int(peak[0]),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
