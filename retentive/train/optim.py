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
"""Of Muon; Nesterov's."""
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton–Schulz iteration: its quintic rises steeply from 0, and keeps singular values at about 0.7 to 1.2."""
EPS = 1e-7
"""What a norm is at least, so that no gradient at all is not a division by 0."""
DECAYS = ("decay_proj", "forget_proj")
"""Matrices with a row for each head that gates depend on: no map from features to features, so AdamW's."""


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """The optimiser that the config names, over the parameters of the model that are trained."""
    return adamw(model, config) if config.optimizer == "adamw" else Muon(model, config)


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over two groups: matrices with weight decay, vectors without."""
    trained = trained_parameters(model)
    return torch.optim.AdamW(decayed_apart(trained, config), **adamw_options(trained, config))


class Muon(torch.optim.AdamW):
    """AdamW, with Muon for a first group of parameters, the model's `hidden_matrices`.

    torch.optim.Muon takes matrices alone, so that a run would have two optimisers to step, save and restore; and it
    iterates in bfloat16 always, where this one does so as the run multiplies matrices (`config.precision`).

    Raises:
        ValueError: a model that has no such matrices.
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
        """Whether the iteration runs in bfloat16."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters; those that Muon has stepped have no gradient afterwards.

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
                    p.grad = None  # used up: AdamW passes over parameters that have none
        super().step()
        return loss

    def _step_matrix(self, p: Tensor, lr: float, weight_decay: float) -> None:
        # A step is a function of the whole matrix. Of one whose rows are sharded as a DTensor (FSDP2) torch gathers
        # what each product needs, which is right but happens at every product: gathering `update` once would do. Of
        # one whose pieces are plain tensors (the heads of a rank) `update` must be gathered before it is made
        # orthogonal, and each rank takes its piece of the result. The momentum is elementwise, and stays where it is.
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:  # the name that torch.optim.Muon has for it
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        momentum = state["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM)
        update = p.grad.lerp(momentum, MOMENTUM)
        update = orthogonal(update.bfloat16() if self.bf16 else update)
        p.mul_(1 - lr * weight_decay)
        # one with singular values of 1 has a root mean square of max(rows, columns)^-1/2
        p.add_(update, alpha=-0.2 * lr * math.sqrt(max(p.shape)))


def orthogonal(x: Tensor) -> Tensor:
    """`[m,n]`: x with its singular values brought near to 1 (0.7 to 1.2), by a Newton–Schulz iteration.

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
    """The matrices of the blocks, those of encoders too: each of q, k, v, gate, out, and of the feed-forward layers.

    Each is a parameter of its own, which matters: of a packed one the parts would be brought to one scale together.
    None of a peer, whose blocks are another library's and packed in many ways.
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
    """Those that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def decayed_apart(parameters: list[Tensor], config: TrainConfig) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and vectors, which do not."""
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw_options(parameters: list[Tensor], config: TrainConfig) -> dict[str, Any]:
    """What AdamW is called with beside its groups."""
    fused = parameters[0].device.type in (
        "cpu",
        "cuda",
    )  # one kernel a step, which MPS has not in every torch we support
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "fused": fused}


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0: up over `warmup` steps, then down to `final_lr` of the peak.

    With "wsd" (warm-up, stable, decay: MiniCPM, arXiv 2404.06395) it stays at the peak until the last `decay_fraction`
    of all steps, in which it falls in a line.
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
