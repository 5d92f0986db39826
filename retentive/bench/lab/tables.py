"""What benches share: checks of their options, numbers with units for people, Markdown tables."""

from collections.abc import Collection, Sequence
from typing import Any


def known(names: Sequence[str], all_names: Collection[str], what: str) -> None:
    """Raises ValueError for a name that is not among `all_names`, or where there is none."""
    for name in names:
        if name not in all_names:
            raise ValueError(f"unknown {what} {name!r}, expected one of {', '.join(all_names)}")
    if not names:
        raise ValueError(f"no {what} given, expected one of {', '.join(all_names)}")


def at_least_one(options: Any, *fields: str) -> None:
    """Raises ValueError where one of these fields, a number or a tuple of them, has a number below 1, or has none."""
    for field in fields:
        value = getattr(options, field)
        numbers = [value] if isinstance(value, int) else value
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{field} must be at least 1, got {min(numbers) if numbers else 'none'}")


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, all but the first column aligned to the right; "" where there are no lines."""
    if not lines:
        return ""
    rule = ["---:" if n else "---" for n in range(len(heads))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))


def span(values: Sequence[float]) -> str:
    """The least and the most of the values, rounded, as "12 to 34"; one number where both round to that."""
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"


def duration(seconds: float) -> str:
    """Seconds as text, three digits in h, min, s, ms or us; two minutes are still 120 s."""
    units = ((7200, 3600, "h"), (180, 60, "min"), (1, 1, "s"), (1e-3, 1e-3, "ms"), (0, 1e-6, "us"))
    unit, name = next((unit, name) for least, unit, name in units if seconds >= least)
    return f"{float(f'{seconds / unit:.3g}'):g} {name}"


def size(nbytes: float) -> str:
    """Bytes as text, three digits in GB, MB or kB (of 1000, not 1024)."""
    unit, name = next(u for u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if nbytes >= u[0] or u[1] == "kB")
    return f"{float(f'{nbytes / unit:.3g}'):g} {name}"
