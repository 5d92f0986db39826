"""Guessing beside not guessing: tokens a call and tokens/s of speculative decoding, on texts that one names.

Greedy, so that the gate is exact: every way must give the tokens of plain generation. The ways take turns.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from retentive import machine
from retentive.bench.lab.tables import at_least_one, markdown
from retentive.infer import SamplingParams, generate
from retentive.infer.speculative import speculate
from retentive.models import Model

GREEDY = SamplingParams(temperature=0)


def measure(
    model: Model,
    texts: Sequence[list[int]],
    *,
    draft: Model | None = None,
    most: Sequence[int] = (2, 4, 8),
    tokens: int = 200,
    repeats: int = 3,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """A row per way: plain, look-up and, where there is one, the draft model, each with `most` guesses a call.

    Raises:
        ArithmeticError: a way gave other tokens than plain generation.
    """
    at_least_one("most, tokens and repeats", [*most, tokens, repeats])
    drafts = {"look-up": None} | ({"draft": draft} if draft is not None else {})
    ways = [("plain", 0), *((name, n) for name in drafts for n in most)]
    times: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    counts: dict[tuple[str, int], Counter[str]] = {}
    wanted: list[list[int]] = []
    for _ in range(repeats + 1):
        for name, n in ways:
            told: Counter[str] = Counter()
            made: list[list[int]] = []
            began = time.perf_counter()
            for ids in texts:
                if name == "plain":
                    made.append([t.id for t in generate(model, ids, GREEDY, max_tokens=tokens)])
                else:
                    guessed = speculate(model, ids, GREEDY, draft=drafts[name], most=n, max_tokens=tokens, counts=told)
                    made.append([t.id for t in guessed])
            times[name, n].append(time.perf_counter() - began)
            counts[name, n] = told
            wanted = wanted or made
            if made != wanted:
                raise ArithmeticError(f"{name} with {n} guesses gave other tokens than plain generation: not counted")
    total = len(texts) * tokens
    rows = []
    for name, n in ways:
        told = counts[name, n]
        ratios = [a / b for a, b in zip(times["plain", 0][1:], times[name, n][1:], strict=True)]
        rows.append(
            {
                "way": name,
                "most": n,
                "tokens_per_second": total / statistics.median(times[name, n][1:]),
                "tokens_per_call": total / told["calls"] if told else 1.0,
                "guesses_right": told["right"] / told["made"] if told["made"] else 0.0,
                "over_plain": statistics.median(ratios),
            }
        )
        say(f"{name} {n}: {rows[-1]['tokens_per_call']:.2f} tokens a call, {rows[-1]['over_plain']:.2f} times plain")
    parameters = {"model": count(model)} | ({"draft": count(draft)} if draft is not None else {})
    return {
        "what": "speculative decoding, greedy",
        "hardware": machine.describe(),
        "parameters": parameters,
        "texts": len(texts),
        "tokens": tokens,
        "rows": rows,
    }


def count(model: Model) -> int:
    return sum(p.numel() for p in model.parameters())


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    heads = ["", "guesses a call", "right", "tokens a call", "tokens/s", "over plain"]
    return markdown(
        heads,
        [
            [
                row["way"],
                str(row["most"]),
                f"{row['guesses_right']:.0%}",
                f"{row['tokens_per_call']:.2f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['over_plain']:.2f}",
            ]
            for row in result["rows"]
        ],
    )
