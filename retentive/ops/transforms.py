"""Checks for derivatives that only see torch's own operations, and for operators that are being traced.

Forward-mode derivatives (torch.autograd.forward_ad, torch.func.jvp) and other torch.func transforms (grad, vmap) do not
see inside a custom operator or compiled C: they silently lose a tangent that enters one. Under such a transform the
implementation in torch's operations is used.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """True inside a torch.func transform or a forward-mode derivative, in compiled graphs too."""
    # private names: torch has no public query for either
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def traced(x: Tensor) -> bool:
    """True if x's operators are recorded or replaced: by a compiler, a tracer, a FLOP counter, a tensor subclass."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return tracing or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0  # private: as above
