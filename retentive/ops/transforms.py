"""Whether derivatives are taken in a way that sees torch's own operations only.

Forward-mode derivatives (torch.autograd.forward_ad, torch.func.jvp) and the other transforms of torch.func (grad, vmap)
do not look into a custom operator or compiled C: a tangent that enters it is lost without a word. Where one is at work,
the code that is written in torch's operations takes over.
"""

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """True inside a torch.func transform or a forward-mode derivative, in compiled graphs too."""
    # private names: torch has no public way to ask for either
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
