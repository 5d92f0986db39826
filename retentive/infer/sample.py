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
        tokens, norms = pick(logits[None], [self], [allowed])
        return tokens[0], float(logits[tokens[0]].float().cpu() - norms[0])

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
            ids = self.seen.nonzero().squeeze(1)
            seen = logits[ids]
            # dividing a negative logit would make the token likelier
            logits = logits.index_copy(0, ids, torch.where(seen > 0, seen / penalty, seen * penalty))
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
    """Samples one token for each row of logits `[n, vocab]`.

    Args:
        allowed: for each row the tokens that may be sampled, as ids or bool `[vocab]`; None for all.

    Returns:
        The tokens, and norms `[n,1]`: a logit minus its row's norm is the model's log probability of that token, before
        temperature, filters and penalty.
    """
    logits = logits.float().cpu()
    most = logits.amax(-1, keepdim=True)
    weights, rows = (logits - most).exp_(), logits
    norms = most + total(weights).log()
    for n, (sampler, few) in enumerate(zip(samplers, allowed or [None] * len(samplers), strict=True)):
        if sampler.seen is not None or sampler.params.bias or few is not None:
            rows = rows.clone() if rows is logits else rows
            rows[n] = sampler.adjusted(logits[n], few)
    drawn = [n for n, s in enumerate(samplers) if s.params.temperature > 0]
    tokens = rows.argmax(-1) if len(drawn) < len(samplers) else torch.empty(len(samplers), dtype=torch.long)
    if drawn:
        if rows is not logits or any(changes(samplers[n].params) for n in drawn):
            del weights  # whose memory is taken again: new memory costs more than the arithmetic
            weights = weights_of(rows, [s.params for s in samplers])
        # one search for all rows, but each u from its own generator, so that batching changes nothing
        u = torch.cat([samplers[n].uniform() for n in drawn])
        tokens[drawn] = draw(weights if len(drawn) == len(samplers) else weights[drawn], u)
    for sampler, token in zip(samplers, tokens.tolist(), strict=True):
        sampler.note(token)
    return tokens.tolist(), norms


def top_logprobs(logprobs: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """Returns the `count` likeliest (token, log probability) of each row `[T, vocab]`, likeliest first."""
    top = logprobs.topk(count)
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [tuple(zip(*row, strict=True)) for row in rows]


BLOCK = 128
"""Number of tokens whose weights are summed as a block, before searching within one."""


def in_blocks(weights: Tensor) -> Tensor:
    """Weights `[…, vocab]` as `[…, blocks, BLOCK]`, with zeros at the end."""
    if missing := -weights.shape[-1] % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, missing))
    return weights.unflatten(-1, (-1, BLOCK))


def total(weights: Tensor) -> Tensor:
    """Sum `[…, 1]` of weights `[…, vocab]`, the same to the bit for a row in a batch and alone.

    A single long row would be divided among threads, and the order of its additions with it.
    """
    return in_blocks(weights).sum(-1).sum(-1, keepdim=True)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Samples token ids `[n]` with probabilities proportional to `weights` `[n, vocab]`, by u `[n]` in [0, 1), float64.

    Inverts the cumulative distribution: picks the first token whose running sum exceeds u times the total. A token of
    weight 0 adds nothing to the sum, so it is never picked.
    """
    # float32 would round away the tail of a large vocabulary. Blocks are summed first, since a running sum over all
    # tokens takes longer than everything else done to the logits.
    blocks = in_blocks(weights)
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


def narrows(params: SamplingParams) -> bool:
    """True if top-k, top-p or min-p may leave tokens out."""
    return bool(params.top_k or params.top_p < 1 or params.min_p)


def changes(params: SamplingParams) -> bool:
    """True if tokens are drawn by other probabilities than the model's."""
    return params.temperature != 1 or narrows(params)


def weights_of(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Returns weights `[n, vocab]` proportional to the probabilities after temperature, top-k, top-p and min-p.

    The likeliest token always stays. Among equally likely ones at the border, the first are kept.
    """
    # beyond these limits, float32 gives 0 / 0 or -inf / inf
    temperatures = torch.tensor([[min(max(p.temperature, 1e-6), 1e30)] for p in params])
    # no exponential exceeds 1
    weights = (logits - logits.amax(-1, keepdim=True)).div_(temperatures).exp_()
    for row, p, of_row in zip(logits, params, weights, strict=True):
        if narrows(p) and p.temperature > 0:
            of_row.copy_(narrowed(row, of_row, p))
    return weights


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """`weights_of` a single row `[vocab]`."""
    return weights_of(logits[None], [params])[0]


def narrowed(logits: Tensor, weights: Tensor, params: SamplingParams) -> Tensor:
    """Returns the weights `[vocab]`, 0 for tokens that top-k, top-p (arXiv 1904.09751) or min-p leaves out."""
    k = params.top_k if params.top_k < len(logits) else 0
    if k or params.top_p < 1:
        # A whole vocabulary takes long to sort, so only tokens that may stay are.
        if k:  # where fewer are allowed, the k-th is -inf, as all others are
            some = logits >= logits.topk(k, sorted=False).values.min().clamp(min=torch.finfo(logits.dtype).min)
        else:  # tokens below the bound have less than 1 - top_p together; a tenth is left for rounding
            some = weights >= 0.9 * (1 - params.top_p) * total(weights) / len(weights)
        ids = some.nonzero().squeeze(1)
        ids = ids[logits[ids].argsort(descending=True, stable=True)][: k or None]
        if params.top_p < 1:
            sums = weights[ids].cumsum(-1)
            goal = params.top_p * (sums[-1] if k else total(weights))
            ids = ids[: 1 + int((sums < goal).sum())]  # includes the token that crosses the sum
        weights = torch.zeros_like(weights).index_copy_(0, ids, weights[ids])
    if params.min_p:
        weights = weights * (weights >= params.min_p * weights.max())
    return weights
