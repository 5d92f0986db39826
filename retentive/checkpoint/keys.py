"""Renames tensors by a table of (our name, their name), where `{i}` is a block's number; and checks configs."""

import re
from collections.abc import Iterable

from torch import Tensor


def rename(tensors: dict[str, Tensor], table: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Returns the tensors under the right-hand names of the table.

    Raises:
        ValueError: the table does not contain a tensor.
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
    """Returns the table from their names to ours."""
    return [(b, a) for a, b in table]


def refuse(config: dict, project: str, **allowed) -> None:
    """Raises ValueError if fields of a foreign config need something unsupported; the message names all of them.

    Args:
        allowed: the one supported value of each field; missing fields and None are supported too.
    """
    other = {name: value for name, value in allowed.items() if config.get(name, value) not in (value, None)}
    if other:
        found = ", ".join(f"{name}={config[name]!r} (supported: {value!r})" for name, value in other.items())
        raise ValueError(f"{project} config has {found}")


def require(config, project: str, **needed) -> None:
    """Raises ValueError if fields of our config differ from the other project's architecture.

    The message names all of them, so that a model need not be retrained for each.

    Args:
        needed: the one value of each field that the other project can express.
    """
    other = {name: value for name, value in needed.items() if getattr(config, name) != value}
    if other:
        found = ", ".join(f"{name}={value!r} (this model: {getattr(config, name)!r})" for name, value in other.items())
        raise ValueError(f"{project} needs {found}")
