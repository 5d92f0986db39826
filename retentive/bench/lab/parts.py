"""Parts of a step's time: matrix products, retention, attention, passes over memory. Measured by torch's profiler."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PARTS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn"),
    "retention": ("retentive::", "_retentive_"),
    "attention": ("_Attend", "attention"),
    "norms": ("_RMSNorm", "rms_norm", "layer_norm", "vector_norm"),
    "rotation": ("_Rotate",),
    "convolutions": ("_Convolve", "_AddConvolved"),
    "activations": ("silu", "gelu", "relu", "sigmoid", "_Gated", "mul"),
    "copies": ("copy", "Copy", "cat", "fill_", "zero_"),
    "sums": ("add", "sum", "Accumulate"),
    "loss": ("_CrossEntropy", "softmax", "nll_loss", "embedding", "index"),
    "optimiser": ("adamw", "_foreach"),
}
"""Words in the names of a part's operators, after `aten::`; whole names for those of up to three letters."""
OTHER = "other"


def parts(run: Callable[[], Any], device: torch.device, gemm_rate: float, *, steps: int = 2) -> dict[str, Any]:
    """Returns the share of time of each part, the rate of the matrix products and bytes that the other parts write.

    Returns:
        shares: fraction of the time by part, those of no share left out. They sum to 1.
        of_the_gemm_rate: FLOP/s of the matrix products, as a fraction of `gemm_rate`.
        written: bytes of new tensors that the other parts make in a step. Each is read again at least once.
    """
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler writes lines of its own to stderr
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    run()  # warm
    with profile(activities=activities, record_shapes=True, with_flops=True, profile_memory=True) as profiler:
        for _ in range(steps):
            run()
    seconds: dict[str, float] = dict.fromkeys([*PARTS, OTHER], 0.0)
    flops, written = 0.0, 0
    for event in profiler.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        part = part_of(event.key)
        seconds[part] += own / 1e6 / steps
        if part == "matrix products":
            flops += event.flops / steps
        else:
            memory = event.self_device_memory_usage if on_gpu else event.self_cpu_memory_usage
            written += max(memory, 0) // steps
    total = sum(seconds.values())
    return {
        "shares": {part: t / total for part, t in seconds.items() if t},
        "of_the_gemm_rate": flops / max(seconds["matrix products"], 1e-9) / gemm_rate,
        "written": written,
    }


def part_of(name: str) -> str:
    """Returns the part to which an operator or autograd function belongs.

    Examples: aten::mm, _RMSNormBackward, autograd::engine::evaluate_function: MmBackward0.
    """
    own = name.removeprefix("aten::").removeprefix("autograd::engine::evaluate_function: ")
    for part, words in PARTS.items():
        if any(own.rstrip("_") == word if len(word) <= 3 else word in own for word in words):
            return part
    return OTHER
