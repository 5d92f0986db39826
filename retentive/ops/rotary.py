"""Rotation of q and k by angle * position, so that q_n . k_m depends on n - m (the paper's Theta, equation 5).

Two variants, named by the features they pair. Their angles differ too, so weights of one do not fit the other:

`interleaved`   pairs (0,1), (2,3), …; angles 10000^-linspace(0, 1, K/2), both ends included (torchscale)
`half`          pairs (i, i + K/2); angles 10000^(-2i/K) (fla, NeoX, Llama)
`none`          no rotation
"""

import torch
from torch import Tensor

VARIANTS = ("interleaved", "half", "none")


def frequencies(K: int, variant: str, *, base: float = 10000.0, device: torch.device | None = None) -> Tensor:
    """Returns the radians each pair turns per token, float64 `[K/2]`; zeros for "none"."""
    half = K // 2
    if variant == "none":
        return torch.zeros(half, dtype=torch.float64, device=device)
    if variant == "interleaved":
        power = torch.linspace(0, 1, half, dtype=torch.float64, device=device)
    else:
        power = torch.arange(half, dtype=torch.float64, device=device) / half
    return base**-power


def phases(
    position: Tensor, K: int, variant: str, *, base: float = 10000.0, dtype: torch.dtype = torch.float32
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
    angle = position.to(torch.float64)[..., None] * frequencies(K, variant, base=base, device=position.device)
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
