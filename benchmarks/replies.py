"""`python -m benchmarks replies`: compare models on generation tasks of `retentive eval`.

Every model answers the same questions; intervals are those of `evals.generation_tasks`.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retentive import machine
from retentive.bench.lab.options import Say, silent, words
from retentive.bench.lab.plot import grid, legend
from retentive.checkpoint import ModelFolder
from retentive.evals.generation_tasks import KINDS, kind_of, score_generation_tasks
from retentive.models import cost
from retentive.models.encoders import encoders_of
from retentive.native import with_engine
from retentive.options import at_least_one, known
from retentive.tables import markdown

PICTURE = "Replies"
SHOWN = {
    "translation": {"bleu": 1, "chrf": 1},
    "summarisation": {"rouge1": 1, "rouge2": 1, "rougeL": 1},
    "answers": {"exact": 100},
    "transcription": {"wer": 100},
    "dialogue": {"distinct1": 100, "distinct2": 100, "ended": 100},
    "naming": {"first": 100, "first10": 100, "found": 100, "found10": 100},
}
"""Metrics of the picture, each with the factor that scales it to 100."""
MOST_PANELS = 4
"""Maximum panels side by side in the picture; more are placed below."""
BESIDE = {"lead_": "first three sentences", "people_": "people"}
"""References scored beside the models, by the prefix of their metrics."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare models on generated text: translations, summaries, short answers, small talk."""

    models: tuple[str, ...]
    """Run directories or model folders."""
    tasks: tuple[str, ...]
    """TASK, or TASK:NAME for NAME.jsonl: translation, summarisation, answers, transcription, dialogue, naming."""
    data: Path
    """Folder of the tasks' files."""
    limit: int | None = None
    """Number of questions of each task, from the beginning of its file."""
    max_lengths: tuple[int, ...] = ()
    """Maximum tokens of a question for each model: longer ones lose their beginning. 0, the default, for no limit."""
    max_tokens: int = 256
    """Tokens of an answer."""
    beams: tuple[int, ...] = (1,)
    """Beam sizes to measure; 1 for no beam search."""
    temperature: float = 0.0
    """Sampling temperature of answers without beams; 0 takes the likeliest token. Each answer has its own seed."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """A row for each model, number of beams, task and metric.

    Raises:
        ValueError, OSError, ImportError: as `score_generation_tasks`, for a wrong model, task, file or number.
    """
    models, tasks = words(options.models), words(options.tasks)
    at_least_one(options, "beams", "max_tokens")
    known([kind_of(task) for task in tasks], KINDS, "task")
    lengths = options.max_lengths or (0,) * len(models)
    if len(lengths) != len(models) or not models:
        raise ValueError(f"{len(models)} models and {len(lengths)} max_lengths: one for each, or none at all")
    labels = [(Path(name).name, length) for name, length in zip(models, lengths, strict=True)]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"several models are called {twice[0][0]}: they would share a column")
    opened = [ModelFolder.open(model) for model in models]
    loaded = [folder.model() for folder in opened]  # all at once: a wrong name fails before hours of answers
    rows = []
    for name, length, folder, model in zip(models, lengths, opened, loaded, strict=True):
        template, reader = folder.template(folder.tokenizer_for_text()), with_engine(model)
        for beams in options.beams:
            label = Path(name).name + (f", {length:,} tokens" if length else "") + f", {beams} beams" * (beams > 1)
            began = time.perf_counter()
            found, _ = score_generation_tasks(
                reader, template, tasks, options.data, limit=options.limit, max_length=length or None,
                max_tokens=options.max_tokens, beams=beams, temperature=options.temperature,
            )  # fmt: skip
            of_model = {"model": label, "parameters": cost.parameters(model.config), "beams": beams}
            of_model |= {"encoders": list(encoders_of(model))}
            rows += [of_model | row for row in found]
            scores = (f"{row['task']} {row['metric']} {row['value']:.4g}" for row in found)
            say(f"{label}, {time.perf_counter() - began:.0f} s: {', '.join(scores)}")
    return {"what": "models on what they write", "hardware": machine.describe(), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """A row for each task and metric, a column for each model, with intervals of 95 %; signatures below."""
    rows = result["rows"]
    labels = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(row["model"], row["task"], row["metric"]): row for row in rows}
    lines = []
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        found = [cells.get((label, task, metric)) for label in labels]
        lines.append([f"{task}, {found[0]['n'] if found[0] else ''}", metric, *map(_cell, found)])
    signatures = dict.fromkeys(row["signature"] for row in rows if "signature" in row)
    return "\n\n".join([markdown(["task, questions", "metric", *labels], lines), *(f"- {s}" for s in signatures)])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    low_high = row["interval"]
    return f"{row['value']:.4g}" + (f" ({low_high[0]:.4g} to {low_high[1]:.4g})" if low_high else "")


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """A PNG with two panels for each task: scores of each model above, loss on reference answers below.

    Numbered tasks, such as answers:row8-1 to answers:row8-8, are curves in one panel.
    """
    rows = result["rows"]
    labels = list(dict.fromkeys(row["model"] for row in rows))
    panels: dict[str, list[str]] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        panels.setdefault(_series(task)[0], []).append(task)
    bands = -(-len(panels) // MOST_PANELS)
    columns = -(-len(panels) // bands)
    figure, axes = grid(title, 2 * bands, columns, size=(max(4.6, 1.2 * len(labels)), 3.2))
    pairs = axes.reshape(bands, 2, columns).swapaxes(1, 2).reshape(-1, 2)
    for axis in pairs[len(panels) :].flat:
        axis.set_axis_off()
    for (above, below), (name, tasks) in zip(pairs, panels.items(), strict=False):
        of_tasks = [row for row in rows if row["task"] in tasks]
        draw = _scores if len(tasks) == 1 else _curves
        draw(above, below, of_tasks, labels)
        above.set_title(f"{name}: {of_tasks[0]['n']} questions" + " each" * (len(tasks) > 1), fontsize=9)
        below.set_ylabel("loss (nats a token)")
    legend(figure, axes)
    figure.savefig(path, dpi=120, format="png")


def _series(task: str) -> tuple[str, int | None]:
    """(NAME, n) for a task NAME-n; (name, None) for a task without a number."""
    numbered = re.fullmatch(r"(.+)-(\d+)", task)
    return (numbered[1], int(numbered[2])) if numbered else (task, None)


def _scores(above: Any, below: Any, rows: list[dict[str, Any]], labels: list[str]) -> None:
    """The bars of a task, and the losses."""
    of_task = {(row["model"], row["metric"]): row for row in rows}
    shown = SHOWN[kind_of(rows[0]["task"])]
    beside = [prefix for prefix in BESIDE if any(metric.startswith(prefix) for _, metric in of_task)]
    bars = [(label, "", f"C{n}", label) for n, label in enumerate(labels)]
    bars += [(labels[0], prefix, "0.6", BESIDE[prefix]) for prefix in beside]
    width = 0.8 / len(bars)
    for n, (metric, unit) in enumerate(shown.items()):
        for m, (label, prefix, colour, name) in enumerate(bars):
            if row := of_task.get((label, prefix + metric)):
                _bar(above, n + (m - (len(bars) - 1) / 2) * width, row, unit, width, colour, name)
    above.set_ylim(0, max(above.get_ylim()[1], 1))  # in hundredths; at least 1, in case all scores are 0
    above.set_xticks(range(len(shown)), list(shown))
    above.set_ylabel("of 100")
    for n, label in enumerate(labels):
        if row := of_task.get((label, "loss")):
            # a point instead of a bar: losses differ little, and an axis from 0 would hide that
            below.errorbar(n, row["value"], _around(row, 1), color=f"C{n}", marker="o", capsize=3)
    below.set_xlim(-0.5, len(labels) - 0.5)
    below.set_xticks([])


def _curves(above: Any, below: Any, rows: list[dict[str, Any]], labels: list[str]) -> None:
    """The first metric of numbered tasks, and the losses, against the number."""
    metric, unit = next(iter(SHOWN[kind_of(rows[0]["task"])].items()))
    for axis, shown, by in ((above, metric, unit), (below, "loss", 1)):
        for n, label in enumerate(labels):
            points = [row for row in rows if (row["model"], row["metric"]) == (label, shown)]
            x = np.array([_series(row["task"])[1] for row in points]) + 0.08 * (n - (len(labels) - 1) / 2)
            apart = np.hstack([_around(row, by) or [[0], [0]] for row in points]) if points else None
            line = {"color": f"C{n}", "marker": "osv^DPX*hd"[n % 10], "markersize": 4, "capsize": 2, "label": label}
            axis.errorbar(x, [by * row["value"] for row in points], apart, **line)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    above.set_ylabel(f"{metric} of 100")


def _bar(axis: Any, x: float, row: dict[str, Any], unit: float, width: float, colour: str, label: str) -> None:
    """A bar at x with its interval."""
    axis.bar(x, unit * row["value"], width, color=colour, label=label)
    if row["interval"]:
        axis.errorbar(x, unit * row["value"], _around(row, unit), color="0.2", capsize=2, linewidth=1)


def _around(row: dict[str, Any], unit: float) -> list[list[float]] | None:
    """Lengths of a row's interval below and above its value, for matplotlib."""
    if not row["interval"]:
        return None
    low, high = row["interval"]
    return [[unit * max(row["value"] - low, 0)], [unit * max(high - row["value"], 0)]]
