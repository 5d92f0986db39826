"""Options that several benches share; a bench's own `Options` inherits them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from retentive.machine import pick_device
from retentive.models import ModelConfig, retnet

Say = Callable[[str], object]
"""Called with a line of progress now and then."""


def silent(line: str) -> None:
    """A `Say` that drops the lines."""


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A RetNet of a named size."""

    size: str = "5m"
    """Size of the RetNet, freshly initialised; what it is compared with has its parameters."""
    vocab_size: int = 4096
    """Tokens of the vocabulary."""

    @property
    def config(self) -> ModelConfig:
        """The RetNet's config.

        Raises:
            ValueError: an unknown size.
        """
        return retnet(self.size, vocab_size=self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """A CPU or an NVIDIA GPU, which are what benches measure."""

    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""

    @property
    def torch_device(self) -> torch.device:
        """The device.

        Raises:
            ValueError: a device that this machine does not have, or that benches don't measure.
        """
        name = self.device
        if name == "auto":  # not pick_device's own "auto", which may be MPS
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = pick_device(name)
        # on others `machine.clock` would stop before the device is done
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"measured on cpu and cuda only, got device {name!r}")
        return device


def words(names: Sequence[str]) -> list[str]:
    """The names one by one: `--dtypes fp32 bf16` and `--dtypes fp32,bf16` mean the same."""
    return [part for name in names for part in name.split(",") if part]
