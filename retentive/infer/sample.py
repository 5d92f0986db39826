"""Sampling, from logits to tokens: greedy, temperature, top-k, top-p, min-p, repetition penalty, bias; seeded, batched.

They apply in the usual order: repetition penalty, bias, temperature, top-k, top-p, min-p. A sequence's tokens depend
only on its own logits and its own generator, whatever else is sampled in the same call. Everything runs on the CPU:
logits of a vocabulary are small, and a seed then gives the same tokens on every device.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from retentive.sampling import SamplingParams, check_bias

NOT_FINITE = "the model's logits are not finite: are there NaN in its weights?"


def check_finite(logits: Tensor) -> None:
    """Raises ArithmeticError if a row of logits `[..., vocab]` has NaN or an infinite maximum.

    Sampling from those would look like text: the argmax of NaN is token 0, or beyond the vocabulary.
    """
    if not bool(logits.amax(-1).isfinite().all()):
        raise ArithmeticError(NOT_FINITE)


class Sampler:
    """Samples the tokens of one sequence; holds its random generator and the tokens seen so far.

    Args:
        ends: tokens that end the text. They get no repetition penalty: the turns of a chat end by one, and after the
            first turn the model would be kept from ending its answer.
    """

    def __init__(self, params: SamplingParams, prompt: Tensor, vocab_size: int, ends: Collection[int] = ()):
        self.params = params
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)
        self.seen = None  # bool [vocab], only for a repetition penalty
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            ids = prompt.flatten().cpu()
            self.seen[ids[ids < vocab_size]] = True  # beyond it are placeholders of pictures and sound
            self.seen[[id for id in ends if 0 <= id < vocab_size]] = False
        check_bias(params, vocab_size)

    def __call__(self, logits: Tensor, allowed: Sequence[int] | None = None) -> tuple[int, float]:
        """Samples from logits `[vocab]`, of `allowed` tokens; returns (token, log probability before filters)."""
        check_finite(logits)
        tokens, logprobs = pick(logits[None], [self], [allowed])
        return tokens[0], float(logprobs[0, tokens[0]])

    def uniform(self) -> Tensor:
        """Returns the generator's next number, `[1]` in [0, 1), float64: 24 bits are too few for rare tokens."""
        return torch.rand(1, generator=self.generator, dtype=torch.float64)

    def note(self, token: int) -> None:
        """Marks the token as seen, for the repetition penalty."""
        if self.seen is not None:
            self.seen[token] = True

    def distribution(self, logits: Tensor) -> Tensor:
        """Returns the sampling probabilities `[vocab]`, float32, for logits `[vocab]`; one-hot if greedy."""
        logits = self.adjusted(logits.float().cpu(), None)
        if self.params.temperature == 0:
            return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1)
        p = filtered(logits, self.params)
        return p / p.sum()

    def adjusted(self, logits: Tensor, allowed: Sequence[int] | Tensor | None) -> Tensor:
        """Returns logits `[vocab]` after penalty and bias, minus infinity where not allowed."""
        if self.seen is not None:
            penalty = min(max(self.params.repetition_penalty, 1e-30), 1e30)  # beyond, float32 gives 0 / 0 or 0 * inf
            # dividing a negative logit would make the token likelier
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self.seen, penalised, logits)
        if self.params.bias:
            ids = torch.tensor(list(self.params.bias))
            logits = logits.index_add(0, ids, torch.tensor(list(self.params.bias.values()), dtype=logits.dtype))
        # keep logits finite for any input: the difference of two infinities is NaN
        logits = logits.clamp(torch.finfo(logits.dtype).min, torch.finfo(logits.dtype).max)
        if isinstance(allowed, Tensor) and allowed.dtype == torch.bool:
            logits = logits.masked_fill(~allowed, -torch.inf)
        elif allowed is not None:
            ids = torch.as_tensor(allowed)
            logits = torch.full_like(logits, -torch.inf).index_copy_(0, ids, logits[ids])
        return logits


