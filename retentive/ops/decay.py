"""Decay schedules: log(gamma) of each head, and the row norm that belongs to it.

`paper`   gamma_h = 1 - 2^(-5-h), h = 0 … H-1 (equation 8; torchscale and fla)
`lm`      gamma_h = 1 - exp(linspace(log 1/32, log 1/512, H)) (section 3.1: the paper's language models), or between
          two other numbers
`none`    gamma_h = 1: linear attention without decay (the paper's ablation)

Or log(gamma) of each token, from a projection z of it:

`gated`   log sigmoid(z) / 16: gated retention (YOCO, arXiv 2405.05254)
`sigmoid` -exp(-1/2) sigmoid(z): RWKV-7's (arXiv 2503.14456), so gamma is above 0.545

Everything is built from float64 with log1p: in float32, 1 - 2^-25 is 1, and heads 20 and up would never forget.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retentive.ops.transforms import transformed

SCHEDULES = ("paper", "lm", "none")
PER_TOKEN = ("gated", "sigmoid")
LM_RANGE = (1 / 32, 1 / 512)
FASTEST = math.exp(-0.5)
"""Decay `sigmoid`: -log(gamma) is below this."""


def values(schedule: str | Sequence[float], heads: int, lm_range: tuple[float, float] = LM_RANGE) -> list[float]:
    """Returns log(gamma) of each head as floats. A sequence of H log decays is checked and returned unchanged.

    Args:
        lm_range: 1 - gamma of the first and of the last head, for `lm`.

    Raises:
        ValueError: an unknown schedule, or a sequence that is not H numbers <= 0.
    """
    if not isinstance(schedule, str):
        if len(schedule) != heads or not all(x <= 0 for x in schedule):
            raise ValueError(f"decay needs {heads} log decays <= 0, one for each head, got {tuple(schedule)}")
        return [float(x) for x in schedule]
    if schedule == "paper":
        return [math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]
    if schedule == "lm":
        first, last = (math.log(x) for x in lm_range)
        steps = [first + (last - first) * h / max(heads - 1, 1) for h in range(heads)]
        return [math.log1p(-math.exp(x)) for x in steps]
    if schedule == "none":
        return [0.0] * heads
    raise ValueError(f"unknown decay schedule {schedule!r}, expected one of {', '.join(SCHEDULES)} or {heads} numbers")


def log_decay(
    schedule: str | Sequence[float],
    heads: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    lm_range: tuple[float, float] = LM_RANGE,
) -> Tensor:
    """Returns log(gamma) `[H]` for `retention(..., log_decay=...)`. Built on each call, so no model cast rounds it."""
    return torch.tensor(values(schedule, heads, lm_range), dtype=dtype, device=device)


def of_tokens(kind: str, z: Tensor, scale: float) -> Tensor:
    """Returns log(gamma) of tokens from their projections `z`, for a decay of PER_TOKEN.

    Args:
        scale: divisor of the log sigmoid, for `gated`.
    """
    return F.logsigmoid(z) / scale if kind == "gated" else -FASTEST * z.sigmoid()


def bias_for(kind: str, log_decay: Tensor, scale: float) -> Tensor:
    """Returns z with `of_tokens(kind, z, scale) == log_decay` < 0: the bias of new gates whose projections are near 0.

    For `sigmoid` the log decay must be above -FASTEST.
    """
    return logit(log_decay * scale if kind == "gated" else torch.log(-log_decay / FASTEST))


def logit(log_p: Tensor) -> Tensor:
    """Returns x with log sigmoid(x) = `log_p` < 0."""
    return log_p - torch.log(-torch.expm1(log_p))


def check_values(log_decay: Tensor) -> None:
    """Checks the values of log decays on CPUs. On other devices reading them would wait for the device.

    Compiled graphs and torch.func transforms are not checked either, since values are unknown there.

    Raises:
        ValueError: a value is above 0, or a head's decay is NaN. A token's NaN passes, as in k or v: it comes from that
            token, and other rows of the batch are unaffected.
    """
    if log_decay.device.type != "cpu" or torch.compiler.is_compiling() or transformed():
        return  # under vmap one tensor stands for many, and its `bool` fails
    if bool((log_decay > 0).any() if log_decay.ndim > 1 else not (log_decay <= 0).all()):
        worst = float(log_decay.detach().max())  # max of a tensor with NaN is NaN
        raise ValueError(f"log_decay must be at most 0 everywhere (gamma <= 1), got {worst:g}")


def row_norm(log_decay_H: Tensor, count: Tensor) -> Tensor:
    """Returns 1 / sqrt(1 + gamma + … + gamma^(n-1)), `[..., H]`, for n = `count` `[...]` tokens including this one.

    This is the paper's second stabiliser, D / sqrt(row sum of D), as a factor of q. It depends on the position alone,
    so it is the same in every form.
    """
    n = count.to(log_decay_H.dtype).clamp(min=1)[..., None]
    # the geometric series (1 - gamma^n) / (1 - gamma), by expm1: 1 - gamma itself cancels where gamma is close to 1
    forgets = log_decay_H < 0
    safe = torch.where(forgets, log_decay_H, -1.0)  # where() evaluates both sides: avoid 0/0 in the unused one
    total = torch.where(forgets, torch.expm1(n * safe) / torch.expm1(safe), n)
    return total.rsqrt()
