"""Retentive Networks: train, evaluate, serve and ship them.

    import retentive
    retentive.train("data/mine", "runs/mine", size="5m", steps=1000)
    model, tokenizer = retentive.load("runs/mine")
    print(retentive.generate(model, tokenizer, "Once upon a time", max_tokens=50))
    print(retentive.evaluate(model, ["piqa"], "eval_files", tokenizer=tokenizer))

`retentive.models` builds models, `retentive.ops` is the operator alone, and `retentive --help` is the command line.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from retentive.checkpoint import load
    from retentive.evals import evaluate
    from retentive.infer.writing import generate, stream_generate

__all__ = ["evaluate", "generate", "linearize", "load", "sft", "stream_generate", "train"]

__version__ = "0.5.0"

_HOMES = {
    "evaluate": "retentive.evals",
    "generate": "retentive.infer.writing",
    "load": "retentive.checkpoint",
    "stream_generate": "retentive.infer.writing",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `import retentive` alone does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'retentive' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Returns the public names, and the modules that are imported so far."""
    own = (name for name in globals() if name.startswith("__") or f"{__name__}.{name}" in sys.modules)
    return sorted({*own, *__all__})


def train(data: str | Path, out: str | Path, **options: Any) -> Path:
    """Trains a model on the packed folder `data` and returns the run directory `out`.

    Args:
        options: fields of `retentive.train.TrainRun` and `retentive.train.TrainConfig`, by their names:
            `size="5m", steps=1000, lr=3e-3, batch=8, length=512, set={"dropout": 0.1}, resume=True`, …

    Raises the errors of `TrainRun.run`, and these:

    Raises:
        ValueError: the data and options do not fit together.
        FileExistsError: `out` holds a run, and neither `resume` nor `overwrite` is set.
    """
    from retentive.train import TrainRun

    return TrainRun.of(data, out, **options).run(overrides=options)


def sft(model: str | Path, data: str | Path | Sequence[str | Path], out: str | Path, **options: Any) -> Path:
    """The run directory `out`, with `model` fine-tuned on the conversations in `data`, files or folders.

    Args:
        options: fields of `retentive.train.SftRun` and `retentive.train.TrainConfig`, by their names:
            `epochs=2, lora=8, lr=1e-4`, …

    Raises:
        ValueError: options, model and conversations that do not go together; others as `SftRun.run`.
    """
    from retentive.train import SftRun

    return SftRun.of(data, out, init=str(model), **options).run(overrides=options)


def linearize(teacher: str | Path, data: str | Path | Sequence[str | Path], out: str | Path, **options: Any) -> Path:
    """The run directory `out`, with a RetNet made of the Transformer `teacher`, which learnt from texts in `data`.

    Args:
        options: fields of `retentive.linearization.LinearizeRun` and `retentive.train.TrainConfig`, by their names:
            `window=192, tokens=1_000_000, lr=1e-4`, …

    Raises:
        ValueError: options, teacher and texts that do not go together; others as `LinearizeRun.run`.
    """
    from retentive.linearization import LinearizeRun

    return LinearizeRun.of(teacher, data, out, **options).run(overrides=options)
