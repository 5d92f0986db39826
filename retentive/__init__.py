"""Retentive Networks: train, evaluate, serve and ship them.

    import retentive
    model, tokenizer = retentive.load("runs/demo")
    print(retentive.generate(model, tokenizer, "Once upon a time", max_tokens=50))
    print(retentive.evaluate(model, ["piqa"], "eval_files", tokenizer=tokenizer))

`retentive.models` builds models, `retentive.ops` is the operator alone, and `retentive --help` is the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retentive.checkpoint import load
    from retentive.evals import evaluate
    from retentive.infer.writing import generate, stream_generate

__version__ = "0.1.0"
__all__ = ["evaluate", "generate", "load", "stream_generate"]

_HOMES = {
    "evaluate": "retentive.evals",
    "generate": "retentive.infer.writing",
    "load": "retentive.checkpoint",
    "stream_generate": "retentive.infer.writing",
}


def __getattr__(name: str) -> Any:
    """What the package offers, imported when it is first asked for: `import retentive` alone does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'retentive' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
