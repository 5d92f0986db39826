"""One training step: the loss of its batches, the gradient, and the new weights.

    gradient = d/dw  mean over batches of (sum of losses / number of targets)        clipped, then the optimiser's step

The learning rate, batches and random numbers of a step depend on its number only.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from retentive.models import LanguageModel
from retentive.train.config import TrainConfig
from retentive.train.ema import EMA
from retentive.train.objective import Objective, checked
from retentive.train.optim import learning_rate, optimizer_of
from retentive.train.parallel import ALONE, Cluster, clip_gradients
from retentive.train.qat import Rounding


class Batches(Protocol):
    """Source of batches: a pure function of the index, so that a resumed run reads the same batches."""

    length: int
    """Tokens of a row; FLOPs per token depend on it."""

    def __getitem__(self, index: int, /) -> Any:
        """The batch at any index from 0 on; batch j of a step has the index step * accumulate + j.

        A batch has `ids` and `to(device)`; only the objective uses its other fields.
        """


@dataclass
class Training:
    """A model in training, with everything that a step reads and changes."""

    model: LanguageModel
    batches: Batches
    objective: Objective
    config: TrainConfig
    cluster: Cluster = ALONE
    optimizer: torch.optim.Optimizer = field(init=False)
    ema: EMA | None = field(init=False)
    """Moving average of the weights, if the config asks for it."""
    rounding: Rounding | None = field(init=False)
    """Quantisation-aware training, if the config asks for it."""
    step: int = 0
    """Finished steps, including skipped ones."""
    carried: Any = None
    """State that the next batch continues from (mode "carry")."""
    run: Path | None = None
    """Run directory, for callbacks: `retentive.history(training.run)` is its curve so far."""

    def __post_init__(self):
        self.optimizer = optimizer_of(self.model, self.config)
        self.ema = EMA(self.model, self.config.ema) if self.config.ema else None
        self.rounding = Rounding(self.model, self.config.qat) if self.config.qat != "none" else None

    def rounded(self) -> AbstractContextManager[None]:
        """The model as steps and evaluations compute with it."""
        return self.rounding.in_place() if self.rounding else nullcontext()


def take_step(training: Training) -> dict[str, Any]:
    """Take the next step and return its loss, lr, grad_norm and tokens, over all ranks.

    Raises:
        FloatingPointError: the loss or the gradient is not finite. Weights, moments and state stay as before, and the
            step counts as finished.
    """
    config, optimizer, carried = training.config, training.optimizer, training.carried
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(training.step, config)
    # Dropout depends on the step only. Seeds are far apart, so that runs with neighbouring seeds do not share any.
    # Ranks that read different tokens have different seeds; tensor parallel ranks must drop the same values.
    torch.manual_seed(config.seed * 1_000_003 + training.step + training.cluster.dp_cp.rank * 10**14)
    with training.rounded():
        loss, tokens = accumulate_gradients(training)
    norm = clip_gradients(training.model, config.clip or math.inf, training.cluster)  # inf: measured, not clipped
    training.step += 1
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        training.carried = carried
        raise FloatingPointError(f"loss {loss:.4g} and gradient norm {norm:.4g} at step {training.step}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, "tokens": tokens}


def accumulate_gradients(training: Training) -> tuple[float, int]:
    """Compute the next step's gradients into the parameters, and its state into `carried`; returns (mean loss, tokens).

    Every batch of the step has the same weight, whatever its number of targets. Within a batch every target has the
    same weight, whichever rank reads it.
    """
    config, cluster, device = training.config, training.cluster, training.model.device
    total, tokens = 0.0, 0
    for micro in range(config.accumulate):
        batch = training.batches[training.step * config.accumulate + micro].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            made = training.objective(training.model, batch, training.carried)
            losses, count, training.carried = checked(made)
            (count_of_all,) = cluster.sum(count)
            loss = losses / max(count_of_all, 1)
        # outside autocast, as torch requires; scaled because ranks average gradients, and the sum is wanted
        (loss * cluster.dp_cp.size / config.accumulate).backward()
        total += loss.item() / config.accumulate
        tokens += batch.ids.numel()
    total, all_tokens = cluster.sum(total, tokens / cluster.cp.size)
    return total, int(all_tokens)
