"""Results for people: Markdown tables, counts, durations and ranges. Bytes are written by `rich.filesize.decimal`."""

from collections.abc import Sequence


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


def counted(number: int, noun: str) -> str:
    """The number and its noun: "1 step", "20 steps", "1,000 steps"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def millions(number: int) -> str:
    """A number of tokens or parameters: "1.5 M", or all digits if it is small."""
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


def duration(seconds: float) -> str:
    """Seconds as text, three digits in h, min, s, ms or us; two minutes are still 120 s."""
    units = ((7200, 3600, "h"), (180, 60, "min"), (1, 1, "s"), (1e-3, 1e-3, "ms"), (0, 1e-6, "us"))
    if not seconds:
        return "0 s"
    unit, name = next((unit, name) for least, unit, name in units if seconds >= least)
    return f"{float(f'{seconds / unit:.3g}'):g} {name}"
