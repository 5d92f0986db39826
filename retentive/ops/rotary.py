"""Rotation of q and k by angle * position, so that q_n . k_m depends on n - m (the paper's Theta, equation 5).

Two variants, named by the features they pair. Their angles differ too, so weights of one do not fit the other:

`interleaved`   pairs (0,1), (2,3), …; angles 10000^-linspace(0, 1, K/2), both ends included (torchscale)
`half`          pairs (i, i + K/2); angles 10000^(-2i/K) (fla, NeoX, Llama)
`none`          no rotation
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

VARIANTS = ("interleaved", "half", "none")


@dataclass(frozen=True)
class Scaling:
    """Smaller angles, for texts longer than those that a model was first trained on (rope scaling).

    linear    every angle divided by `factor` (arXiv 2306.15595); `original` is 0
    llama3    the same for pairs that turn at most `low` times within `original` tokens; pairs that turn at least `high`
              times keep their angle; between the two, a mixture of both, linear in the number of turns
    """

    factor: float
    """Divisor of the angles."""
    low: float = 0.0
    """Turns up to which angles are divided by the whole factor (low_freq_factor)."""
    high: float = 0.0
    """Turns from which angles stay as they are (high_freq_factor)."""
    original: int = 0
    """Length of the texts of the first training (original_max_position_embeddings); 0: all angles are divided."""

    def __post_init__(self):
        numbers = (self.factor, self.low, self.high, self.original)
        if any(type(x) not in (int, float) for x in numbers) or type(self.original) is not int:
            raise ValueError(f"rotary_scaling must be numbers, and original a whole one, got {numbers}")
        if not 0 < self.factor < math.inf or self.original < 0:
            raise ValueError(f"rotary_scaling needs a factor above 0 and original from 0 on, got {numbers}")
        if self.original and not 0 <= self.low < self.high < math.inf:
            raise ValueError(f"rotary_scaling needs low below high, got {self.low} and {self.high}")

    @property
    def kind(self) -> str:
        """Name in other projects: linear or llama3."""
        return "llama3" if self.original else "linear"

    def applied(self, frequency: Tensor) -> Tensor:
        """Returns the smaller angles of pairs that turn by `frequency` radians per token."""
        if not self.original:
            return frequency / self.factor
        turns = frequency * self.original / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


def frequencies(
    K: int,
    variant: str,
    *,
    base: float = 10000.0,
    scaling: Scaling | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Returns the radians each pair turns per token, float64 `[K/2]`; zeros for "none"."""
    half = K // 2
    if variant == "none":
        return torch.zeros(half, dtype=torch.float64, device=device)
    if variant == "interleaved":
        power = torch.linspace(0, 1, half, dtype=torch.float64, device=device)
    else:
        power = torch.arange(half, dtype=torch.float64, device=device) / half
    return base**-power if scaling is None else scaling.applied(base**-power)


def phases(
    position: Tensor,
    K: int,
    variant: str,
    *,
    base: float = 10000.0,
    scaling: Scaling | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, each `[..., K/2]`, for integer `position` `[...]`.

    Products angle * position are computed in float64 and only the results rounded to `dtype`. At position 10^6 a
    float32 product would be off by 0.06 radians.

    Raises:
        ValueError: an unknown variant, or an odd K.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown rotary variant {variant!r}, expected one of {', '.join(VARIANTS)}")
    if K % 2:
        raise ValueError(f"rotation pairs up features: the key head dim must be even, got {K}")
    half = K // 2
    if variant == "none":  # angle 0, so that callers need no special case
        shape, device = (*position.shape, half), position.device
        return torch.ones(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
    frequency = frequencies(K, variant, base=base, scaling=scaling, device=position.device)
    angle = position.to(torch.float64)[..., None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor, variant: str) -> Tensor:
    """Returns x rotated, same shape, in the dtype of `cos` or wider; cos and sin are `[T, K/2]` or `[B, T, K/2]`."""
    if variant == "none":
        return x_BTHK.to(torch.promote_types(x_BTHK.dtype, cos.dtype))
    # each pair is a complex number a + ib, multiplied by exp(i angle)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
    if variant == "interleaved":
        a, b = x_BTHK.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x_BTHK.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
