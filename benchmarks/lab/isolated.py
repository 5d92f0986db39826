"""An isolated run: time and peak memory beyond the inputs of one forward and backward pass of one rival.

On a CPU this needs a process of its own: otherwise memory that other passes left in the allocator would be reused
without being counted. A pass over a short sequence loads the code and starts the threads. Then the system's high-water
mark is reset, and its rise is the peak memory. That includes o, the three gradients and all temporaries, but not q, k,
v and the gradient of o, which exist before. The process may not take more memory than is free: a rival that needs more
is reported, before the system kills it.

    python -m benchmarks.lab.isolated '{"name": "sdpa", "work": {…}, "chunk": null, "threads": 2}'    one JSON line
"""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.lab import rivals
from benchmarks.lab.rivals import Rival
from benchmarks.lab.roofline import Work
from retentive.machine import clock, peak_memory, reset_peak_memory, take_no_more_than_is_free

NO_MEMORY = "not enough memory"


def tensors(one: Rival, work: Work, share: list[Tensor] | None = None) -> list[Tensor]:
    """Normal q, k, v and gradient of o for the rival: views of `share`, flat and long enough, if given."""
    share = flat(work, [one]) if share is None else share
    return [x[: _size(shape)].view(shape) for x, shape in zip(share, one.shapes, strict=True)]


def flat(work: Work, several: list[Rival]) -> list[Tensor]:
    """Normal numbers, four flat tensors, each long enough for the q, k, v or gradient of o of any of the rivals."""
    # drawn on the device itself: drawing on the CPU and copying would take longer than the passes
    generator = torch.Generator(work.device).manual_seed(0)
    sizes = [max(_size(one.shapes[n]) for one in several) for n in range(4)]
    return [torch.randn(n, generator=generator, device=work.device, dtype=work.torch_dtype) for n in sizes]


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def forward(one: Rival, inputs: list[Tensor]) -> Tensor:
    """Forward pass from fresh leaves, so that a backward pass makes gradients instead of adding to old ones."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    return one.run(q, k, v)


def both(one: Rival, inputs: list[Tensor]) -> None:
    """Run a forward and a backward pass."""
    forward(one, inputs).backward(inputs[3])


def measure(name: str, work: Work, chunk: int | None = None) -> dict[str, Any]:
    """Measure once in this process: `seconds` of both passes, `forward_seconds` of the first, `peak_bytes`."""
    device = torch.device(work.device)
    # a whole chunk, so that the code of full chunks is loaded before the timed pass
    short = replace(work, B=1, T=min(work.T, chunk or 256))
    one = rivals.make(name, short, chunk)
    both(one, tensors(one, short))
    one = rivals.make(name, work, chunk)
    inputs, outputs = tensors(one, work), list[Tensor]()
    before = reset_peak_memory(device)  # after the inputs, which do not count
    # o is held in a list, to keep the graph alive between the two clocks
    ahead = clock(device, lambda: outputs.append(forward(one, inputs)))
    back = clock(device, lambda: outputs[0].backward(inputs[3]))
    return {"seconds": ahead + back, "forward_seconds": ahead, "peak_bytes": peak_memory(device) - before}


def in_own_process(name: str, work: Work, chunk: int | None = None) -> dict[str, Any]:
    """`measure` in a new process on a CPU, in this process on a GPU; {"skipped": reason} if memory does not suffice.

    Raises:
        ChildProcessError: the pass failed; has the last line of its error.
    """
    if torch.device(work.device).type == "cuda":
        torch.cuda.empty_cache()
        measure(name, work, chunk)  # the first pass compiles kernels for this shape
        return measure(name, work, chunk)
    # threads too: by default the child would use all cores
    task = {"name": name, "work": asdict(work), "chunk": chunk, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "benchmarks.lab.isolated", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == -9:  # SIGKILL: the system had no memory left
        return {"skipped": NO_MEMORY}
    if done.returncode:
        raise ChildProcessError(f"{name} failed at T={work.T}: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def is_of_memory(error: Exception) -> bool:
    """True for an out-of-memory error: torch raises a plain RuntimeError for it on a CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def main(argument: str) -> None:
    """Entry of the child of `in_own_process`: prints the result of `measure` for a task in JSON, as a line of JSON."""
    task = json.loads(argument)
    torch.set_num_threads(task["threads"])
    take_no_more_than_is_free()
    try:
        result = measure(task["name"], Work(**task["work"]), task["chunk"])
    except (MemoryError, RuntimeError) as error:
        if not is_of_memory(error):
            raise
        result = {"skipped": NO_MEMORY}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
