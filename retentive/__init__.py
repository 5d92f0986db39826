"""Retentive Networks: train, evaluate, serve and ship them.

    import retentive
    retentive.train("data/mine", "runs/mine", size="5m", steps=1000)
    print(retentive.generate("runs/mine", prompt="Once upon a time", max_tokens=50))
    print(retentive.evaluate("runs/mine", ["piqa"], "eval_files"))

Each command of `retentive --help` is a call here. `retentive.models` builds models, `retentive.ops` is the operator
alone.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retentive.calls import (
        bench,
        chat,
        classify,
        compare,
        embed,
        export,
        linearize,
        memory,
        quantize,
        serve,
        sft,
        train,
    )
    from retentive.checkpoint import load
    from retentive.evals import evaluate
    from retentive.infer.writing import generate, stream_generate
    from retentive.train.log import history

__all__ = [
    "bench",
    "chat",
    "classify",
    "compare",
    "embed",
    "evaluate",
    "export",
    "generate",
    "history",
    "linearize",
    "load",
    "memory",
    "quantize",
    "serve",
    "sft",
    "stream_generate",
    "train",
]

__version__ = "0.5.0"

_HOMES = {
    "evaluate": "retentive.evals",
    "generate": "retentive.infer.writing",
    "history": "retentive.train.log",
    "load": "retentive.checkpoint",
    "stream_generate": "retentive.infer.writing",
}
"""Modules of the calls that are not in `retentive.calls`."""


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `import retentive` alone does not load torch."""
    if name not in __all__:
        raise AttributeError(f"module 'retentive' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "retentive.calls")), name)


def __dir__() -> list[str]:
    """Returns the public names."""
    return [*__all__, "__version__"]


class _Room(ModuleType):
    """A room with the name of a call: `retentive.train` is both."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module("retentive.calls"), name)(*args, **options)


class _Package(ModuleType):
    """This package. Importing a room sets it as an attribute here, in place of the call of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
