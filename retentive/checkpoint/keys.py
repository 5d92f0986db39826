"""Renaming tensors by a table of (our name, their name), where `{i}` is a block's number; what configs must have."""

import re
from collections.abc import Iterable

from torch import Tensor


def rename(tensors: dict[str, Tensor], table: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors under the right-hand names of the table.

    Raises:
        ValueError: a tensor that the table does not know.
    """
    patterns = [(re.compile(re.escape(a).replace(re.escape("{i}"), r"(?P<i>\d+)")), b) for a, b in table]
    out = {}
    for name, tensor in tensors.items():
        for pattern, target in patterns:
            if match := pattern.fullmatch(name):
                out[target.format(**match.groupdict())] = tensor
                break
        else:  # no pattern matched
            raise ValueError(f"unexpected tensor {name!r} {list(tensor.shape)}: this layout is not known")
    return out


def flip(table: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The table from their names to ours."""
    return [(b, a) for a, b in table]


def refuse(config: dict, project: str, **allowed) -> None:
    """Raises ValueError where fields of a foreign config ask for what is not supported here; it names all of them.

    Args:
        allowed: for each field the one value that is supported; a field that is None or not there is so too.
    """
    other = {name: value for name, value in allowed.items() if config.get(name, value) not in (value, None)}
    if other:
        found = ", ".join(f"{name}={config[name]!r} (supported: {value!r})" for name, value in other.items())
        raise ValueError(f"{project} config has {found}")


def require(config, project: str, **needed) -> None:
    """Raises ValueError where fields of a config of ours differ from the other project's architecture.

    It names all of them, so that a model need not be trained anew for each.

    Args:
        needed: for each field the one value that the other project can express.
    """
    other = {name: value for name, value in needed.items() if getattr(config, name) != value}
    if other:
        found = ", ".join(f"{name}={value!r} (this model: {getattr(config, name)!r})" for name, value in other.items())
        raise ValueError(f"{project} needs {found}")
