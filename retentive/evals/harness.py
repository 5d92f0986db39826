"""lm-eval's own tasks on our models (extra `eval`): its prompts, filters and metrics, with our scoring.

A subclass of lm-eval's LM: the choices of a question share one state, texts are read whole or in windows, and
generation uses a state of constant size. Prompts follow an end-of-text token, as documents do in training.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retentive.data.tokenizer import Tokenizer
from retentive.evals.likelihood import Request, Score, encode, score
from retentive.evals.likelihood_tasks import windows
from retentive.evals.read import find
from retentive.evals.stats import Interval, Z
from retentive.infer import SamplingParams, generate
from retentive.infer.text import stream_text
from retentive.models import LanguageModel

STOCK = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "winogrande": "winogrande/default.yaml",
    "wsc273": "wsc273/default.yaml",
    "storycloze": "storycloze/storycloze_2016.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}
"""Tasks that can use local files, with lm-eval's description of each, relative to its folder of tasks."""

SHARES = ("acc", "exact_match", "em", "f1")
"""Prefixes of metrics in [0, 1]: their intervals are clipped, since normal ones reach beyond."""
BOOTSTRAP = 1000
"""Bootstrap draws for the standard errors of perplexities."""


def run_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    names: list[str],
    folder: Path | None,
    *,
    shots: int = 0,
    limit: int | None = None,
    text_window: int | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs lm-eval's own tasks; returns (rows, records) like those of `score_likelihood_tasks`.

    Args:
        names: names in STOCK if a folder is given; else any of lm-eval's tasks, with data from the hub.
        folder: folder of the tasks' files.
        shots: answered examples before each question.
        limit: questions of each task.
        text_window: tokens per window for texts; whole texts by default.

    Raises:
        ImportError: the extra is missing.
        ValueError: an unknown task.
        FileNotFoundError: a task has no file.
    """
    _library()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as described:
        if folder is not None:
            describe(names, folder, Path(described))
        manager = TaskManager(include_path=None if folder is None else described, include_defaults=folder is None)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown or not names:
            raise ValueError(
                f"lm-eval has no task {', '.join(unknown) or 'without a name'} (lm-eval ls tasks lists all)"
            )
        found = simple_evaluate(
            model=native(model, tokenizer, text_window=text_window),
            tasks=list(names),
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            task_manager=manager,
        )
    return _rows(found, shots), _records(found["samples"])


def describe(names: list[str], folder: Path, out: Path) -> None:
    """Writes a YAML file for each task into the folder `out`: lm-eval's own task with local files as its data.

    A file serves as lm-eval's test split and as the source of examples, so a question is left out of its own examples.
    """
    tasks = Path(_library().__file__).parent / "tasks"
    for name in names:
        if name not in STOCK:
            raise ValueError(f"lm-eval has no task {name!r} for local files, expected some of {', '.join(STOCK)}")
        stock = tasks / STOCK[name]
        if not stock.is_file():
            raise ValueError(f"this version of lm-eval has no {STOCK[name]}: 0.4.13 has")
        file = find(name, folder).resolve()
        if file.suffix != ".jsonl":
            raise ValueError(
                f"lm-eval reads {name} from {name}.jsonl with its own names of the fields, not {file.name}"
            )
        task: dict[str, Any] = {"include": stock.as_posix(), "task": name, "tag": None}
        task |= {"dataset_path": "json", "dataset_name": None}
        task |= {"dataset_kwargs": {"data_files": {"test": file.as_posix()}}, "test_split": "test"}
        task |= {"training_split": None, "validation_split": None, "fewshot_split": "test"}
        (out / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML


def native(model: LanguageModel, tokenizer: Tokenizer, *, text_window: int | None = None) -> Any:
    """Returns an `lm_eval.api.model.LM` for `lm_eval.simple_evaluate(model=…)`; whole texts without `text_window`."""
    _library()  # raises an error that names the extra
    from lm_eval.api.model import LM

    class NativeLM(LM):  # defined here, since its base class needs the extra
        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            answers = [(s.logprob, s.greedy) for s in likelihoods(model, tokenizer, requests)]
            for request, answer in zip(requests, answers, strict=True):
                self.cache_hook.add_partial("loglikelihood", request.args, answer)
            return answers

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            return [rolling(model, tokenizer, request.args[0], text_window) for request in requests]

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            return [write(model, tokenizer, *request.args) for request in requests]

        @property
        def tokenizer_name(self) -> str:
            return tokenizer.sha256

    return NativeLM()


def likelihoods(model: LanguageModel, tokenizer: Tokenizer, requests: Sequence[Any]) -> list[Score]:
    """Returns the scores of lm-eval's requests. Requests of one question share the common prefix of their contexts."""
    groups: dict[Any, list[int]] = {}
    for n, request in enumerate(requests):
        question = request.args[0] if request.doc_id is None else (request.task_name, request.doc_id)
        groups.setdefault(question, []).append(n)
    found = score(model, [[encode(tokenizer, *requests[n].args) for n in group] for group in groups.values()])
    # from groups back to the order of the requests
    scores = dict(zip((n for group in groups.values() for n in group), (s for f in found for s in f), strict=True))
    return [scores[n] for n in range(len(requests))]


