"""Options that several benches share; a bench's own `Options` inherits them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from retentive.machine import pick_device
from retentive.models import RetNetConfig, preset

Say = Callable[[str], object]
"""Hears a line now and then, while a bench is at work."""


def silent(line: str) -> None:
    """Says nothing."""


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A RetNet of a named size."""

    size: str = "5m"
    """Size of the RetNet; the others have its parameters."""
    vocab_size: int = 4096
    """Tokens of the vocabulary."""

    @property
    def config(self) -> RetNetConfig:
        """Of the RetNet; ValueError for an unknown size."""
        return preset(self.size, vocab_size=self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """A CPU or an NVIDIA GPU, which are what benches measure."""

    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""

    @property
    def torch_device(self) -> torch.device:
        """ValueError for a device that is not here, or that benches don't measure."""
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = pick_device(name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"measured on cpu and cuda only, got device {name!r}")
        return device


def words(names: Sequence[str]) -> list[str]:
    """Names, also where there are commas between them."""
    return [part for name in names for part in name.split(",") if part]
