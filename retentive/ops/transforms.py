"""Whether derivatives are taken in a way that sees torch's own operations only, and whether operators are traced.

Forward-mode derivatives (torch.autograd.forward_ad, torch.func.jvp) and the other transforms of torch.func (grad, vmap)
do not look into a custom operator or compiled C: a tangent that enters it is lost without a word. Where one is at work,
the code that is written in torch's operations takes over.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """True inside a torch.func transform or a forward-mode derivative, in compiled graphs too."""
    # private names: torch has no public way to ask for either
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def traced(x: Tensor) -> bool:
    """Whether somebody writes down the operators that x goes through, or stands in for them: a compiler, a tracer, a
    counter of FLOPs, a subclass of tensors."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return tracing or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0  # private: as above
