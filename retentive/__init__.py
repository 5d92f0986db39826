"""Retentive Networks: train, evaluate, serve and ship them.

    import retentive
    model, tokenizer = retentive.load("runs/demo")
    logits, state = model(ids)

`retentive.models` builds models, `retentive.ops` is the operator alone, and `retentive --help` is the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from retentive.data.tokenizer import Tokenizer
    from retentive.models import Model

__all__ = ["load", "train"]

__version__ = "0.1.0"


def load(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Model, Tokenizer | None]:
    """(model, tokenizer or None) from a run directory, a folder in torchscale's or fla's layout, or a hub's name."""
    from retentive.checkpoint import load

    return load(path, device=device, dtype=dtype)


def train(data: str | Path, out: str | Path, **options: Any) -> Path:
    """The run directory `out`, with a model trained on the packed folder `data`.

    Args:
        options: fields of `retentive.train.TrainRun` and `retentive.train.TrainConfig`, by their names:
            `size="5m", steps=1000, lr=3e-3, batch=8, length=512, set={"dropout": 0.1}, resume=True`, …

    Raises:
        ValueError: data and options that do not go together; FileExistsError: `out` holds a run, and neither `resume`
            nor `overwrite` is set; others as `TrainRun.run`.
    """
    from retentive.train import TrainRun

    return TrainRun.of(data, out, **options).run(overrides=options)
