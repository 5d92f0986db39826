"""Options of a resumed run: those of its train.json, except for options that may change."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from retentive.options import option

FREE = {
    "async_save",
    "device",
    "eval_every",
    "keep",
    "save_every",
    "sample_every",
    "sample_prompt",
    "tensorboard",
    "wandb",
}
"""Options that a resumed run may always change: they do not alter the computation."""
AUTOMATIC: Mapping[str, Any] = {"precision": "auto", "lr": 0.0}
"""Options that a run settles by itself, with the values that ask for it. Its train.json has what it settled on."""


def check_unchanged(new: Mapping[str, Any], old: Mapping[str, Any], names: Collection[str], run: Path) -> None:
    """Raise ValueError if one of the options `names` differs from the run's record."""
    for name in sorted(names):
        automatic = name in AUTOMATIC and new[name] == AUTOMATIC[name]
        if plain(new[name]) != plain(old[name]) and not automatic:  # train.json has lists in place of tuples
            given, has = option(name, new[name]), option(name, old[name])
            raise ValueError(f"{given} contradicts {has} of the run at {run}: leave it out")


def changes_of(stored: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """The option `set` from train.json; runs from before 26 November 2026 stored FIELD=VALUE strings."""
    if isinstance(stored, Mapping):
        return dict(stored)
    pairs = [str.partition(item, "=")[::2] for item in stored]
    numbers = {name: text for name, text in pairs if text[:1] in "[-0123456789" or text in ("true", "false")}
    return dict(pairs) | {name: json.loads(text) for name, text in numbers.items()}


def plain(value: Any) -> Any:
    """The value after a round trip through JSON."""
    return json.loads(json.dumps(value, default=str))
