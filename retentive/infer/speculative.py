"""Speculative decoding: several tokens are drafted cheaply, and the model verifies all of them in one call.

    accept guess x with probability min(1, p(x) / q(x)); else sample from max(p - q, 0) and drop the guesses after it

p is the model's sampling distribution, q the distribution of the guess. The output has the same distribution as without
guessing (Leviathan et al., arXiv 2211.17192), and greedy decoding gives the same tokens. Guesses come from a smaller
model, or from the text itself, where its last tokens occurred before (prompt look-up). Rejected guesses are taken back
from the state by `rollback`: RetNet's ring buffer still holds the last tokens separately, a KV cache overwrites them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from retentive.infer.generate import Token, checked, prefill, step_threads
from retentive.infer.sample import Sampler, SamplingParams, check_finite, draw
from retentive.models import LanguageModel
from retentive.models.state import State

GRAMS = (3, 2)
"""Lengths of n-grams that a look-up searches for, the most reliable first."""


def speculate(
    model: LanguageModel,
    ids: Sequence[int] | Tensor,
    params: SamplingParams | None = None,
    *,
    draft: LanguageModel | None = None,
    most: int = 4,
    max_tokens: int | None = None,
    stop_ids: Sequence[int] = (),
    first_ids: Sequence[int] | None = None,
    state: State | None = None,
    counts: Counter[str] | None = None,
) -> Iterator[Token]:
    """Yields tokens after `ids` as `generate` does, several per call of the model if guesses are right.

    Args:
        draft: a smaller model with the same vocabulary that guesses; by default guesses come from the text itself.
        most: number of guesses per call of the model.
        counts: counter of "calls" of the model, guesses "made" and guesses "right".

    Other arguments as for `generate`. A seed gives other samples than there, of the same distribution, since random
    numbers are used differently.

    Raises:
        ValueError: as for `generate`; or the draft has another vocabulary, or `most` is below 1.
    """
    prompt, vocab = checked(model, ids), model.config.vocab_size
    if most < 1:
        raise ValueError(f"at least one token must be guessed a call, got most={most}")
    if draft is not None and draft.config.vocab_size != vocab:
        raise ValueError(f"the draft model has {draft.config.vocab_size} tokens, the model {vocab}: they must agree")
    sampler = Sampler(params or SamplingParams(), prompt, vocab, frozenset(stop_ids))
    guesser: Guesser = Lookup() if draft is None else Draft(draft, sampler, most)
    counts = Counter() if counts is None else counts
    tokens = _tokens(model, prompt, sampler, guesser, most, frozenset(stop_ids), first_ids, state, counts)
    return islice(tokens, max_tokens)


def _tokens(model, prompt, sampler, guesser, most, stop_ids, first_ids, state, counts) -> Iterator[Token]:
    """The endless loop of `speculate`, up to a stop."""
    text = prompt[0].tolist()
    logits, state = prefill(model, prompt, state)
    token, logprob = sampler(logits[0], first_ids)
    if token in stop_ids:
        return
    yield Token(token, logprob)
    text.append(token)
    state = state.for_decoding(model.dtype, rollback=most)
    while True:  # until a stop; `speculate` cuts it at max_tokens
        guesses, chances = guesser.guess(text, most)
        # the last token was sampled but not read: its logits judge the first guess, and so on; one row more in all
        logits, state = score(model, [text[-1], *guesses], state)
        counts.update(calls=1, made=len(guesses))
        for n, row in enumerate(logits):
            guess = guesses[n] if n < len(guesses) else None
            token = judge(sampler, row, guess, chances[n] if n < len(chances) else None)
            if token in stop_ids:
                return
            counts.update(right=int(token == guess))
            yield Token(token, float(row.log_softmax(-1)[token]))
            sampler.note(token)  # before the next row: the repetition penalty must know it
            text.append(token)
            if token != guess:
                break
        state.rollback(len(guesses) - n)  # n guesses were right, the others are taken back


@torch.no_grad()
def score(model: LanguageModel, ids: list[int], state: Any) -> tuple[Tensor, Any]:
    """Reads the ids; returns (logits `[T, vocab]` after each, float32 on the CPU; state, which can be rolled back)."""
    with step_threads(model, len(ids), state):
        x, state = model.hidden(torch.tensor([ids], device=model.device), state)
        logits = model.head(x[0]).float().cpu()
    check_finite(logits)
    return logits, state


def judge(sampler: Sampler, logits: Tensor, guess: int | None, q: Tensor | None) -> int:
    """Returns the guess if accepted, else another token; distributed as `sampler` samples from `logits` `[vocab]`.

    Args:
        guess: None if there is none: then samples as usual.
        q: distribution `[vocab]` that the guess was drawn from; None if it was certain (probability 1).
    """
    p = sampler.distribution(logits)
    if guess is None:
        return int(draw(p[None], sampler.uniform()))
    chance = 1.0 if q is None else float(q[guess])
    if float(sampler.uniform()) * chance < float(p[guess]):  # u < p / q, without dividing by a tiny q
        return guess
    rest = (p - q).clamp(min=0) if q is not None else p.index_fill(0, torch.tensor(guess), 0)
    if not bool(rest.any()):  # p equals q except for rounding
        rest = p
    return int(draw(rest[None], sampler.uniform()))


class Guesser(Protocol):
    """Source of guesses."""

    def guess(self, text: list[int], most: int) -> tuple[list[int], list[Tensor]]:
        """Returns (up to `most` tokens after `text`, the distribution `[vocab]` of each; none if certain).

        Between calls the text grows by the right guesses and one more token.
        """


class Lookup:
    """Prompt look-up: guesses what followed the most recent earlier occurrence of the text's last n-gram."""

    def __init__(self) -> None:
        self.after: dict[tuple[int, ...], int] = {}  # n-gram -> index in the text of the token after it
        self.known = 0  # tokens of the text whose n-grams are in `after`

    def guess(self, text: list[int], most: int) -> tuple[list[int], list[Tensor]]:
        # n-grams that end before the text does: the last one is followed by nothing yet
        for at in range(self.known, len(text)):
            for n in GRAMS:
                if at >= n:
                    self.after[tuple(text[at - n : at])] = at
        self.known = len(text)
        for n in GRAMS:
            if (at := self.after.get(tuple(text[-n:]), -1)) >= 0:
                period = len(text) - at  # past the end of the text, guess that it repeats
                return [text[at + i % period] for i in range(most)], []
        return [], []


class Draft:
    """Guesses with a smaller model, sampled with the parameters and generator of the large model's tokens."""

    def __init__(self, model: LanguageModel, sampler: Sampler, most: int):
        self.model, self.sampler, self.most = model, sampler, most
        self.state: Any = None
        self.read = 0  # tokens that `state` has read: the text's, then guesses, right or wrong

    def guess(self, text: list[int], most: int) -> tuple[list[int], list[Tensor]]:
        if self.state is None:
            prompt = torch.tensor([text[:-1]], device=self.model.device)
            _, state = prefill(self.model, prompt)
            self.state = state.for_decoding(self.model.dtype, rollback=self.most)
            self.read = len(text) - 1
        # all of the last guesses but the final one were read; those past the text, without its newest token, were wrong
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
