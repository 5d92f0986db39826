"""Scoring choices: the shared context read once and its state copied, beside every row read whole.

Both ways are handed in, batched alike; they take turns, and count only where their log-likelihoods agree.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from retentive import machine
from retentive.bench.lab.tables import at_least_one, duration, markdown

TOLERANCE = 1e-4
"""Of a log-likelihood, relative (and absolute below 1): float32 sums in another order."""


class Contest(NamedTuple):
    """What is scored in two ways, each of which gives all log-likelihoods."""

    questions: int
    once: Callable[[], list[float]]
    whole: Callable[[], list[float]]
    once_tokens: int
    """That the model reads, padding apart."""
    whole_tokens: int


def measure(
    contests: Mapping[str, Contest], *, repeats: int = 5, say: Callable[[str], object] = lambda line: None
) -> dict[str, Any]:
    """A row per contest: median seconds of either way, their ratio, and the ratio of the tokens they read.

    Raises:
        ArithmeticError: the two ways do not agree.
    """
    at_least_one("repeats", (repeats,))
    rows = []
    for name, contest in contests.items():
        times: dict[str, list[float]] = {"once": [], "whole": []}
        found: dict[str, list[float]] = {}
        for turn in range(repeats + 1):
            ways = {"once": contest.once, "whole": contest.whole}
            for way in ways if turn % 2 else reversed(ways):
                began = time.perf_counter()
                found[way] = ways[way]()
                times[way].append(time.perf_counter() - began)
        gap = max(abs(a - b) / max(1, abs(b)) for a, b in zip(found["once"], found["whole"], strict=True))
        if not gap <= TOLERANCE:
            raise ArithmeticError(f"{name}: log-likelihoods differ by {gap:.1e} of them, more than {TOLERANCE:.0e}")
        ratio = statistics.median(b / a for a, b in zip(times["once"][1:], times["whole"][1:], strict=True))
        rows.append(
            {
                "what": name,
                "questions": contest.questions,
                "once_seconds": statistics.median(times["once"][1:]),
                "whole_seconds": statistics.median(times["whole"][1:]),
                "ratio": ratio,
                "token_ratio": contest.whole_tokens / contest.once_tokens,
                "largest_difference": gap,
            }
        )
        say(f"{name}: {ratio:.2f} times as fast")
    return {"what": "scoring choices from one state a question", "hardware": machine.describe(), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    heads = ["", "questions", "context once", "every row whole", "times as fast", "times fewer tokens"]
    lines = [
        [
            row["what"],
            str(row["questions"]),
            duration(row["once_seconds"]),
            duration(row["whole_seconds"]),
            f"{row['ratio']:.2f}",
            f"{row['token_ratio']:.2f}",
        ]
        for row in result["rows"]
    ]
    return markdown(heads, lines)
