"""Student and teacher side by side: held-out losses, the error of each layer, and a picture of the loss by tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from retentive.bench.lab.plot import GREY, grid
from retentive.checkpoint import ModelFolder
from retentive.models import LanguageModel
from retentive.tables import markdown
from retentive.train.distillation import compared, relative_error
from retentive.train.log import read_metrics


def error_table(teacher: str | Path, before: Path, after: Path, batch: Any) -> str:
    """Errors of each layer of a student before and after stage 1, on one batch, as a table in Markdown."""
    model, *students = (ModelFolder.open(x).model(dtype=torch.float32) for x in (teacher, before, after))
    return table(*(errors(student, model, batch) for student in students))


@torch.no_grad()
def errors(student: LanguageModel, teacher: LanguageModel, batch: Any) -> list[float]:
    """Mean relative error of the outputs of each layer's mixers, in the teacher's hidden states."""
    return [float(relative_error(have, want).mean()) for have, want in compared(student, teacher, batch)]


def table(before: Sequence[float], after: Sequence[float]) -> str:
    """Errors of each layer, before stage 1 and after it, as a table in Markdown."""
    rows = [[str(i), f"{a:.4f}", f"{b:.4f}"] for i, (a, b) in enumerate(zip(before, after, strict=True))]
    mean = [sum(x) / len(x) for x in (before, after)]
    rows.append(["mean", *(f"{x:.4f}" for x in mean)])
    return markdown(["layer", "relative error before", "after"], rows)


def curves(stages: Sequence[tuple[Path, int]]) -> list[tuple[str, list[tuple[int, float]]]]:
    """(name, [(tokens so far, held-out loss)]) of each stage that has begun.

    Args:
        stages: (run directory, tokens of a step).
    """
    found, done = [], 0
    for run, tokens in stages:
        if not (run / "metrics.jsonl").is_file():
            break
        records = read_metrics(run)
        # the last evaluation reads more text than the others: not the same loss
        points = [(r["step"], r["held_out_loss"]) for r in records if "bits_per_byte" in r]
        found.append((run.name, [(done + step * tokens, loss) for step, loss in points]))
        done += tokens * max((r["step"] for r in records), default=0)
    return found


def plot(
    path: Path, stages: Mapping[str, Sequence[tuple[int, float]]], lines: Mapping[str, float], *, title: str
) -> None:
    """Writes a PNG: held-out loss by tokens, a curve for each stage, horizontal lines for models that do not train.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `plot`).
    """
    figure, axes = grid(title, 1, 1, size=(7, 4.6))
    axis, before = axes[0, 0], None
    for n, (name, points) in enumerate(stages.items()):
        if not points:
            continue
        joined = [*([before] if before else []), *points]
        axis.plot(*zip(*joined, strict=True), color=f"C{n}", marker="o", markersize=3, label=name)
        before = points[-1]
    for (name, loss), style in zip(lines.items(), ("-", "--", ":"), strict=False):
        axis.axhline(loss, linestyle=style, **GREY, label=f"{name}, {loss:.3f}")
    axis.set_xlabel("thousand tokens")
    axis.set_ylabel("held-out loss (nats a token)")
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,g}")
    axis.legend()
    figure.savefig(path, dpi=120)
