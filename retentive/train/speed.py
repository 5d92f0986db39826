"""Speed of this machine's matrix products: the precision that suits it, and the fraction that a run reaches (MFU)."""

import time
from typing import get_args

import torch

from retentive.machine import gemm_rate, peak_memory
from retentive.models import cost
from retentive.train.config import Precision
from retentive.train.parallel import Cluster
from retentive.train.step import Training


def pick_precision(name: Precision, device: torch.device) -> Precision:
    """fp32 or bf16; "auto" measures now, and picks bf16 if a matrix product is more than 1.3 times as fast in it.

    Raises:
        ValueError: bf16 on a GPU without it.
    """
    lacks = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and lacks:
        gpu = torch.cuda.get_device_name(device)
        raise ValueError(f"`precision='bf16'` needs a GPU of compute capability 8.0 or newer, this is {gpu}: take fp32")
    if name != "auto":
        return name
    if device.type == "mps" or lacks:
        return "fp32"
    bf16 = fp32 = 0.0
    for _ in range(8):  # in turn, so that a busy neighbour slows both alike
        bf16 = max(bf16, gemm_rate(device, torch.bfloat16, size=1024, repeats=1))
        fp32 = max(fp32, gemm_rate(device, torch.float32, size=1024, repeats=1))
    return "bf16" if bf16 > 1.3 * fp32 else "fp32"


def agreed_precision(name: Precision, device: torch.device, cluster: Cluster) -> Precision:
    """Precision that rank 0 picks (`pick_precision`), for all ranks."""
    names = get_args(Precision)
    return names[cluster.broadcast(names.index(pick_precision(name, device)))]


class Speedometer:
    """Meter of throughput (tokens a second), MFU and memory of each step.

    MFU (model FLOPs utilisation: PaLM, arXiv 2204.02311) is relative to the speed of a large matrix product on this
    machine, measured when the meter is made. A run that trains some weights only has none: its FLOPs are not counted.
    """

    def __init__(self, training: Training):
        model, config = training.model, training.config
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self._whole = all(p.requires_grad for p in model.parameters())
        flops = cost.training_flops_per_token(model.config, training.batches.length)
        peak = gemm_rate(model.device, dtype, size=1024, repeats=4) * training.cluster.world_size
        self.device, self._mfu, self._began = model.device, flops / peak, time.perf_counter()

    def start(self) -> None:
        """Start timing a step."""
        self._began = time.perf_counter()

    def read(self, tokens: int) -> dict[str, float]:
        """Metrics of the step that ends now, which read `tokens` tokens."""
        rate = tokens / (time.perf_counter() - self._began)
        mfu = {"mfu": rate * self._mfu} if self._whole else {}
        return {"tokens_per_second": rate, **mfu, "memory": peak_memory(self.device)}
