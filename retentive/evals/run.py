"""`retentive.evaluate`: scores a model on tasks in one call, by our own scorer, by context length, or by lm-eval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retentive.checkpoint import ModelFolder
from retentive.data.templates import ChatTemplate, load_template
from retentive.data.tokenizer import Tokenizer
from retentive.evals.contexts import LAST, score_contexts
from retentive.evals.generation_tasks import KINDS, kind_of, score_generation_tasks
from retentive.evals.likelihood import Progress
from retentive.evals.likelihood_tasks import WINDOW, score_likelihood_tasks
from retentive.evals.read import known
from retentive.models import LanguageModel
from retentive.tables import markdown


class Evaluation(NamedTuple):
    """Results of an evaluation; as a string, a Markdown table."""

    rows: list[dict[str, Any]]
    """One row per task and metric: task, shots, n, metric, value, interval (95 %; None for too few questions)."""
    records: list[dict[str, Any]]
    """One record per question, window or text: its line and scores."""

    def __str__(self) -> str:
        return table(self.rows)


def evaluate(
    model: LanguageModel | ModelFolder | str | Path,
    tasks: str | Sequence[str],
    data: str | Path | None = None,
    *,
    tokenizer: Tokenizer | str | None = None,
    shots: int = 0,
    limit: int | None = None,
    max_length: int | None = None,
    text_window: int | None = None,
    contexts: Sequence[int] = (),
    last: int = LAST,
    lm_eval: bool = False,
    template: ChatTemplate | None = None,
    max_tokens: int = 256,
    beams: int = 1,
    temperature: float = 0.0,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """Scores a model on tasks: returns a row for each metric, and a record for each question.

    Args:
        model: a model, or its place: a run directory, a model folder, a name on the hub.
        tasks: names, as a sequence or separated by commas (docs/evaluation.md lists them).
        data: folder of the tasks' files, NAME.jsonl each.
        tokenizer: required if `model` is a model. Otherwise the folder's own by default, or a name (bytes, or a file).
        shots: answered examples before each question, drawn from its file.
        limit: questions of each task, from the start of its file.
        max_length: maximum tokens of a question; unlimited by default. Generation tasks cut off the start of a longer
            one; others refuse it.
        text_window: tokens per window for the windowed perplexity of texts, 2048 by default; lm-eval reads whole texts
            then.
        contexts: context lengths in tokens; predicts the last tokens of windows of each length (texts, passkey).
        last: predicted tokens of each of these windows.
        lm_eval: run lm-eval's own tasks of these names, on the files in `data` if given, else from the hub.
        template: chat template for generation tasks; by default the one of the model's folder, or a plain one.
        max_tokens: maximum tokens of a generated answer.
        beams: hypotheses of beam search for generated answers; 1 for none.
        temperature: sampling temperature of generated answers; 0 picks the likeliest token.
        progress: called with each task, its number of questions and how many are done.

    Raises:
        ValueError: an unknown task, options that exclude each other, an unusable line or question.
        FileNotFoundError: the model does not exist, or a task has no file.
        ArithmeticError: the model's logits are not finite.
        ImportError: an extra is missing.
    """
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
    folder = None if data is None else Path(data)
    if lm_eval and (max_length is not None or contexts):
        raise ValueError("`max_length` and `contexts` are for our own scorer; leave them out with `lm_eval`")
    if contexts and (shots or max_length is not None or text_window is not None):
        raise ValueError("`contexts` is for texts; leave out `shots`, `max_length` and `text_window`")
    replied = [name for name in names if kind_of(name) in KINDS]
    if folder is None and not (lm_eval or contexts):
        asked = names if replied else known(names)
        raise ValueError(f"`data` is needed: the folder that holds {', '.join(f'{name}.jsonl' for name in asked)}")
    if replied and len(replied) < len(names):
        raise ValueError(f"generation tasks ({', '.join(replied)}) exclude other tasks: use a call for each kind")
    if replied and (lm_eval or contexts or shots or text_window is not None):
        raise ValueError(f"{names[0]} takes no `shots`, `text_window`, `contexts` and `lm_eval`; leave them out")
    opened = model if isinstance(model, LanguageModel) else ModelFolder.open(model)
    model, tokenizer = _loaded(opened, tokenizer)  # after all that can be refused without it
    if replied:
        assert folder is not None
        if template is None and isinstance(opened, ModelFolder):
            template = opened.template(tokenizer)
        template = template or load_template(Path(), tokenizer)
        how: dict[str, Any] = {"max_tokens": max_tokens, "beams": beams, "temperature": temperature}
        how |= {"limit": limit, "max_length": max_length, "progress": progress}
        found = score_generation_tasks(model, template, names, folder, **how)
    elif lm_eval:
        from retentive.evals.harness import run_tasks  # an extra, and slow to import

        found = run_tasks(model, tokenizer, names, folder, shots=shots, limit=limit, text_window=text_window)
    elif contexts:
        found = score_contexts(model, tokenizer, names, folder, contexts, last=last, limit=limit, progress=progress)
    else:
        assert folder is not None
        text_window = WINDOW if text_window is None else text_window
        how = {"shots": shots, "limit": limit, "max_length": max_length, "text_window": text_window}
        found = score_likelihood_tasks(model, tokenizer, names, folder, **how, progress=progress)
    return Evaluation(*found)


def _loaded(model: LanguageModel | ModelFolder, tokenizer: Tokenizer | str | None) -> tuple[LanguageModel, Tokenizer]:
    """Returns the model and its tokenizer from either form that `evaluate` accepts; raises ValueError for a mixture."""
    if isinstance(model, ModelFolder):
        found = model.tokenizer_for_text(tokenizer)
        return model.model(), found
    if tokenizer is None or isinstance(tokenizer, str):
        raise ValueError("`tokenizer` is needed beside a model: evaluate(model, …, tokenizer=tokenizer)")
    return model, tokenizer


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    heads = ["task", "shots", "questions", "metric", "value", "95 % interval"]
    if rows and "context" in rows[0]:
        heads.insert(1, "context")
    lines = []
    for row in rows:
        low_high = "–" if row["interval"] is None else " to ".join(f"{x:.4g}" for x in row["interval"])
        cells = {"questions": row["n"], "value": f"{row['value']:.4g}", "95 % interval": low_high}
        lines.append([str({**row, **cells}[head]) for head in heads])
    return markdown(heads, lines)
