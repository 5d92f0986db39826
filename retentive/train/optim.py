"""The optimisers, their parameter groups, and the learning rate of each step.

    adamw   AdamW (Loshchilov and Hutter, arXiv 1711.05101): matrices decay, vectors do not
    muon    Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) for the matrices of the blocks, AdamW for the
            rest: embeddings, the output matrix, norms, decays, biases, the ends of encoders

Muon steps along the momentum with its singular values brought near to 1. Steps are scaled to the root mean square of
AdamW's, 0.2 lr (Moonlight, arXiv 2502.16982), so that one learning rate and one weight decay serve both.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retentive.train.config import TrainConfig

MOMENTUM = 0.95
"""Nesterov momentum of Muon."""
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic of the Newton–Schulz iteration: it rises steeply from 0 and keeps singular values at about 0.7 to 1.2."""
EPS = 1e-7
"""Least norm to divide by, so that a zero gradient causes no division by 0."""
DECAYS = ("decay_proj", "forget_proj")
"""Matrices with a row per head, for gates: they do not map features to features, so AdamW steps them."""


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """The optimiser that the config names, over the model's trained parameters."""
    return adamw(model, config) if config.optimizer == "adamw" else Muon(model, config)


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over two groups: matrices with weight decay, vectors without."""
    trained = trained_parameters(model)
    return torch.optim.AdamW(decayed_apart(trained, config), **adamw_options(trained, config))


class Muon(torch.optim.AdamW):
    """AdamW with Muon for its first parameter group, the model's `hidden_matrices`.

    torch.optim.Muon takes matrices only, so a run would have two optimisers to step, save and restore. It also always
    iterates in bfloat16; this class does so only if the run does (`config.precision`).

    Raises:
        ValueError: the model has no such matrices.
    """

    def __init__(self, model: nn.Module, config: TrainConfig):
        hidden, trained = hidden_matrices(model), trained_parameters(model)
        if not hidden:
            raise ValueError(
                "`optimizer='muon'` steps whole matrices of this package's blocks, and none are trained here (an "
                "adapter has factors, a peer packs its own): take adamw"
            )
        apart = {id(p) for p in hidden}
        groups = decayed_apart([p for p in trained if id(p) not in apart], config)
        groups.insert(0, {"params": hidden, "weight_decay": config.weight_decay, "muon": True})
        super().__init__([{"muon": False} | group for group in groups], **adamw_options(trained, config))
        self.bf16 = config.precision == "bf16"
        """True if the iteration runs in bfloat16."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters; those that Muon steps have no gradient afterwards.

        Args:
            closure: computes the loss and the gradients, and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    self._step_matrix(p, group["lr"], group["weight_decay"])
                    p.grad = None  # used up: AdamW skips parameters without a gradient
        super().step()
        return loss

    def _step_matrix(self, p: Tensor, lr: float, weight_decay: float) -> None:
        # A step is a function of the whole matrix. If its rows are sharded as a DTensor (FSDP2), torch gathers operands
        # at every product. That is right, but gathering `update` once would do. If its pieces are plain tensors (the
        # heads of a rank), `update` would have to be gathered before it is made orthogonal, and each rank would take
        # its piece of the result. The momentum is elementwise and stays sharded.
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:  # the name that torch.optim.Muon has for it
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        momentum = state["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM)
        update = p.grad.lerp(momentum, MOMENTUM)
        update = orthogonal(update.bfloat16() if self.bf16 else update)
        p.mul_(1 - lr * weight_decay)
        # an update with singular values of 1 has a root mean square of max(rows, columns)^-1/2
        p.add_(update, alpha=-0.2 * lr * math.sqrt(max(p.shape)))


def orthogonal(x: Tensor) -> Tensor:
    """Bring the singular values of x `[m,n]` near to 1 (0.7 to 1.2) by a Newton–Schulz iteration.

    X <- a X + (b A + c A A) X with A = X X^T, from x / |x|; small singular values may stay below.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x  # the smaller of the two Gram matrices
    x = x / x.norm().clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Matrices of the blocks, encoders' included: q, k, v, gate, out, and those of the feed-forward layers.

    Each must be a parameter of its own: the parts of a packed one would be brought to one scale together. So a peer,
    whose blocks another library packs in its own way, has none.
    """
    if not list(model.get_submodule("blocks").children()):
        return []
    return [
        m.weight
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
        and "blocks" in name.split(".")
        and name.rpartition(".")[2] not in DECAYS
        and m.weight.requires_grad
    ]


def trained_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def decayed_apart(parameters: list[Tensor], config: TrainConfig) -> list[dict[str, Any]]:
    """Two parameter groups: matrices with weight decay, vectors without."""
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw_options(parameters: list[Tensor], config: TrainConfig) -> dict[str, Any]:
    """Keyword arguments of AdamW beside its parameter groups."""
    fused = parameters[0].device.type in (
        "cpu",
        "cuda",
    )  # one kernel a step, which MPS has not in every torch we support
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "fused": fused}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of a step, counted from 0: rises over `warmup` steps, then falls to `final_lr` of the peak.

    With "wsd" (warm-up, stable, decay: MiniCPM, arXiv 2404.06395) it stays at the peak, then falls linearly in the last
    `decay_fraction` of all steps.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    first, last = config.warmup, config.steps - 1
    if config.schedule == "wsd":
        first = max(first, last - max(round(config.decay_fraction * config.steps), 1))
    done = max(step - first, 0) / max(last - first, 1)  # 1 at the last step
    remaining = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.lr * (config.final_lr + (1 - config.final_lr) * remaining)
