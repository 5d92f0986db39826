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
    """Looks whether fields of a foreign config have the value that we can compute, or None.

    Raises:
        ValueError: with all that have not.
    """
    other = {name: value for name, value in allowed.items() if config.get(name, value) not in (value, None)}
    if other:
        found = ", ".join(f"{name}={config[name]!r} (supported: {value!r})" for name, value in other.items())
        raise ValueError(f"{project} config has {found}")


def require(config, project: str, **needed) -> None:
    """Looks whether the fields of a config of ours have the one value that the other project's architecture has.

    Raises:
        ValueError: with all that have not, so that a model is not trained anew for each.
    """
    other = {name: value for name, value in needed.items() if getattr(config, name) != value}
    if other:
        found = ", ".join(f"{name}={value!r} (this model: {getattr(config, name)!r})" for name, value in other.items())
        raise ValueError(f"{project} needs {found}")
