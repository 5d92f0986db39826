"""Generate tokens from an exported model with numpy alone.

for id in generate(OnnxModel("novels/model.onnx"), ids, SamplingParams(temperature=0), max_tokens=50): …
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from retentive.sampling import SamplingParams, check_bias


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError if there are no ids, or some are outside the vocabulary."""
    if not len(ids) or not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"expected at least one id, each from 0 to {vocab_size - 1}")


class Reader(Protocol):
    """Model with the state of one sequence, which every call continues."""

    eos: int
    """Id of the end-of-text token."""
    vocab_size: int

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Reads the ids and returns the logits, float32 `[vocabulary]`."""


def generate(
    model: Reader, ids: Sequence[int], params: SamplingParams | None = None, *, max_tokens: int
) -> Iterator[int]:
    """Yields generated ids one by one, until the end-of-text token, which is left out.

    Raises:
        ValueError: as the model's `read`, or a bias is for tokens outside the vocabulary.
        ArithmeticError: the logits are not finite.
    """
    params = params or SamplingParams()
    check_bias(params, model.vocab_size)
    random, seen = np.random.default_rng(params.seed), set(ids) - {model.eos}
    for _ in range(max_tokens):
        id = pick(model.read(ids), params, random, seen)
        if id == model.eos:
            return
        yield id
        seen.add(id)
        ids = [id]


def pick(logits: np.ndarray, params: SamplingParams, random: np.random.Generator, seen: set[int]) -> int:
    """Picks a token as `infer.sample` does, except for the random numbers.

    Raises:
        ArithmeticError: the logits are not finite.
    """
    if not np.isfinite(logits.max()):
        raise ArithmeticError("the model's logits are not finite: are there NaN in its weights?")
    x = logits.astype(np.float64)
    if params.repetition_penalty != 1:
        some = sorted(seen)
        x[some] = np.where(x[some] > 0, x[some] / params.repetition_penalty, x[some] * params.repetition_penalty)
    for id, bias in params.bias.items():
        x[id] += bias
    if params.temperature == 0:
        return int(x.argmax())
    order = np.argsort(-x, kind="stable")[: params.top_k or None]
    p = np.exp((x[order] - x[order[0]]) / params.temperature)
    p /= p.sum()
    kept = max(1, int((p.cumsum() - p < params.top_p).sum()))
    kept = min(kept, max(1, int((p >= params.min_p * p[0]).sum())))
    return int(order[random.choice(kept, p=p[:kept] / p[:kept].sum())])