def rolling(model: LanguageModel, tokenizer: Tokenizer, text: str, window: int | None = None) -> float:
    """Returns the log-likelihood of a text, whole or in windows of `window` tokens; 0 for an empty one."""
    ids = tokenizer.encode(text)
    if not ids:
        return 0.0
    cuts = [Request([tokenizer.eos_id], ids)] if window is None else windows(ids, tokenizer.eos_id, window)
    return sum(scores[0].logprob for scores in score(model, [[cut] for cut in cuts]))


KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")
"""Supported generation options of lm-eval; ignoring others would give a result that the task does not ask for."""


def write(model: LanguageModel, tokenizer: Tokenizer, prompt: str, options: dict[str, Any]) -> str:
    """Generates text after the prompt, up to a string of `until`, end of text, or `max_gen_toks` tokens.

    Raises:
        ValueError: an option is not in KNOWN.
    """
    for name in options:
        if name not in KNOWN:
            raise ValueError(f"generation option {name!r} is not known, expected some of {', '.join(KNOWN)}")
    until = options.get("until") or []
    sampled = options.get("do_sample", bool(options.get("temperature")))
    filters = {name: options[name] for name in ("temperature", "top_p", "top_k") if name in options}
    params = SamplingParams(**filters) if sampled else SamplingParams(temperature=0)
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    most = options.get("max_gen_toks", 256)
    tokens = generate(model, ids, params, max_tokens=most, stop_ids=[tokenizer.eos_id])
    return "".join(stream_text(tokens, tokenizer, stop=[until] if isinstance(until, str) else until))


def _rows(found: dict[str, Any], shots: int) -> list[dict[str, Any]]:
    """Returns a row for each task and metric, with 95 % intervals from lm-eval's standard errors."""
    rows = []
    for task, results in found["results"].items():
        of = {"task": task, "shots": shots, "n": found["n-samples"].get(task, {}).get("effective", 0)}
        for key, value in results.items():
            metric, _, filtered = key.partition(",")  # metrics have keys "metric,filter"; others ("alias") do not
            if metric.endswith("_stderr") or not isinstance(value, float | int) or not filtered:
                continue
            error = results.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, float) and not math.isnan(error)  # "N/A" or NaN if not computed
            interval: Interval = (value - Z * error, value + Z * error) if known else None
            if interval and metric.startswith(SHARES):
                interval = max(0.0, interval[0]), min(1.0, interval[1])
            rows.append({**of, "metric": metric, "value": value, "interval": interval})
    return rows


def _records(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns a record per question: its line (if the file has no blank lines), right answer and model's answer."""
    return [
        {
            "task": task,
            "line": sample["doc_id"] + 1,
            "gold": sample["target"],
            "answers": sample["filtered_resps"],
            **{metric: sample[metric] for metric in sample["metrics"]},
        }
        for task, of_task in samples.items()
        for sample in of_task
    ]


def _library() -> Any:
    try:
        import lm_eval
    except ImportError:
        raise ImportError("lm-eval's tasks need lm-eval: pip install 'retentive[eval]'") from None
    return lm_eval
