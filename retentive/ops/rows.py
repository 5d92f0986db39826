"""Row-wise operations of a model: RMSNorm, rotation and scale of q and k, gates, short convolutions, softmax loss.

    rms_norm(x)     = x / sqrt(mean(x^2) + eps) * weight
    rotate(x)       = scale * rotary.rotate(x)
    gated(g, x)     = activation(g) * x
    convolve(x)_t   = sum_i weight_{n-1-i} * x_{t-i}
    add_convolved(x) = x + convolve(rms_norm(x))
    softmax_loss(x) = -log softmax(x)[target], and its gradient

In PyTorch each takes several passes over memory, with float32 copies if x is bf16; on a CPU they took a third of a
model's time (docs/LOG.md). `c/rows.c` does each in one pass. PyTorch's operations are used instead without a compiler,
on other devices, in float64, under torch.func, and in compiled graphs, which fuse them. Arithmetic is float32 or wider;
results have the dtype of x.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from retentive.ops import rotary
from retentive.ops.cpu import DTYPES, library, struct, unavailable
from retentive.ops.transforms import transformed


class Norm(ctypes.Structure):
    """struct Norm of c/rows.c."""

    _fields_ = struct(
        "rows n dtype y_dtype weight_dtype threads", "x more weight dsum dy sum y dx dmore scale dweight", real="eps"
    )


class Rotate(ctypes.Structure):
    """struct Rotate of c/rows.c."""

    _fields_ = struct(
        "tokens T H K dtype half phase_rows scale_rows stride gain_dtype threads",
        "x dy gain cos sin scale y norm dgain",
        real="sign eps",
    )


class Gated(ctypes.Structure):
    """struct Gated of c/rows.c."""

    _fields_ = struct("numbers dtype swish threads", "g x dy y dg dx")


class Convolve(ctypes.Structure):
    """struct Convolve of c/rows.c."""

    _fields_ = struct("tokens T n D dtype weight_dtype threads", "since x weight dy y dx dweight")


class AddConvolved(ctypes.Structure):
    """struct AddConvolved of c/rows.c."""

    _fields_ = struct(
        "tokens T n D h_dtype gain_dtype weight_dtype threads",
        "since x dy gain weight y dx scale dgain dweight",
        real="eps",
    )


class Softmax(ctypes.Structure):
    """struct Softmax of c/rows.c."""

    _fields_ = struct("rows n dtype ignore threads", "target x loss")


def compiled(x: Tensor, weight: Tensor | None = None) -> bool:
    """True if rows.c can compute `x`, and `weight` with it."""
    if torch.compiler.is_compiling() or transformed() or not x.numel():
        return False
    if weight is not None and not (weight.shape == x.shape[-1:] and weight.is_contiguous()):
        return False
    tensors = (x,) if weight is None else (x, weight)
    return all(t.device.type == "cpu" and t.dtype in DTYPES and unavailable(t.dtype) is None for t in tensors)


def _call(function: str, call: ctypes.Structure) -> None:
    """Runs a function of rows.c. `call` holds only addresses: the caller keeps the tensors alive until it returns."""
    failed = getattr(library(), function)(ctypes.byref(call))
    if failed == 1:
        raise MemoryError("no memory for the work space of a row")
    if failed == 2:
        raise IndexError("a target is outside of the vocabulary")


# ---- RMSNorm ----


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Normalises x `[..., n]` over its last dimension and multiplies it by `weight` `[n]` if given.

    The result is rounded to `dtype`, by default that of x.

    Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    return add_norm(x, None, weight, eps, dtype or x.dtype)[1]


def add_norm(
    x: Tensor, more: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns (x + more, its `rms_norm` in `dtype`); (x, its norm) without `more`.

    A residual stream and the input of a layer, in one pass over memory. So is the backward pass, which sums the
    gradients of both. Separate sums would read and write the stream once more in each direction.
    """
    if more is not None and (more.dtype != dtype or torch.promote_types(x.dtype, dtype) != x.dtype):
        x, more = x + more, None
    # compiled graphs and torch.func differentiate F.rms_norm themselves and cannot see inside _RMSNorm
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transformed():
        return _RMSNorm.apply(x, more, weight, eps, dtype)
    if compiled(x, weight) and unavailable(dtype) is None:
        return _normalise(x, more, weight, eps, None, dtype)
    x = x if more is None else x + more
    return x, F.rms_norm(x, (x.shape[-1],), weight, eps).to(dtype)


