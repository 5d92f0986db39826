"""From logits to a token: greedy, temperature, top-k, top-p, min-p, repetition penalty; seeded.

Filters apply in the order of the field: repetition penalty, temperature, top-k, top-p, min-p.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is picked."""

    temperature: float = 1.0
    """Divides the logits; 0 picks the likeliest token (greedy)."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities sum up to p."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Tokens seen before are made less likely: positive logits divided by it, negative ones multiplied (CTRL, 2019)."""
    seed: int | None = None
    """The same seed gives the same tokens; None takes a new one."""

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")


class Sampler:
    """Picks tokens for one sequence. What it remembers (which tokens occurred) is bounded by the vocabulary."""

    def __init__(self, params: SamplingParams, prompt: Tensor, vocab_size: int):
        self.params = params
        self.generator = torch.Generator()  # on the CPU, so that a seed means the same on every device
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)
        self.seen = None
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[prompt.flatten().cpu()] = True

    def __call__(self, logits: Tensor, allowed: Sequence[int] | None = None) -> tuple[int, float]:
        """(token, its log probability under the model's own distribution) for logits `[vocab]`; one of `allowed`."""
        logits = logits.float().cpu()
        logprobs = logits.log_softmax(-1)
        if self.seen is not None:
            penalty = self.params.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self.seen, penalised, logits)
        if allowed is not None:
            logits = torch.full_like(logits, -torch.inf).index_copy_(0, torch.tensor(allowed), logits[list(allowed)])
        if self.params.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = filtered(logits, self.params)
            token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        if self.seen is not None:
            self.seen[token] = True
        return token, float(logprobs[token])


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities `[vocab]` after temperature, top-k, top-p and min-p; the likeliest token always stays."""
    ordered, order = torch.sort((logits - logits.max()) / params.temperature, descending=True, stable=True)
    p = ordered.softmax(-1)
    keep = torch.ones_like(p, dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
        p = (p * keep) / (p * keep).sum()
    if params.top_p < 1:
        keep &= p.cumsum(-1) - p < params.top_p  # the token that crosses the sum is the last one in
    if params.min_p:
        keep &= p >= params.min_p * p[0]
    return torch.zeros_like(p).scatter_(0, order, p * keep)
