"""Batch generation: many prompts at once. A prefix shared by consecutive prompts is read once.

Its state is copied for each prompt that continues from it, so ten questions about a long text cost little more than
one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from retentive.data.media import Rows
from retentive.infer.beam import beam_search
from retentive.infer.engine import Engine
from retentive.infer.generate import placeholders_of
from retentive.infer.media import read
from retentive.infer.placeholders import Placeholders
from retentive.infer.requests import Stream
from retentive.models import LanguageModel
from retentive.sampling import GREEDY, SamplingParams

SLOTS = 16
"""Maximum prompts that are decoded at once."""
SHARED = 256
"""Minimum tokens of a shared prefix, so that its state is worth the copies."""


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: SamplingParams = GREEDY,
    beams: int = 1,
    rows: Sequence[Rows] = (),
    done: Callable[[int], object] = lambda n: None,
) -> list[list[int]]:
    """Generate tokens after each prompt; the token that stopped an answer is left out.

    Args:
        max_tokens: maximum tokens of an answer.
        stop_ids: tokens that end an answer.
        sampling: settings of sampling; the seed of prompt n is n.
        beams: hypotheses of beam search; 1 for none.
        rows: rows of each prompt's pictures and sound, as for `Engine.submit`; empty for prompts of text only.
        done: called now and then with the number of answered prompts.

    Raises:
        ValueError: as `Engine.submit` and `beam_search`.
        ArithmeticError: the model's logits are not finite.
    """
    engine = Engine(model, slots=min(SLOTS, max(len(prompts), 1)), waiting=max(len(prompts), 1))
    how: dict[str, Any] = {"max_tokens": max_tokens, "stop_ids": stop_ids}
    every: Sequence[Rows] = rows or [{}] * len(prompts)
    seen = [placeholders_of(model, ids, given) for ids, given in zip(prompts, every, strict=True)]
    keys = [ids if found is None else found.keys(ids) for ids, found in zip(prompts, seen, strict=True)]
    tokens: list[list[int]] = []
    for count, group in together(keys):
        first, streams = len(tokens), list[Stream]()
        begun = parts(prompts[first], seen[first], count)[0]
        state = read(model, *begun) if count else None
        for n in range(first, first + len(group)):
            ids, left = parts(prompts[n], seen[n], count)[1]
            if beams > 1:
                best = beam_search(model, ids, beams=beams, rows=left, **how, state=state and state.clone())
                tokens.append(best[0][0])
                done(len(tokens))
            else:
                params = replace(sampling, seed=n)
                streams += engine.submit(ids, params, rows=left, **how, state=state)
        while engine.step():
            done(first + sum(stream.reason is not None for stream in streams))
        tokens += [[token.id for token in stream] for stream in streams]
    return tokens


def parts(ids: Sequence[int], placeholders: Placeholders | None, count: int) -> list[tuple[Sequence[int], Rows]]:
    """Split a prompt: returns [(the first `count` ids, their rows), (the other ids, their rows)]."""
    spans = [(0, count), (count, len(ids))]
    return [(ids[a:b], {} if placeholders is None else placeholders.among(a, b)) for a, b in spans]


def together(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Sequence[Sequence[int]]]]:
    """Group consecutive prompts: yields (tokens of their shared prefix, prompts), with 0 for less than SHARED.

    The shared prefix leaves at least one token of each prompt, which must be read to give logits.
    """
    first = rest = 0  # index of the group being built, and of the first pending prompt without a shared prefix
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
    """Length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
