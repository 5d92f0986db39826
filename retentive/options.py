"""Checks of options by name and type, and how errors name an option.

A message names an option in backticks, as Python has it: `batch`, `resume=True` or `mode='carry'`. The command line
writes the same options as flags: --batch, --resume, --mode carry (`cli.errors.flags`).
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

KINDS: dict[type, str] = {
    bool: "True or False",
    int: "a whole number",
    Integral: "a whole number",  # NumPy's too
    float: "a number",
    Real: "a number",
    str: "a string",
    Mapping: "a dictionary",
}


MANY = 12
"""Most names that an error lists, if one of them is close to what was given."""


def option(name: str, value: Any) -> str:
    """An option and its value in an error message: `name=value`."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple | list) and all(isinstance(x, Path) for x in value):
        value = tuple(map(str, value))
    if isinstance(value, Mapping):
        value = dict(value)
    return f"`{name}={value!r}`"


def quoted(message: object) -> str:
    """Another library's message on one line, with its backticks as quotation marks: only our options have backticks."""
    return " ".join(str(message).replace("`", "'").split())


def check_type(name: str, value: Any, kind: type) -> None:
    """Raises TypeError if the value of an option is not of its kind, one of KINDS.

    Whole numbers are accepted as numbers; booleans are neither.
    """
    fits = isinstance(value, (float, int) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {KINDS[kind]}, got {value!r}")


def check_names(what: str, names: Collection[str], known: Collection[str]) -> None:
    """Raises TypeError if one of `names` is not in `known`, the option names of `what`; suggests the nearest."""
    for name in sorted(set(names) - set(known)):
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(known))}"
        raise TypeError(f"{what} has no option {name!r}: {hint}")


def known(names: Sequence[str], all_names: Collection[str], what: str) -> None:
    """Raises ValueError for a name that is not among `all_names`, with the nearest of many, and if there is none."""
    for name in names:
        if name not in all_names:
            close = difflib.get_close_matches(name, all_names, 1, cutoff=0.75) if len(all_names) > MANY else []
            hint = f": did you mean {close[0]}?" if close else f", expected one of {', '.join(all_names)}"
            raise ValueError(f"unknown {what} {name!r}{hint}")
    if not names:
        raise ValueError(f"no {what} given, expected one of {', '.join(all_names)}")


def at_least_one(options: Any, *fields: str) -> None:
    """Raises ValueError if one of these fields, a number or a tuple of numbers, is below 1 or empty."""
    for field in fields:
        value = getattr(options, field)
        numbers = [value] if isinstance(value, int) else value
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{option(field, value)}: must be at least 1")
