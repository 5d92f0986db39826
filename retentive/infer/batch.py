"""Many prompts at once, each to its tokens; what prompts in a row begin with in common is read once.

A state is copied for each prompt that goes on from it, so that ten questions about a long text cost little more than
one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from retentive.data.media import Rows
from retentive.infer.beam import beam_search
from retentive.infer.engine import Engine
from retentive.infer.generate import placeholders_of
from retentive.infer.media import read
from retentive.infer.placeholders import among
from retentive.infer.requests import Stream
from retentive.infer.sample import SamplingParams
from retentive.models import LanguageModel

SLOTS = 16
"""Prompts that are answered at once."""
SHARED = 256
"""Tokens in common from which on a state is worth its copies."""


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    beams: int = 1,
    rows: Sequence[Rows] = (),
    done: Callable[[int], object] = lambda n: None,
) -> list[list[int]]:
    """The tokens after each of the prompts, the token that stopped them left out.

    Args:
        max_tokens: after a prompt.
        stop_ids: tokens that end an answer.
        temperature: 0 takes the likeliest token; else prompt n is drawn with the seed n.
        beams: hypotheses of beam search; 1 for none.
        rows: of each prompt's pictures and sound; none for prompts of text alone.
        done: called with the number of prompts that are answered, now and then.

    Raises:
        ValueError: as `Engine.submit` and `beam_search`.
        ArithmeticError: the model's logits are not finite.
    """
    engine = Engine(model, slots=min(SLOTS, max(len(prompts), 1)), waiting=max(len(prompts), 1))
    how: dict[str, Any] = {"max_tokens": max_tokens, "stop_ids": stop_ids}
    given = rows or [dict[str, Any]()] * len(prompts)
    seen = [placeholders_of(model, *each) for each in zip(prompts, given, strict=True)]
    tokens: list[list[int]] = []
    for count, group in together([found.keys(ids) if found else ids for ids, found in zip(prompts, seen, strict=True)]):
        first, streams = len(tokens), list[Stream]()
        state = read(model, prompts[first][:count], among(seen[first], 0, count)) if count else None
        for n in range(first, first + len(group)):
            rest, left = prompts[n][count:], among(seen[n], count)
            if beams > 1:
                found = beam_search(model, rest, beams=beams, rows=left, **how, state=state and state.clone())
                tokens.append(found[0][0])
                done(len(tokens))
            else:
                params = SamplingParams(temperature=temperature, seed=n)
                streams += engine.submit(rest, params, rows=left, **how, state=state)
        while engine.step():
            done(first + sum(stream.reason is not None for stream in streams))
        tokens += [[token.id for token in stream] for stream in streams]
    return tokens


def together(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Sequence[Sequence[int]]]]:
    """(tokens that they all begin with, prompts) for parts of the prompts, in order; 0 where that is below SHARED.

    A token of each prompt is left over, at least: it must be read to give logits.
    """
    first = rest = 0  # of the prompts that are looked at, and of those that share nothing with the next
    while first < len(prompts):
        stop, common = first + 1, len(prompts[first]) - 1
        while stop < len(prompts) and (less := alike(prompts[first][:common], prompts[stop][:-1])) >= SHARED:
            stop, common = stop + 1, less
        if stop - first > 1:
            if rest < first:
                yield 0, prompts[rest:first]
            yield common, prompts[first:stop]
            rest = stop
        first = stop
    if rest < first:
        yield 0, prompts[rest:]


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
