"""The correctness gate: outputs and gradients against float64, on the shape, dtype and backend that will be timed.

The gold is `reference.parallel` in float64 on the same numbers. Our operator must equal it, including the final state.
torchscale divides each row of each head by a positive number that has no gradient. So it is compared after an RMS norm
over the head's numbers, which removes any such factor from outputs and gradients. Attention is another function and is
not compared.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.lab import rivals
from benchmarks.lab.rivals import OURS
from benchmarks.lab.roofline import Work
from retentive.ops import reference, retention
from retentive.ops.decay import log_decay

LENGTH = 601
"""Tokens of the gate for our operator: more than four of the longest chunks, and a last one that is not full."""
TOLERANCE = {"fp32": 2e-6, "bf16": 1e-2, "fp16": 1.5e-3}
"""Tolerance relative to the norm of the gold. fp32: rounding at 6e-8 in sums of a few hundred terms. bf16 and fp16: the
operands of two or three products in a row are each rounded at 2e-3 (2e-4) of themselves."""
RIVAL_TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2, "fp16": 1e-2}
"""Wider tolerance of rivals: torchscale rounds masks and running state to the dtype, fla multiplies float32 in TF32."""


class Checked(NamedTuple):
    """Output and gradients that the gate compares."""

    o: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def check(name: str, work: Work, chunk: int | None = None) -> float:
    """Largest error of the rival, relative to the norm of the gold, at a short length.

    Raises:
        ArithmeticError: the error is above the tolerance, or NaN.
    """
    # torchscale takes whole chunks only
    length = LENGTH if name != "torchscale" else max(2 * (chunk or 0), 512)
    # one row: float64 on a CPU takes long, and rows are independent
    short = replace(work, B=1, T=length)
    # on the CPU, so that every device and dtype is given the same numbers
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, length, work.H, n) for n in (work.K, work.K, work.V, work.V)]
    q, k, v, do = (torch.randn(s, generator=generator).to(work.device, short.torch_dtype) for s in shapes)
    norm = name == "torchscale"
    by_reference, exact = golden(work), (q.double(), k.double(), v.double())
    gold = gradients(lambda *qkv: by_reference(*qkv)[0], *exact, do.double(), norm)
    got = gradients(runner(name, short, chunk), q, k, v, do, norm)
    errors = {part: distance(x, y) for part, x, y in zip(Checked._fields, got, gold, strict=True)}
    if name in OURS:
        _, state = retention(q, k, v, log_decay("paper", work.H, device=q.device), backend=OURS[name])
        errors["state"] = distance(state, by_reference(*exact)[1])  # type: ignore[arg-type]
    # a NaN counts as the largest, although max() could skip it; for the same reason the test below is `not <=`
    worst = max(errors, key=lambda part: float("inf") if errors[part] != errors[part] else errors[part])
    tolerance = (TOLERANCE if name in OURS else RIVAL_TOLERANCE)[work.dtype]
    if not errors[worst] <= tolerance:
        raise ArithmeticError(
            f"{name} is wrong at H={work.H}, K={work.K}, V={work.V} in {work.dtype}: {worst} is off by "
            f"{errors[worst]:.1e} of its norm, more than {tolerance:.0e}: not timed"
        )
    return errors[worst]


def golden(work: Work):
    """A function of q, k, v `[1,T,H,n]` in float64: the reference's o and its state after the last token."""
    # in float64 from the beginning: rounded decays would be different decays
    decays = log_decay("paper", work.H, dtype=torch.float64, device=work.device)
    zeros = torch.zeros(1, work.H, work.K, work.V, dtype=torch.float64, device=work.device)
    return lambda q, k, v: reference.parallel(q, k, v, decays, scale=work.K**-0.5, state=zeros)


def runner(name: str, work: Work, chunk: int | None):
    """The rival as a function of q, k, v `[B,T,H,n]`, independent of its own layout."""
    one = rivals.make(name, work, chunk)  # q, k [B,H,T,K] and v [B,T,H V] for torchscale, its o in chunks
    if name != "torchscale":
        return one.run
    return lambda q, k, v: one.run(
        q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.flatten(2)
    ).flatten(1, 2)


def gradients(run, q: Tensor, k: Tensor, v: Tensor, do: Tensor, norm: bool) -> Checked:
    """o and the gradients of q, k and v for `do`, in float64; with `norm`, all after an RMS norm of o."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = run(*leaves).double()
    if norm:
        # within the graph, so that the factor is removed from gradients as well
        o = o / o.square().mean(-1, keepdim=True).sqrt()
    dq, dk, dv = torch.autograd.grad(o, leaves, do.double())
    return Checked(*(x.detach().double() for x in (o, dq, dk, dv)))


def distance(x: Tensor, gold: Tensor) -> float:
    """Relative distance |x - gold| / |gold|; NaN if x has a NaN."""
    return float((x.double() - gold).norm() / gold.norm())
