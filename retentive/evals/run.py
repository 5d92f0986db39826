"""`retentive.evaluate`: a model's scores on tasks in one call, by our own scorer, by context length, or by lm-eval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retentive.checkpoint import ModelFolder
from retentive.data.templates import ChatTemplate, load_template
from retentive.data.tokenizer import Tokenizer
from retentive.evals.answers import WINDOW, score_tasks
from retentive.evals.contexts import LAST, score_contexts
from retentive.evals.likelihood import Progress
from retentive.evals.read import known
from retentive.evals.replies import KINDS, kind_of, score_replies
from retentive.models import LanguageModel
from retentive.tables import markdown


class Evaluation(NamedTuple):
    """The results; as a string, a Markdown table."""

    rows: list[dict[str, Any]]
    """One for each task and metric: task, shots, n, metric, value, interval (95 %; None for too few questions)."""
    records: list[dict[str, Any]]
    """One for each question, window or text: its line, and its scores."""

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
    window: int | None = None,
    contexts: Sequence[int] = (),
    last: int = LAST,
    lm_eval: bool = False,
    template: ChatTemplate | None = None,
    max_tokens: int = 256,
    beams: int = 1,
    temperature: float = 0.0,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """The scores of a model on tasks: a row for each metric, and a record for each question.

    Args:
        model: a model, or where one is: a run directory, a model folder, a name on the hub.
        tasks: names, in a sequence or with commas between them (docs/evaluation.md lists them).
        data: the folder of the tasks' files, NAME.jsonl each.
        tokenizer: the model's; needed beside a model, else that of its folder, or the name of one (bytes, or a file).
        shots: answered examples before each question, drawn from its file.
        limit: questions of each task, from the beginning of its file.
        max_length: tokens that a question may take; any number if not given. A longer one loses its beginning where an
            answer is written; else it is refused.
        window: tokens of a window for the windowed perplexity of texts, 2048 if not given; lm-eval then reads uncut.
        contexts: lengths of context in tokens: the last ones of windows of each length are predicted (texts, passkey).
        last: tokens of each of those windows that are predicted.
        lm_eval: run lm-eval's own tasks of these names, from the files in `data` if given, else from the hub.
        template: what conversations are asked by (translation, summarisation, answers, dialogue); that of the model's
            folder, or a plain one, if not given.
        max_tokens: of an answer to these.
        beams: hypotheses of beam search for them; 1 for none.
        temperature: of these answers; 0 takes the likeliest token.
        progress: called with each task, its number of questions and how many are done.

    Raises:
        ValueError: an unknown task, options that exclude each other, a line or a question that cannot be used.
        FileNotFoundError: no such model; a task without a file.
        ArithmeticError: the model's logits are not finite.
        ImportError: lm_eval without the extra.
    """
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
    folder = None if data is None else Path(data)
    if lm_eval and (max_length is not None or contexts):
        raise ValueError("--max-length and --contexts are for our own scorer: leave them out with --lm-eval")
    if contexts and (shots or max_length is not None or window is not None):
        raise ValueError("--contexts is for texts: leave out --shots, --max-length and --window")
    replied = [name for name in names if kind_of(name) in KINDS]
    if folder is None and not (lm_eval or contexts):
        asked = names if replied else known(names)
        raise ValueError(f"--data is needed: the folder of {', '.join(asked)} (NAME.jsonl each)")
    if replied and len(replied) < len(names):
        raise ValueError(f"answers that a model writes ({', '.join(replied)}) and other tasks need a call each")
    if replied and (lm_eval or contexts or shots or window is not None):
        raise ValueError(f"{names[0]} takes no --shots, --window, --contexts and --lm-eval: they are of other tasks")
    opened = model if isinstance(model, LanguageModel) else ModelFolder.open(model)
    model, tokenizer = _loaded(opened, tokenizer)  # after all that can be refused without it
    if replied:
        assert folder is not None
        if template is None and isinstance(opened, ModelFolder):
            template = opened.template(tokenizer)
        template = template or load_template(Path(), tokenizer)
        how: dict[str, Any] = {"max_tokens": max_tokens, "beams": beams, "temperature": temperature}
        how |= {"limit": limit, "max_length": max_length, "progress": progress}
        found = score_replies(model, template, names, folder, **how)
    elif lm_eval:
        from retentive.evals.harness import run_tasks  # an extra, and slow to import

        found = run_tasks(model, tokenizer, names, folder, shots=shots, limit=limit, window=window)
    elif contexts:
        found = score_contexts(model, tokenizer, names, folder, contexts, last=last, limit=limit, progress=progress)
    else:
        assert folder is not None
        window = WINDOW if window is None else window
        how = {"shots": shots, "limit": limit, "max_length": max_length, "window": window}
        found = score_tasks(model, tokenizer, names, folder, **how, progress=progress)
    return Evaluation(*found)


def _loaded(model: LanguageModel | ModelFolder, tokenizer: Tokenizer | str | None) -> tuple[LanguageModel, Tokenizer]:
    """The model and its tokenizer, from either form that `evaluate` takes; raises ValueError for a mixture."""
    if isinstance(model, ModelFolder):
        found = model.tokenizer_for_text(tokenizer)
        return model.model(), found
    if tokenizer is None or isinstance(tokenizer, str):
        raise ValueError("a model needs its tokenizer beside it: evaluate(model, …, tokenizer=tokenizer)")
    return model, tokenizer


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    heads = ["task", "shots", "questions", "metric", "value", "95 % interval"]
    if rows and "context" in rows[0]:
        heads.insert(1, "context")
    lines = []
    for row in rows:
        low_high = "–" if row["interval"] is None else " to ".join(f"{x:.4g}" for x in row["interval"])
        cells = {"questions": row["n"], "value": f"{row['value']:.4g}", "95 % interval": low_high}
        lines.append([str({**row, **cells}[head]) for head in heads])
    return markdown(heads, lines)
