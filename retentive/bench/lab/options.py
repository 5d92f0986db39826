"""Options that several benches share; a bench's own `Options` inherits them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from retentive.machine import pick_device
from retentive.models import ModelConfig, retnet
from retentive.options import option

Say = Callable[[str], object]
"""Function that is called with lines of progress."""


def silent(line: str) -> None:
    """A `Say` that drops the lines."""


@dataclass(frozen=True, kw_only=True)
class Sized:
    """Options of a RetNet of a named size."""

    size: str = "5m"
    """Size of the RetNet, with random weights. The other models have the same number of parameters."""
    vocab_size: int = 4096
    """Number of tokens in the vocabulary."""

    @property
    def config(self) -> ModelConfig:
        """Config of the RetNet.

        Raises:
            ValueError: the size is unknown.
        """
        return retnet(self.size, vocab_size=self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """Option of the device: benches run on a CPU or an NVIDIA GPU."""

    device: str = "auto"
    """Device: auto (a GPU if there is one), cpu or cuda."""

    @property
    def torch_device(self) -> torch.device:
        """Device of torch.

        Raises:
            ValueError: the machine does not have the device, or benches do not run on it.
        """
        name = self.device
        if name == "auto":  # unlike "auto" of pick_device, never MPS
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = pick_device(name)
        # on others `machine.clock` would stop before the device has finished
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"{option('device', name)}: benches run on cpu and cuda only")
        return device


def words(names: Sequence[str]) -> list[str]:
    """Returns the names one by one: `--dtypes fp32 bf16` and `--dtypes fp32,bf16` mean the same."""
    return [part for name in names for part in name.split(",") if part]
