"""The correctness gate: outputs and gradients against float64, on the shape, dtype and backend that will be timed.

The gold is `reference.parallel` in float64 on the same numbers. Ours must equal it, the final state too. torchscale
divides each row of each head by a positive number that has no gradient, so it is compared after an RMS norm over the
head's numbers, which takes any such factor out of outputs and gradients; with that the two are the same function.
Attention is another function and is not compared.
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
"""Tokens of the gate for ours: more than four of the longest chunks, and a last one that is not full."""
TOLERANCE = {"fp32": 2e-6, "bf16": 1e-2, "fp16": 1.5e-3}
"""Of the norm of the gold. fp32: rounding at 6e-8, in sums of a few hundred terms. bf16 and fp16: the operands of two
or three products in a row are each rounded at 2e-3 (2e-4) of themselves."""
RIVAL_TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2, "fp16": 1e-2}
"""Wider: torchscale rounds its masks and running state to the dtype too, fla multiplies float32 in TF32."""


class Checked(NamedTuple):
    """What is compared: an output and its gradients."""

    o: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def check(name: str, work: Work, chunk: int | None = None) -> float:
    """The largest error of the rival, relative to the norm of the gold, at a short length.

    Raises:
        ArithmeticError: it is above the tolerance, or not a number.
    """
    # torchscale takes whole chunks only
    length = LENGTH if name != "torchscale" else max(2 * (chunk or 0), 512)
    # one row: float64 on a CPU takes long, and rows do not know each other
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
    # a NaN counts as the worst, which max() alone would pass over; for the same reason it is `not <=` below and not `>`
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
    # in float64 from the beginning: decays that were rounded first would be other decays
    decays = log_decay("paper", work.H, dtype=torch.float64, device=work.device)
    zeros = torch.zeros(1, work.H, work.K, work.V, dtype=torch.float64, device=work.device)
    return lambda q, k, v: reference.parallel(q, k, v, decays, scale=work.K**-0.5, state=zeros)


def runner(name: str, work: Work, chunk: int | None):
    """The rival as a function of q, k, v `[B,T,H,n]`, whatever its own layout is."""
    one = rivals.make(name, work, chunk)  # q, k [B,H,T,K] and v [B,T,H V] for torchscale, its o in chunks
    if name != "torchscale":
        return one.run
    return lambda q, k, v: one.run(
        q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.flatten(2)
    ).flatten(1, 2)


def gradients(run, q: Tensor, k: Tensor, v: Tensor, do: Tensor, norm: bool) -> Checked:
    """o and the gradients of q, k and v for `do`, in float64; all after an RMS norm of o where `norm`."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = run(*leaves).double()
    if norm:
        # within the graph, so that gradients lose the factor as well
        o = o / o.square().mean(-1, keepdim=True).sqrt()
    dq, dk, dv = torch.autograd.grad(o, leaves, do.double())
    return Checked(*(x.detach().double() for x in (o, dq, dk, dv)))


def distance(x: Tensor, gold: Tensor) -> float:
    """|x - gold| / |gold|, NaN where x has one."""
    return float((x.double() - gold).norm() / gold.norm())
