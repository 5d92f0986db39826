"""Sampling parameters, shared by every runtime, with torch or without."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

from retentive.options import check_type, option


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled from the logits."""

    temperature: float = 1.0
    """Divides the logits; 0 picks the likeliest token (greedy decoding)."""
    top_k: int = 0
    """Keeps only the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Nucleus sampling: keeps the likeliest tokens whose probabilities sum to p."""
    min_p: float = 0.0
    """Keeps only tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Makes seen tokens less likely: positive logits are divided by it, negative ones multiplied (CTRL, 2019). Tokens
    that end the text are spared."""
    bias: Mapping[int, float] = field(default_factory=dict)
    """Numbers added to the logits of these tokens; -100 bans a token."""
    seed: int | None = None
    """Seed of the random generator: the same seed gives the same tokens. None draws a new seed each time."""

    def __post_init__(self):
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            check_type(name, getattr(self, name), Real)
        check_type("top_k", self.top_k, Integral)
        if self.seed is not None:
            check_type("seed", self.seed, Integral)
        check_type("bias", self.bias, Mapping)
        for token, bias in self.bias.items():
            check_type("a token of bias", token, Integral)
            check_type("a bias", bias, Real)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"{option('temperature', self.temperature)}: must be at least 0")
        if self.top_k < 0:
            raise ValueError(f"{option('top_k', self.top_k)}: must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{option('top_p', self.top_p)}: must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"{option('min_p', self.min_p)}: must be in [0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"{option('repetition_penalty', self.repetition_penalty)}: must be above 0")
        if not all(math.isfinite(x) for x in self.bias.values()):
            raise ValueError(f"a bias must be a finite number, got {dict(self.bias)}; -100 bans a token")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"{option('seed', self.seed)}: must be from -2^63 to 2^63 - 1")


SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields of SamplingParams that requests and `generation_config.json` give."""
GREEDY = SamplingParams(temperature=0)
"""The likeliest token at each step."""
TEXT = SamplingParams(temperature=0.8, top_p=0.95)
"""Default for text: slightly sharper than the model's own distribution, without its unlikeliest tokens."""


def check_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raises ValueError if a bias names a token outside the vocabulary."""
    if bad := [t for t in params.bias if not 0 <= t < vocab_size]:
        raise ValueError(f"`bias`: expected token ids from 0 to {vocab_size - 1}, got {bad[:5]}")