def pick(
    logits: Tensor, samplers: Sequence[Sampler], allowed: Sequence[Sequence[int] | Tensor | None] | None = None
) -> tuple[list[int], Tensor]:
    """Samples one token for each row of logits `[n, vocab]`; also returns the model's log probabilities `[n, vocab]`.

    Args:
        allowed: for each row the tokens that may be sampled, as ids or bool `[vocab]`; None for all.
    """
    logits = logits.float().cpu()
    logprobs = logits.log_softmax(-1)  # the model's own, before any adjustment
    allowed = allowed or [None] * len(samplers)
    rows = [  # `adjusted` copies the row, so call it only if something changes
        s.adjusted(row, a) if s.seen is not None or s.params.bias or a is not None else row
        for s, row, a in zip(samplers, logits, allowed, strict=True)
    ]
    tokens = [0] * len(samplers)
    drawn = [n for n, s in enumerate(samplers) if s.params.temperature > 0]
    for n in set(range(len(samplers))) - set(drawn):
        tokens[n] = int(rows[n].argmax())
    if drawn:
        # one search for all rows, but each u from its own generator, so that batching changes nothing
        weights = torch.stack([filtered(rows[n], samplers[n].params) for n in drawn])
        u = torch.cat([samplers[n].uniform() for n in drawn])
        for n, token in zip(drawn, draw(weights, u).tolist(), strict=True):
            tokens[n] = token
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.note(token)
    return tokens, logprobs


def top_logprobs(logprobs: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """Returns the `count` likeliest (token, log probability) of each row `[T, vocab]`, likeliest first."""
    top = logprobs.topk(count)
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [tuple(zip(*row, strict=True)) for row in rows]


BLOCK = 128
"""Number of tokens whose weights are summed as a block, before searching within one."""


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Samples token ids `[n]` with probabilities proportional to `weights` `[n, vocab]`, by u `[n]` in [0, 1), float64.

    Inverts the cumulative distribution: picks the first token whose running sum exceeds u times the total. A token of
    weight 0 adds nothing to the sum, so it is never picked.
    """
    # float32 would round away the tail of a large vocabulary. Blocks are summed first, since a running sum over all
    # tokens takes longer than everything else done to the logits.
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64)
    block, rest = _first_above(sums, u * sums.sum(-1))
    token, _ = _first_above(blocks[torch.arange(len(weights)), block].double(), rest)
    return block * BLOCK + token


def _first_above(parts: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first index of parts `[n,m]` whose running sum exceeds goal `[n]`, and goal minus the sum before.

    If rounding lets no sum exceed the goal, it is the last part that is not 0.
    """
    sums = parts.cumsum(-1)
    goal = torch.minimum(goal, torch.nextafter(sums[:, -1], torch.zeros_like(goal)))
    found = torch.searchsorted(sums, goal[:, None], right=True).squeeze(1)
    before = torch.where(found == 0, 0, sums.gather(1, (found - 1).clamp(min=0)[:, None]).squeeze(1))
    return found, goal - before


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Returns weights `[vocab]` proportional to the probabilities after temperature, top-k, top-p and min-p.

    The likeliest token always stays. Among equally likely ones at the border, the first are kept.
    """
    temperature = min(max(params.temperature, 1e-6), 1e30)  # beyond, float32 gives 0 / 0 or -inf / inf
    scaled = (logits - logits.max()) / temperature  # the largest is 0, so no exponential overflows
    p = scaled.softmax(-1)
    count = min(params.top_k or len(p), len(p))
    if params.top_p < 1:
        count = nucleus(scaled, p, count, params.top_p)
    if count < len(p):  # a threshold, since sorting a whole vocabulary takes far longer
        least = scaled.topk(count, sorted=False).values.min()
        above = scaled > least
        equal = (scaled == least).nonzero().squeeze(1)[: count - int(above.sum())]
        p = p * above.index_fill(0, equal, True)
    if params.min_p:
        p = p * (p >= params.min_p * p.max())
    return p


def nucleus(scaled: Tensor, p: Tensor, count: int, top_p: float) -> int:
    """Returns how many of the `count` likeliest tokens make up `top_p` of them (nucleus, arXiv 1904.09751)."""
    goal = top_p * (p if count == len(p) else p[scaled.topk(count, sorted=False).indices]).sum()
    sums = p[scaled.topk(min(256, count)).indices].cumsum(-1)
    if sums[-1] < goal and count > 256:  # rarely needed, and sorting all takes much longer
        sums = p[scaled.argsort(descending=True)[:count]].cumsum(-1)
    return min(1 + int((sums < goal).sum()), count)  # includes the token that crosses the sum
