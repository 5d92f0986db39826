"""Speculative decoding beside plain decoding: tokens per call of the model and tokens/s, on given texts.

Decoding is greedy, so the correctness gate is exact: every way must give the tokens of plain generation. Ways are
interleaved.
"""

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from retentive import machine
from retentive.bench.lab.clock import turns
from retentive.bench.lab.options import Say, silent
from retentive.checkpoint import ModelFolder
from retentive.infer import SamplingParams, generate
from retentive.infer.speculative import speculate
from retentive.models import LanguageModel, cost
from retentive.options import at_least_one
from retentive.tables import duration, markdown

GREEDY = SamplingParams(temperature=0)
PICTURE = None


@dataclass(frozen=True)
class Options:
    """Speculative decoding beside plain: tokens per call of the model and tokens/s, by look-up and by a draft model."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory or model folder."""
    texts: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILES")]
    """Text files; the model continues the beginning of each."""
    draft: str | None = None
    """Run directory of a smaller model with the same vocabulary."""
    prompt: int = 300
    """Prompt tokens of each text."""
    tokens: int = 200
    """Tokens generated after each prompt."""
    most: tuple[int, ...] = (2, 4, 8)
    """Tokens guessed before each call of the model; each number is timed."""
    repeats: int = 3
    """Repetitions timed of each, interleaved; the median counts."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """As `of_models`, of the models and texts that the options name."""
    if not options.texts:
        raise ValueError("no text given: python -m benchmarks speculation RUN FILES")
    folder = ModelFolder.open(options.run)
    model, tokenizer = folder.model(), folder.tokenizer_for_text()
    texts = [tokenizer.encode(path.read_text(encoding="utf-8"))[: options.prompt] for path in options.texts]
    draft = ModelFolder.open(options.draft).model() if options.draft else None
    return of_models(model.eval(), texts, options, draft=draft, say=say)


class Way(NamedTuple):
    """A way of decoding: plain, or with `most` guesses a call, from the text itself (look-up) or by a draft model."""

    name: str
    most: int
    draft: LanguageModel | None = None

    def __str__(self) -> str:
        return f"{self.name} with {self.most} guesses" if self.most else self.name

    def write(self, model: LanguageModel, ids: list[int], tokens: int, counts: Counter[str]) -> list[int]:
        """Generate tokens after `ids`; adds calls of the model, guesses and right guesses to `counts`.

        Plain generation counts nothing: it is one call a token.
        """
        if not self.most:
            return [t.id for t in generate(model, ids, GREEDY, max_tokens=tokens)]
        how: dict[str, Any] = {"draft": self.draft, "most": self.most, "max_tokens": tokens}
        # both kinds of guesses go through the same loop; without a draft model it looks them up in the text
        return [t.id for t in speculate(model, ids, GREEDY, counts=counts, **how)]


class Repetition(NamedTuple):
    """One pass of a way over all texts."""

    seconds: float
    counts: Counter[str]


def of_models(
    model: LanguageModel,
    texts: Sequence[list[int]],
    options: Options,
    *,
    draft: LanguageModel | None = None,
    say: Say = silent,
) -> dict[str, Any]:
    """A row per way: plain, look-up, and the draft model if given, each with `most` guesses a call.

    It uses the options `most`, `tokens` and `repeats` only.

    Raises:
        ArithmeticError: a way gave different tokens than plain generation.
    """
    at_least_one(options, "most", "tokens", "repeats")
    tokens = options.tokens
    ways = [Way("plain", 0), *(Way("look-up", n) for n in options.most)]
    if draft is not None:
        ways += [Way("draft", n, draft) for n in options.most]
    # the gate: greedy text must be the same by every way, token for token
    wanted = [ways[0].write(model, ids, tokens, Counter()) for ids in texts]

    def repetition(way: Way) -> Repetition:
        counts, began = Counter[str](), time.perf_counter()
        made = [way.write(model, ids, tokens, counts) for ids in texts]
        # before the comparison, which must not be timed
        seconds = time.perf_counter() - began
        if made != wanted:
            raise ArithmeticError(f"{way} gave other tokens than plain generation: not counted")
        say(f"{way}: {len(texts) * tokens} tokens in {duration(seconds)}")
        return Repetition(seconds, counts)

    found = list(turns({str(way): partial(repetition, way) for way in ways}, options.repeats))
    counted = {"model": model} | ({"draft": draft} if draft is not None else {})
    return {
        "what": "speculative decoding, greedy",
        "hardware": machine.describe(),
        "parameters": {name: cost.parameters(one.config) for name, one in counted.items()},
        "texts": len(texts),
        "tokens": tokens,
        "rows": [summary(way, found, len(texts) * tokens) for way in ways],
    }


def summary(way: Way, found: list[dict[str, Repetition]], tokens: int) -> dict[str, Any]:
    """Row of a way that generated `tokens` tokens in every turn; its counts are the same in all turns."""
    counts = found[-1][str(way)].counts
    return {
        "way": way.name,
        "most": way.most,
        "tokens_per_second": tokens / statistics.median(turn[str(way)].seconds for turn in found),
        "tokens_per_call": tokens / counts["calls"] if counts else 1.0,
        "guesses_right": counts["right"] / counts["made"] if counts["made"] else 0.0,
        "over_plain": statistics.median(turn["plain"].seconds / turn[str(way)].seconds for turn in found),
    }


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    heads = ["", "guesses a call", "right", "tokens a call", "tokens/s", "over plain"]
    lines = []
    for row in result["rows"]:
        cells = [row["way"], str(row["most"]), f"{row['guesses_right']:.0%}", f"{row['tokens_per_call']:.2f}"]
        lines.append([*cells, f"{row['tokens_per_second']:,.0f}", f"{row['over_plain']:.2f}"])
    return markdown(heads, lines)
