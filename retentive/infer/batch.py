"""Many prompts at once, each to its tokens; what prompts in a row begin with in common is read once.

A state is copied for each prompt that goes on from it, so that ten questions about a long text cost little more than
one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from retentive.infer.beam import beam_search
from retentive.infer.engine import Engine
from retentive.infer.generate import checked, prefill
from retentive.infer.media import Rows, read, seen_first
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
    tokens: list[list[int]] = []
    for part in _with_media(model, prompts, rows) if any(rows) else _with_text(model, prompts):
        if beams > 1:
            for rest, state in part:
                how: dict[str, Any] = {"beams": beams, "max_tokens": max_tokens, "stop_ids": stop_ids}
                tokens.append(beam_search(model, rest, **how, state=state and state.clone())[0][0])
                done(len(tokens))
            continue
        streams = []
        for n, (rest, state) in enumerate(part, len(tokens)):
            params = SamplingParams(temperature=temperature, seed=n)
            streams += engine.submit(rest, params, max_tokens=max_tokens, stop_ids=stop_ids, state=state)
        while engine.step():
            done(len(tokens) + sum(stream.reason is not None for stream in streams))
        tokens += [[token.id for token in stream] for stream in streams]
    return tokens


Part = list[tuple[Sequence[int], Any]]
"""Prompts that are answered together: of each what is yet to be read, and the state that has read the rest, or None."""


def _with_text(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> Iterator[Part]:
    for count, group in together(prompts):
        state = prefill(model, checked(model, group[0][:count]))[1] if count else None
        yield [(prompt[count:], state) for prompt in group]


def _with_media(model: LanguageModel, prompts: Sequence[Sequence[int]], rows: Sequence[Rows]) -> Iterator[Part]:
    """All up to a prompt's last picture or sound is read first, once for prompts in a row that are the same so far."""
    before: tuple[Any, ...] | None = None
    state: Any = None
    part: Part = []
    for prompt, given in zip(prompts, rows, strict=True):
        count = seen_first(model, prompt)
        seen = (list(prompt[:count]), {kind: x.tobytes() for kind, x in given.items()})
        if seen != before:
            before, state = seen, read(model, prompt[:count], given) if count else None
        part.append((prompt[count:], state))
        if len(part) == SLOTS:
            yield part
            part = []
    yield part


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
