"""Speculative decoding: several tokens are guessed cheaply, and the model reads them all in one call.

    accept guess x with probability min(1, p(x) / q(x)); else pick from max(p - q, 0) and drop the guesses after it

p is what the model would pick from, q what the guess was drawn from: what comes out is distributed as without guessing
(Leviathan et al., arXiv 2211.17192), and greedy decoding gives the same tokens. The guesses come from a smaller model,
or from the text itself, where its last tokens occurred before ("prompt look-up"). Dropped guesses are taken back from
the state: a ring of RetNet's still holds them apart, and a KV cache writes over them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from retentive.infer.generate import Token, checked, prefill
from retentive.infer.sample import Sampler, SamplingParams, check_finite, draw
from retentive.models import Model, cost
from retentive.models.state import State
from retentive.threads import threads_for

GRAMS = (3, 2)
"""Tokens that must have occurred before for a look-up, the best first."""


def speculate(
    model: Model,
    ids: Sequence[int] | Tensor,
    params: SamplingParams | None = None,
    *,
    draft: Model | None = None,
    most: int = 4,
    max_tokens: int | None = None,
    stop_ids: Sequence[int] = (),
    first_ids: Sequence[int] | None = None,
    state: State | None = None,
    counts: Counter[str] | None = None,
) -> Iterator[Token]:
    """Tokens after `ids` as `generate` gives them, several to a call of the model where guesses are right.

    Args:
        draft: a smaller model of the same vocabulary that guesses; the text itself if not given.
        most: guesses a call.
        counts: told of "calls" of the model, of guesses "made" and "right".

    Other arguments as for `generate`; with the same seed other tokens are sampled, as likely as there.

    Raises:
        ValueError: as for `generate`; another vocabulary, most below 1.
    """
    prompt, vocab = checked(model, ids), model.config.vocab_size
    if most < 1:
        raise ValueError(f"at least one token must be guessed a call, got most={most}")
    if draft is not None and draft.config.vocab_size != vocab:
        raise ValueError(f"the draft model has {draft.config.vocab_size} tokens, the model {vocab}: they must agree")
    sampler = Sampler(params or SamplingParams(), prompt, vocab)
    guesser: Guesser = Lookup() if draft is None else Draft(draft, sampler, most)
    counts = Counter() if counts is None else counts
    tokens = _tokens(model, prompt, sampler, guesser, most, frozenset(stop_ids), first_ids, state, counts)
    return islice(tokens, max_tokens)


def _tokens(model, prompt, sampler, guesser, most, stop_ids, first_ids, state, counts) -> Iterator[Token]:
    text = prompt[0].tolist()
    logits, state = prefill(model, prompt, state)
    token, logprob = sampler(logits[0], first_ids)
    if token in stop_ids:
        return
    yield Token(token, logprob)
    text.append(token)
    state = state.for_decoding(model.dtype, rollback=most)
    while True:
        guesses, chances = guesser.guess(text, most)
        logits, state = score(model, [text[-1], *guesses], state)
        counts.update(calls=1, made=len(guesses))
        for n, row in enumerate(logits):
            guess = guesses[n] if n < len(guesses) else None
            token = judge(sampler, row, guess, chances[n] if n < len(chances) else None)
            if token in stop_ids:
                return
            counts.update(right=int(token == guess))
            yield Token(token, float(row.log_softmax(-1)[token]))
            sampler.note(token)
            text.append(token)
            if token != guess:
                break
        state.rollback(len(guesses) - n)


@torch.no_grad()
def score(model: Model, ids: list[int], state: Any) -> tuple[Tensor, Any]:
    """Logits `[T, vocab]` after each of the ids, float32 on the CPU, and the state; they can be taken back from it."""
    with threads_for(len(ids) * cost.matrix_parameters(model.config)):
        x, state = model.hidden(torch.tensor([ids], device=model.device), state)
        logits = model.head(x[0]).float().cpu()
    check_finite(logits)
    return logits, state


def judge(sampler: Sampler, logits: Tensor, guess: int | None, q: Tensor | None) -> int:
    """The guess or another token, distributed as the sampler picks from `logits` `[vocab]`.

    Args:
        guess: None for none.
        q: `[vocab]`, what the guess was drawn from; None for certainty.
    """
    p = sampler.distribution(logits)
    if guess is None:
        return int(draw(p[None], sampler.uniform()))
    chance = 1.0 if q is None else float(q[guess])
    if float(sampler.uniform()) * chance < float(p[guess]):
        return guess
    rest = (p - q).clamp(min=0) if q is not None else p.index_fill(0, torch.tensor(guess), 0)
    return int(draw((rest if bool(rest.any()) else p)[None], sampler.uniform()))  # none left: p is q, but for rounding


class Guesser(Protocol):
    """Where guesses come from."""

    def guess(self, text: list[int], most: int) -> tuple[list[int], list[Tensor]]:
        """Up to `most` tokens after `text`, and what each was drawn from, `[vocab]`; no such where it was certain.

        The text grows from call to call by what was right of the guesses and one token more.
        """


class Lookup:
    """Guesses what followed where the last tokens occurred before, the last time they did."""

    def __init__(self) -> None:
        self.after: dict[tuple[int, ...], int] = {}  # some tokens: where in the text the one after them is
        self.known = 0

    def guess(self, text: list[int], most: int) -> tuple[list[int], list[Tensor]]:
        for at in range(self.known, len(text)):
            for n in GRAMS:
                if at >= n:
                    self.after[tuple(text[at - n : at])] = at
        self.known = len(text)
        for n in GRAMS:
            if (at := self.after.get(tuple(text[-n:]), -1)) >= 0:
                period = len(text) - at  # what follows may reach the end: then it goes round
                return [text[at + i % period] for i in range(most)], []
        return [], []


class Draft:
    """Guesses what a smaller model would write, picked as the large one's tokens are."""

    def __init__(self, model: Model, sampler: Sampler, most: int):
        self.model, self.sampler, self.most = model, sampler, most
        self.state: Any = None
        self.read = 0  # tokens of the text, or of guesses that were thought to be it

    def guess(self, text: list[int], most: int) -> tuple[list[int], list[Tensor]]:
        if self.state is None:
            prompt = torch.tensor([text[:-1]], device=self.model.device)
            _, state = prefill(self.model, prompt)
            self.state = state.for_decoding(self.model.dtype, rollback=self.most)
            self.read = len(text) - 1
        wrong = max(self.read - (len(text) - 1), 0)
        self.state.rollback(wrong)
        unread, self.read = text[self.read - wrong :], len(text) + most - 1
        guesses, chances = [], []
        for _ in range(most):
            logits, self.state = score(self.model, unread, self.state)
            chances.append(self.sampler.distribution(logits[-1]))
            guesses.append(int(draw(chances[-1][None], self.sampler.uniform())))
            unread = guesses[-1:]
        return guesses, chances
