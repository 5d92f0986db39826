"""Options by their names: what is said of one that there is not, and of a value of the wrong type."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
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


def check_type(name: str, value: Any, kind: type) -> None:
    """Raises TypeError for the value of an option that is not of its kind, one of KINDS.

    Whole numbers are numbers too; truth values are neither.
    """
    fits = isinstance(value, (float, int) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {KINDS[kind]}, got {value!r}")


def check_once(argv: Sequence[str], *names: str) -> None:
    """Raises ValueError where an option that takes several values was typed twice, since the last alone would count."""
    for name in names:
        if sum(word.split("=")[0] == f"--{name}" for word in argv) > 1:
            raise ValueError(f"--{name} stands twice: give all its values after one --{name}")


def check_names(what: str, names: Collection[str], known: Collection[str]) -> None:
    """Raises TypeError where one of `names` is not among those that `what` knows, with the nearest of these."""
    for name in sorted(set(names) - set(known)):
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(known))}"
        raise TypeError(f"{what} has no option {name!r}: {hint}")


def known(names: Sequence[str], all_names: Collection[str], what: str) -> None:
    """Raises ValueError for a name that is not among `all_names`, and if there is none."""
    for name in names:
        if name not in all_names:
            raise ValueError(f"unknown {what} {name!r}, expected one of {', '.join(all_names)}")
    if not names:
        raise ValueError(f"no {what} given, expected one of {', '.join(all_names)}")


def at_least_one(options: Any, *fields: str) -> None:
    """Raises ValueError if one of these fields, a number or a tuple of numbers, is below 1 or empty."""
    for field in fields:
        value = getattr(options, field)
        numbers = [value] if isinstance(value, int) else value
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{field} must be at least 1, got {min(numbers) if numbers else 'none'}")