def _normalise(
    x: Tensor, more: Tensor | None, weight: Tensor | None, eps: float, scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes `add_norm` by rows.c. `scale`, if given, gets each row's 1 / sqrt(mean(sum^2) + eps)."""
    x = x.contiguous()
    more, total = (None, x) if more is None else (more.contiguous(), torch.empty_like(x))
    y = torch.empty_like(x, dtype=dtype)
    _call("rms_norm", _norm(x, weight, dtype, eps=eps, more=more, sum=total, y=y, scale=scale))
    return total, y


def _norm(x: Tensor, weight: Tensor | None, dtype: torch.dtype, *, eps: float = 0.0, **places: Tensor | None) -> Norm:
    """Returns the arguments of rows.c; `dtype` is that of y."""
    n = x.shape[-1]
    addresses = {name: None if t is None else t.data_ptr() for name, t in places.items()}
    return Norm(
        x.numel() // n, n, DTYPES.index(x.dtype), DTYPES.index(dtype),
        -1 if weight is None else DTYPES.index(weight.dtype), torch.get_num_threads(), eps,
        x=x.data_ptr(), weight=None if weight is None else weight.data_ptr(), **addresses,
    )  # fmt: skip


class _RMSNorm(torch.autograd.Function):
    """`add_norm` with its own backward pass: autograd's takes twice the memory traffic (docs/LOG.md)."""

    @staticmethod
    def forward(
        ctx, x: Tensor, more: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.compiled = compiled(x, weight) and unavailable(dtype) is None
        ctx.added, ctx.dtype = more is not None, dtype
        if ctx.compiled:
            scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
            total, y = _normalise(x, more, weight, eps, scale, dtype)
            ctx.save_for_backward(total, scale[..., None], weight)
            return total, y
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x if more is None else x + more
        # norm summed in float32 without the float32 copy of x that x.float().square().mean() makes
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        y = x * scale
        return x, (y if weight is None else y.mul_(weight)).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dsum: Tensor | None, grad: Tensor | None):
        x, scale, weight = ctx.saved_tensors
        if grad is None:
            return dsum, dsum.to(ctx.dtype) if ctx.added and dsum is not None else None, None, None, None
        if ctx.compiled:
            grad, dx = grad.contiguous(), torch.empty_like(x)
            dmore = torch.empty_like(x, dtype=ctx.dtype) if ctx.added else None
            # one row per thread, zeroed by C and summed in order: no atomics, so the result is deterministic
            sums = (
                torch.empty(torch.get_num_threads(), x.shape[-1], dtype=torch.float64) if weight is not None else None
            )
            dsum = None if dsum is None else dsum.contiguous()
            places = {"dsum": dsum, "dy": grad, "dx": dx, "dmore": dmore, "scale": scale, "dweight": sums}
            _call("rms_norm_backward", _norm(x, weight, ctx.dtype, **places))
            grad_weight = None if weight is None or sums is None else sums.sum(0).to(weight.dtype)
            return dx, dmore, grad_weight, None, None
        y = x * scale
        grad_weight = None
        if weight is not None:
            grad_weight = (grad * y).flatten(0, -2).sum(0).to(weight.dtype)
            grad = grad.to(scale.dtype) * weight
        along = (grad * y).mean(-1, keepdim=True)  # the part along x only changes its length, which the norm removes
        dx = y.mul_(along).neg_().add_(grad).mul_(scale).to(x.dtype)
        dx = dx if dsum is None else dx + dsum
        return dx, dx.to(ctx.dtype) if ctx.added else None, grad_weight, None, None


# ---- rotation ----


def rotate(
    x_BTHK: Tensor,
    cos: Tensor,
    sin: Tensor,
    variant: str,
    scale: Tensor | None = None,
    norm: tuple[Tensor | None, float] | None = None,
) -> Tensor:
    """Rotates and scales x, in its dtype. Only x and a gain get gradients: phases and scales depend on positions.

    Args:
        cos, sin: `[T, K/2]` or `[B, T, K/2]`, see `rotary.phases`.
        scale: `[1, H]`, `[T, H]` or `[B, T, H]`; 1 by default.
        norm: gain `[K]` and eps of an `rms_norm` of each head before. One pass over memory takes both.
    """
    gain, eps = norm or (None, 0.0)
    if variant != "none" and compiled(x_BTHK, gain) and cos.dtype == torch.float32:
        return _Rotate.apply(x_BTHK, gain, cos, sin, variant, scale, None if norm is None else eps)
    x_BTHK = x_BTHK if norm is None else rms_norm(x_BTHK, gain, eps)
    y = rotary.rotate(x_BTHK, cos, sin, variant)
    return (y if scale is None else y * scale[..., None]).to(x_BTHK.dtype)


class _Rotate(torch.autograd.Function):
    """`rotate` by rows.c. Its gradient is the same rotation by the opposite angle, then that of the norm if any."""

    @staticmethod
    def forward(
        ctx, x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor, variant: str, scale: Tensor | None,
        eps: float | None,
    ) -> Tensor:  # fmt: skip
        ctx.variant, ctx.eps, x = variant, eps, _evenly(x)
        norm = None if eps is None else torch.empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(None if eps is None else x, gain, cos, sin, scale, norm)
        return _turn(x, gain, cos, sin, variant, scale, eps, 1.0, norm=norm)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, gain, cos, sin, scale, norm = ctx.saved_tensors
        if ctx.eps is None:
            return _turn(_evenly(grad), None, cos, sin, ctx.variant, scale, None, -1.0), *[None] * 6
        # one sum per thread, zeroed by C and added in order: no atomics, so the result is deterministic
        sums = torch.empty(torch.get_num_threads(), x.shape[-1], dtype=torch.float64)
        places = {"dy": grad.contiguous(), "norm": norm, "dgain": sums}
        dx = _turn(x, gain, cos, sin, ctx.variant, scale, ctx.eps, -1.0, **places)
        return dx, None if gain is None else sums.sum(0).to(gain.dtype), *[None] * 5


def _evenly(x: Tensor) -> Tensor:
    """Returns x `[B,T,H,K]` with one stride between tokens: a slice of a wider projection as it is, or a copy."""
    B, T, _, K = x.shape
    even = x.stride(3) == 1 and x.stride(2) == K and (B == 1 or x.stride(0) == T * x.stride(1))
    return x if even else x.contiguous()


def _turn(
    x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor, variant: str, scale: Tensor | None, eps: float | None,
    sign: float, **places: Tensor | None,
) -> Tensor:  # fmt: skip
    """Runs `rotate` of rows.c; `places`: see struct Rotate."""
    B, T, H, K = x.shape
    y, cos, sin = torch.empty(x.shape, dtype=x.dtype), cos.contiguous(), sin.contiguous()
    scale = None if scale is None else scale.contiguous()
    given = {"x": x, "gain": gain, "cos": cos, "sin": sin, "scale": scale, "y": y, **places}
    # a dimension of size 1 may have any stride, so take the token stride from a larger one if there is one
    call = Rotate(
        B * T, T, H, K, DTYPES.index(x.dtype), variant == "half", cos.numel() // (K // 2),
        0 if scale is None else scale.numel() // H, x.stride(1) if T > 1 else (x.stride(0) if B > 1 else H * K),
        -2 if eps is None else -1 if gain is None else DTYPES.index(gain.dtype), torch.get_num_threads(),
        sign, eps or 0.0, **{name: None if t is None else t.data_ptr() for name, t in given.items()},
    )  # fmt: skip
    _call("rotate", call)
    return y


# ---- gates ----

ACTIVATIONS = {"swish": F.silu, "sigmoid": torch.sigmoid, "gelu": F.gelu}
"""Activations by name in configs."""


def gated(g: Tensor, x: Tensor, activation: str) -> Tensor:
    """Returns activation(g) * x. With swish this is SwiGLU's inner part (Shazeer, arXiv 2002.05202)."""
    if activation != "gelu" and g.shape == x.shape and g.dtype == x.dtype and compiled(g) and compiled(x):
        return _Gated.apply(g, x, activation == "swish")
    return ACTIVATIONS[activation](g) * x


class _Gated(torch.autograd.Function):
    """`gated` by rows.c. Autograd would also keep activation(g), and read and write four tensors more."""

    @staticmethod
    def forward(ctx, g: Tensor, x: Tensor, swish: bool) -> Tensor:
        g, x = g.contiguous(), x.contiguous()
        ctx.save_for_backward(g, x)
        ctx.swish, y = swish, torch.empty_like(x)
        call = Gated(x.numel(), DTYPES.index(x.dtype), swish, torch.get_num_threads(), y=y.data_ptr())
        call.g, call.x = g.data_ptr(), x.data_ptr()
        library().gated(ctypes.byref(call))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        g, x = ctx.saved_tensors
        grad, dg, dx = grad.contiguous(), torch.empty_like(g), torch.empty_like(x)
        call = Gated(
            x.numel(), DTYPES.index(x.dtype), ctx.swish, torch.get_num_threads(),
            g.data_ptr(), x.data_ptr(), grad.data_ptr(), dg=dg.data_ptr(), dx=dx.data_ptr(),
        )  # fmt: skip
        library().gated(ctypes.byref(call))
        return dg, dx, None


# ---- short convolutions ----


def convolve(x: Tensor, weight: Tensor, since: Tensor | None = None) -> Tensor:
    """Mixes each feature of x `[B,T,D]` with that of the tokens before it in its row; in the dtype of x.

    Args:
        weight: `[n,D]`, the last of the token itself, the first of the one n - 1 before it.
        since: int32 `[B,T]`, tokens before each in its sequence; None: all before it in its row.
    """
    since = None if since is None else since.contiguous()
    if compiled(x) and compiled(weight):
        return _Convolve.apply(x, weight, since)
    T, n = x.shape[1], len(weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    laid, weight = F.pad(x.to(wide), (0, 0, n - 1, 0)), weight.to(wide)
    out = laid[:, n - 1 :] * weight[-1]
    for i in range(min(n - 1, T - 1), 0, -1):
        before = laid[:, n - 1 - i : n - 1 - i + T]
        before = before if since is None else before * (since >= i)[..., None]
        out = torch.addcmul(out, before, weight[-1 - i])
    return out.to(x.dtype)


class _Convolve(torch.autograd.Function):
    """`convolve` by rows.c."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, since: Tensor | None) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight, since)
        y = torch.empty_like(x)
        _call("convolve", _convolve(x, weight, since, torch.get_num_threads(), y=y.data_ptr()))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, since = ctx.saved_tensors
        grad, dx = grad.contiguous(), torch.empty_like(x)
        # one sum per thread, zeroed by C and added in order: no atomics, so the result is deterministic
        threads = torch.get_num_threads()
        sums = torch.empty(threads, *weight.shape, dtype=torch.float64)
        places = {"dy": grad.data_ptr(), "dx": dx.data_ptr(), "dweight": sums.data_ptr()}
        _call("convolve", _convolve(x, weight, since, threads, **places))
        return dx, sums.sum(0).to(weight.dtype), None


def _convolve(x: Tensor, weight: Tensor, since: Tensor | None, threads: int, **places: int) -> Convolve:
    (B, T, D), n = x.shape, len(weight)
    return Convolve(
        B * T, T, n, D, DTYPES.index(x.dtype), DTYPES.index(weight.dtype), threads,
        None if since is None else since.data_ptr(), x.data_ptr(), weight.data_ptr(), **places,
    )  # fmt: skip


def add_convolved(
    x: Tensor, gain: Tensor | None, eps: float, dtype: torch.dtype, weight: Tensor, since: Tensor | None = None
) -> Tensor:
    """Returns x + convolve(rms_norm(x, gain, eps, dtype), weight, since): a residual stream after a convolution.

    One pass over memory if x is float32. Apart, the norm, the convolution and the sum write two tensors and read three
    more, and so do their gradients.
    """
    if x.dtype == torch.float32 and compiled(x, gain) and compiled(weight) and unavailable(dtype) is None:
        return _AddConvolved.apply(x, gain, eps, dtype, weight, None if since is None else since.contiguous())
    return x + convolve(rms_norm(x, gain, eps, dtype), weight, since)


class _AddConvolved(torch.autograd.Function):
    """`add_convolved` by rows.c."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor | None, eps: float, dtype: torch.dtype, weight: Tensor, since) -> Tensor:
        x, weight, y = x.contiguous(), weight.contiguous(), torch.empty_like(x)
        scale = torch.empty(x.shape[:-1], dtype=torch.float32)
        ctx.dtype = dtype
        ctx.save_for_backward(x, gain, weight, since, scale)
        _call("add_convolved", _add_convolved(x, gain, dtype, weight, since, eps=eps, y=y, scale=scale))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, gain, weight, since, scale = ctx.saved_tensors
        grad, dx, threads = grad.contiguous(), torch.empty_like(x), torch.get_num_threads()
        # one sum per thread, zeroed by C and added in order: no atomics, so the result is deterministic
        dgain = torch.empty(threads, x.shape[-1], dtype=torch.float64)
        dweight = torch.empty(threads, *weight.shape, dtype=torch.float64)
        places = {"dy": grad, "dx": dx, "scale": scale, "dgain": dgain, "dweight": dweight}
        _call("add_convolved", _add_convolved(x, gain, ctx.dtype, weight, since, **places))
        of_gain = None if gain is None else dgain.sum(0).to(gain.dtype)
        return dx, of_gain, None, None, dweight.sum(0).to(weight.dtype), None


def _add_convolved(
    x: Tensor, gain: Tensor | None, dtype: torch.dtype, weight: Tensor, since: Tensor | None, *, eps: float = 0.0,
    **places: Tensor,
) -> AddConvolved:  # fmt: skip
    (B, T, D), n = x.shape, len(weight)
    given = {"x": x, "gain": gain, "weight": weight, "since": since, **places}
    return AddConvolved(
        B * T, T, n, D, DTYPES.index(dtype), -1 if gain is None else DTYPES.index(gain.dtype),
        DTYPES.index(weight.dtype), torch.get_num_threads(), eps,
        **{name: None if t is None else t.data_ptr() for name, t in given.items()},
    )  # fmt: skip


# ---- the loss of logits ----


def softmax_loss(logits: Tensor, target: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Returns (-log softmax(logits)[target] `[T]` in float32 or wider, its gradient `[T,V]` in the logits' dtype).

    Not differentiable: it is called inside an autograd function. The gradient may overwrite the logits.

    Args:
        logits: `[T,V]`.
        target: int64 `[T]`, column indices. Rows whose target is `ignore` have loss and gradient 0.

    Raises:
        IndexError, RuntimeError: a target is no column index.
    """
    T, V = logits.shape
    if compiled(logits):
        logits, target, loss = logits.contiguous(), target.contiguous(), torch.empty(T, dtype=torch.float32)
        call = Softmax(
            T, V, DTYPES.index(logits.dtype), ignore, torch.get_num_threads(),
            target.data_ptr(), logits.data_ptr(), loss.data_ptr(),
        )  # fmt: skip
        _call("softmax_loss", call)
        return loss, logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_z = wide.logsumexp(-1, keepdim=True)
    valid = (target != ignore)[:, None]
    index = target.where(valid[:, 0], 0)[:, None]  # gather accepts no -100; `valid` drops these rows afterwards
    loss = (log_z - wide.gather(1, index)).where(valid, 0)[:, 0]
    p = wide.sub_(log_z).exp_()
    p.scatter_add_(1, index, p.new_full((T, 1), -1.0))
    return loss, p.masked_fill_(~valid, 0).to(logits.dtype)
