"""Renaming tensors by a table of (our name, their name), `{i}` standing for a block's number."""

import re
from collections.abc import Iterable

from torch import Tensor


def rename(tensors: dict[str, Tensor], table: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors under the right-hand names of the table.

    Raises:
        ValueError: a tensor that the table does not know.
    """
    patterns = [(re.compile(re.escape(a).replace(re.escape("{i}"), r"(?P<i>\d+)") + "$"), b) for a, b in table]
    out = {}
    for name, tensor in tensors.items():
        for pattern, target in patterns:
            match = pattern.match(name)
            if match:
                out[target.format(**match.groupdict())] = tensor
                break
        else:
            raise ValueError(f"unexpected tensor {name!r} {list(tensor.shape)}: this layout is not known")
    return out


def flip(table: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The table read the other way round."""
    return [(b, a) for a, b in table]


def refuse(config: dict, project: str, **allowed) -> None:
    """ValueError for the first field of a foreign config whose value is not what we can compute."""
    for name, value in allowed.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(f"{project} config has {name}={config[name]!r}, which is not supported (only {value!r})")


def require(config, project: str, **needed) -> None:
    """ValueError for the first field of our config that the other project's architecture does not have."""
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ValueError(f"{project} needs {name}={value!r}, but this model has {getattr(config, name)!r}")
