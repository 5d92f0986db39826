"""Windows of attention by layer: larger where a small one costs more, with a given average.

The cost of a window in one layer is the divergence of the model's predictions from the teacher's, to second order: half
the mean square of gradient x change over the tokens, where the change is that of the attention's output, and the
gradient is that of the log probability of tokens drawn from the teacher's predictions (the Fisher information). One
backward pass gives the gradients of all layers. docs/LOG.md compares the costs with measured divergences.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retentive.models import LanguageModel, build
from retentive.tables import markdown
from retentive.train.distillation import mixed

ALONE = 64
"""Window whose cost chooses the layers that keep attention where the others have none."""
STEPS = (0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Windows that a layer may get, relative to the mean."""


class Choice(NamedTuple):
    """A window for each layer, the layers that keep whole attention, and the costs as a table in Markdown."""

    windows: list[int]
    whole: tuple[int, ...]
    table: str


def choose(
    teacher: LanguageModel,
    batches: Sequence[Any],
    mean: int,
    number: int,
    whole: Collection[int],
    *,
    sinks: int,
    precision: str = "fp32",
) -> Choice:
    """Returns windows of `mean` tokens on average, and the `number` layers that need the most.

    Args:
        mean: average over the layers with a window; 0: only layers of whole attention are chosen.
        number: layers that keep whole attention; 0: those in `whole`.
    """
    windows = sizes(mean) if mean else [ALONE]
    costs = window_costs(teacher, batches, windows, sinks=sinks, precision=precision)
    equal = [own[windows.index(mean or ALONE)] for own in costs]
    whole = dearest(equal, number) if number else tuple(whole)
    others = [i for i in range(len(costs)) if i not in whole]
    given = dict(zip(others, shared_out([costs[i] for i in others], windows, mean), strict=True)) if mean else {}
    rows = [
        [
            str(i),
            str(given.get(i, "all")),
            f"{equal[i]:.4f}",
            f"{own[windows.index(given[i])] if i in given else 0:.4f}",
        ]
        for i, own in enumerate(costs)
    ]
    table = markdown(["layer", "window", f"cost of {mean or ALONE} tokens, nats", "of its window"], rows)
    return Choice([given.get(i, mean) for i in range(len(costs))], whole, table)


def sizes(mean: int) -> list[int]:
    """Windows that a layer may get, smallest first."""
    return sorted({max(1, round(mean * step)) for step in STEPS})


def window_costs(
    teacher: LanguageModel, batches: Sequence[Any], windows: Sequence[int], *, sinks: int, precision: str = "fp32"
) -> list[list[float]]:
    """Returns the cost of each window in each layer, in nats a token: `[layers][windows]`.

    Raises:
        ValueError: the teacher's predictions are not finite.
    """
    limited = [_limited(teacher, window, sinks) for window in windows]
    total = torch.zeros(len(teacher.blocks), len(windows), dtype=torch.float64)
    teacher.requires_grad_(False)
    for batch in batches:
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=precision == "bf16"):
            inputs, outputs, positions = _differentiated(teacher, batch)
            for i, (x, want) in enumerate(zip(inputs, outputs, strict=True)):
                assert want.grad is not None
                for n, model in enumerate(limited):
                    with torch.no_grad():
                        change = mixed(model.blocks[i], x, positions).float() - want
                    total[i, n] += float((change * want.grad).sum(-1).double().square().mean()) / 2
    return (total / len(batches)).tolist()


def _differentiated(teacher: LanguageModel, batch: Any) -> tuple[list[Tensor], list[Tensor], Any]:
    """Returns (hidden states before each layer, output of its attention with its gradient, positions)."""
    inputs, outputs = list[Tensor](), list[Tensor]()
    start, positions = teacher.begin(batch.ids, cu_seqlens=batch.cu_seqlens)
    x = start.detach().requires_grad_()
    for block in teacher.blocks:
        inputs.append(x.detach())
        outputs.append(mixed(block, x, positions).float())
        outputs[-1].retain_grad()
        x = x + outputs[-1]
        x = x + block.ffn(block.ffn_norm(x))
    drawn, log_probability = torch.Generator().manual_seed(0), torch.zeros((), device=x.device)
    for part in teacher.norm(x).flatten(0, -2).split(512):  # the logits of all tokens at once would be large
        logs = teacher.head(part).float().log_softmax(-1)
        if not bool(logs.isfinite().all()):
            raise ValueError("the teacher's predictions are not finite numbers: its weights are damaged")
        ids = torch.multinomial(logs.detach().exp().cpu(), 1, generator=drawn)
        log_probability = log_probability + logs.gather(1, ids.to(logs.device)).sum()
    log_probability.backward()
    return inputs, outputs, positions


def _limited(teacher: LanguageModel, window: int, sinks: int) -> LanguageModel:
    """Returns the teacher in a window, with the same weights."""
    blocks = tuple(
        replace(block, mixer=replace(block.mixer, window=window, sinks=sinks, moving_sinks=sinks > 0))
        for block in teacher.config.blocks
    )
    with torch.device("meta"):
        model = build(replace(teacher.config, blocks=blocks))
    model.load_state_dict(teacher.state_dict(), assign=True)
    return model.eval()


def shared_out(costs: Sequence[Sequence[float]], windows: Sequence[int], mean: float) -> list[int]:
    """Returns a window for each layer, whose mean is at most `mean`: always the step that saves most a token.

    Args:
        costs: cost of each window in each layer.
        windows: the windows, smallest first.
    """
    at, left = [0] * len(costs), (mean - windows[0]) * len(costs)
    while True:
        gains = [
            ((own[at[i]] - own[n]) / (windows[n] - windows[at[i]]), i, n)
            for i, own in enumerate(costs)
            for n in range(at[i] + 1, len(windows))
            if windows[n] - windows[at[i]] <= left and own[n] < own[at[i]]
        ]
        if not gains:
            return [windows[n] for n in at]
        _, i, n = max(gains)
        left -= windows[n] - windows[at[i]]
        at[i] = n


def dearest(costs: Sequence[float], number: int) -> tuple[int, ...]:
    """Returns the numbers of the layers with the largest costs, in order."""
    return tuple(sorted(sorted(range(len(costs)), key=lambda i: -costs[i])[:number]))
