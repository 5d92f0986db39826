"""Chunked Kullback-Leibler divergence between a teacher's predictions and a student's, for distillation.

    sum over tokens of  sum_w p(w) (log p(w) - log q(w))        p = softmax(teacher's logits), q = softmax(student's)

As in `cross_entropy`, logits exist for one chunk of tokens at a time, and its gradient q - p is used at once.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Divergence(torch.autograd.Function):
    """Sum of the divergences of all tokens; see `kl_divergence`."""

    @staticmethod
    def forward(
        ctx, x_TD: Tensor, weight: Tensor, y_TD: Tensor, teacher: Tensor, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        total = x_TD.new_zeros((), dtype=torch.promote_types(x_TD.dtype, torch.float32))
        w, u = weight.to(dtype), teacher.to(dtype)
        dx, dw = torch.empty_like(x_TD), torch.zeros_like(weight) if weight.requires_grad else None
        for t in range(0, len(x_TD), chunk):
            x, y = x_TD[t : t + chunk].to(dtype), y_TD[t : t + chunk].to(dtype)
            log_q = (x @ w.T).to(total.dtype).log_softmax(-1)
            log_p = (y @ u.T).to(total.dtype).log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            gradient = log_q.exp_().sub_(p).to(dtype)
            dx[t : t + chunk] = gradient @ w
            if dw is not None:
                dw += gradient.T @ x
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    @once_differentiable  # the saved gradients no longer depend on x and the weight
    def backward(ctx, grad: Tensor):
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), None if dw is None else dw * grad.to(dw.dtype), None, None, None, None


def kl_divergence(x: Tensor, weight: Tensor, y: Tensor, teacher: Tensor, *, chunk: int = 512) -> Tensor:
    """Returns the summed divergence of the student from the teacher in nats: a scalar, float32 or float64.

    Args:
        x: the student's hidden states `[..., D]`.
        weight: the student's output matrix `[vocab, D]`.
        y: the teacher's hidden states `[..., E]` of the same tokens; no gradient flows to them.
        teacher: the teacher's output matrix `[vocab, E]`.
        chunk: number of tokens whose logits exist at a time. It changes the result by rounding only.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):  # the dtype is chosen by hand, so that weights are cast once
        return _Divergence.apply(x.flatten(0, -2), weight, y.flatten(0, -2).detach(), teacher.detach(), chunk, dtype)
