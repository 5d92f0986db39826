"""Generation tasks: answers that the model writes, or names that it chooses, compared with reference answers.

    translation     bleu, chrf                by sacrebleu, with its signature
    summarisation   rouge1, rouge2, rougeL    by rouge-score; lead_…: those of the question's first three sentences
    answers         exact                     equal except for case, white space and a final full stop
    transcription   wer                       word error rate by jiwer: wrong, missing, extra words over the references'
    dialogue        distinct1, distinct2      different words, and pairs of words, among all that were written
    all of these    ended                     share of answers that the model ended itself
    naming          first, first10, …         one of many names: evals/naming.py
    all tasks       loss                      nats per token of the references, each token given those before it

A task's file has one conversation per line, in the format of `retentive sft` (data/chats.py): TASK.jsonl, or NAME.jsonl
for TASK:NAME. The model's own chat template renders all but the last answer, which is the reference.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from retentive.data.chats import Conversation, chats
from retentive.data.media import Open, rows_of, text_of
from retentive.data.templates import ChatTemplate
from retentive.evals.likelihood import Progress, Request, in_eval_mode, score, score_from
from retentive.evals.naming import naming
from retentive.evals.stats import Interval, ratio_interval, share
from retentive.infer.batch import generate_batch, together
from retentive.infer.media import read
from retentive.models import LanguageModel
from retentive.options import option
from retentive.sampling import GREEDY, SamplingParams

LEAD = 3
"""Number of first sentences of a question that form the baseline of a summary."""
DRAWS = 1000
"""Draws of the bootstrap over answers."""


class Answered(NamedTuple):
    """A question, its reference answer and the model's answer."""

    name: str
    question: str
    reference: str
    answer: str
    ended: bool
    """True if the model ended it, False if it reached the maximum number of tokens."""


Metrics = Callable[[Sequence[Answered]], list[dict[str, Any]]]
"""Computes rows: metric, value, interval, and further fields."""


def kind_of(name: str) -> str:
    """Returns the task of TASK or TASK:NAME."""
    return name.partition(":")[0]


def score_generation_tasks(
    model: LanguageModel,
    template: ChatTemplate,
    names: list[str],
    folder: Path,
    *,
    limit: int | None = None,
    max_length: int | None = None,
    max_tokens: int = 256,
    beams: int = 1,
    temperature: float = 0.0,
    progress: Progress = lambda *_: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores generation tasks; returns (a row for each task and metric, a record for each question).

    Args:
        names: TASK or TASK:NAME, with TASK in KINDS.
        folder: folder of their files.
        limit: questions of each task, from the start of its file.
        max_length: maximum tokens of a question; the start of a longer one is cut off. Unlimited by default.
        max_tokens: maximum tokens of an answer.
        beams: hypotheses of beam search; 1 for none.
        temperature: 0 picks the likeliest token; otherwise each answer is sampled with a seed of its own.
        progress: called with each task, its number of questions and how many are done.

    Raises:
        FileNotFoundError: a task has no file.
        ValueError: a line is no conversation, or a number is too small.
        ImportError: sacrebleu, rouge-score or jiwer is missing (extra `eval`).
    """
    for what, value in (
        ("limit", limit), ("max_length", max_length), ("max_tokens", max_tokens), ("beams", beams)
    ):  # fmt: skip
        if value is not None and value < 1:
            raise ValueError(f"{option(what, value)}: must be at least 1")
    for name in names:  # checked before hours of generation
        if (scorer := SCORERS.get(kind_of(name))) and not find_spec(scorer):
            raise ImportError(f"{kind_of(name)} is scored by {scorer}: pip install 'retentive[eval]'")
    rows, records = [], []
    asked, opener = {}, _opener(model)
    for name in names:
        kind, named, of = name.partition(":")
        if named and not of:
            raise ValueError(f"task {name} names no file: {kind}:NAME takes NAME.jsonl, {kind} alone {kind}.jsonl")
        if folder.is_file():
            raise NotADirectoryError(f"{option('data', folder)}: a file; give the folder that holds it")
        file = folder / f"{of or name}.jsonl"
        if not file.is_file():
            raise FileNotFoundError(f"task {name} needs {file}: no such file")
        asked[name] = list(islice(chats(file, media=opener, advise=False), limit))
    for name, conversations in asked.items():
        progress(name, len(conversations), 0)
        done = partial(progress, name, len(conversations))
        if (metrics := KINDS[kind_of(name)]) is None:
            if max_length is not None:
                raise ValueError(f"{name}: reads questions whole; leave out `max_length`")
            new, new_records = naming(model, template, conversations, folder, done=done)
        else:
            sampling = SamplingParams(temperature=temperature)
            how: dict[str, Any] = {"max_tokens": max_tokens, "beams": beams, "sampling": sampling}
            found = generate_answers(model, template, conversations, max_length=max_length, **how, done=done)
            new = [*metrics(found), share("ended", [each.ended for each in found])]
            new_records = [each._asdict() for each in found]
        new += loss(model, template, conversations, max_length=max_length)
        rows += [{"task": name, "shots": 0, "n": len(conversations), **row} for row in new]
        records += [{"task": name, **each} for each in new_records]
    return rows, records


def generate_answers(
    model: LanguageModel,
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    *,
    max_length: int | None = None,
    max_tokens: int,
    beams: int = 1,
    sampling: SamplingParams = GREEDY,
    done: Callable[[int], object] = lambda n: None,
) -> list[Answered]:
    """Generates answers to the last questions of conversations, in order; arguments as for `score_generation_tasks` and
    `generate_batch`.

    A long text that consecutive questions share is read once.
    """
    rows = [rows_of(each.messages) for each in conversations]
    if max_length is not None and any(rows):
        raise ValueError("pictures and sound are read whole; leave out `max_length`")
    prompts = [template.first(each.messages[:-1])[-(max_length or 0) :] for each in conversations]
    tokens = generate_batch(
        model, prompts, max_tokens=max_tokens, stop_ids=sorted(template.stop_ids), sampling=sampling,
        beams=beams, rows=rows, done=done,
    )  # fmt: skip
    return [_answered(template, each, ids, max_tokens) for each, ids in zip(conversations, tokens, strict=True)]


def _answered(template: ChatTemplate, asked: Conversation, ids: list[int], max_tokens: int) -> Answered:
    text, ended = template.tokenizer.decode(ids), len(ids) < max_tokens
    for stop in template.stop:  # templates that end an answer with text instead of a token
        if stop in text:
            text, ended = text.partition(stop)[0], True
    question, reference = (
        text_of(message["content"], lambda media: f"<{media.name}>").strip() for message in asked.messages[-2:]
    )
    return Answered(asked.name, question, reference, text.strip(), ended)


def _opener(model: LanguageModel) -> Open:
    """Returns a function that opens the kinds of media that the model accepts, and refuses others."""
    from retentive.multimodal.prepare import Opener  # an extra

    return Opener.of(model)


# metrics


def translation(found: Sequence[Answered]) -> list[dict[str, Any]]:
    """Computes BLEU and chrF of all answers together, with sacrebleu's bootstrap intervals."""
    from sacrebleu.metrics import BLEU, CHRF

    rows = []
    for name, metric in (("bleu", BLEU(force=True)), ("chrf", CHRF())):
        references = [[each.reference for each in found]]
        score = metric.corpus_score([each.answer for each in found], references, n_bootstrap=DRAWS)
        around = None if len(found) < 2 else (float(score._mean - score._ci), float(score._mean + score._ci))
        rows.append(
            {"metric": name, "value": float(score.score), "interval": around, "signature": str(metric.get_signature())}
        )
    return rows


def summarisation(found: Sequence[Answered]) -> list[dict[str, Any]]:
    """Computes the mean ROUGE F1 of the answers, and of the questions' first sentences."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True)
    rows = []
    for prefix, chosen in (("", lambda each: each.answer), ("lead_", lambda each: lead(each.question))):
        scores = [scorer.score(each.reference, chosen(each)) for each in found]
        rows += [mean(prefix + name, [100 * score[name].fmeasure for score in scores]) for name in names]
    return rows


def lead(text: str, sentences: int = LEAD) -> str:
    """Returns the first sentences of a text."""
    return " ".join(re.split(r"(?<=[.!?])\s+", text.strip())[:sentences])


def answers(found: Sequence[Answered]) -> list[dict[str, Any]]:
    """Computes the share of answers that equal the reference except for case, white space and a final full stop."""

    def plain(text: str) -> str:
        return " ".join(text.lower().split()).removesuffix(".")

    return [share("exact", [plain(each.answer) == plain(each.reference) for each in found])]


def transcription(found: Sequence[Answered]) -> list[dict[str, Any]]:
    """Computes the word error rate: wrong, missing and extra words of the answers over the references' words."""
    from jiwer import process_words

    errors, counts = [], []
    for each in found:
        reference, answer = (" ".join(text.lower().split()) for text in (each.reference, each.answer))
        words = process_words(reference, answer)
        wrong = words.substitutions + words.deletions
        errors.append(float(wrong + words.insertions))
        counts.append(float(wrong + words.hits))
    around: Interval = ratio_interval(errors, counts, draws=DRAWS)
    return [{"metric": "wer", "value": sum(errors) / sum(counts), "interval": around}]


def dialogue(found: Sequence[Answered]) -> list[dict[str, Any]]:
    """Computes distinct-n, different words and pairs over all (Li et al., arXiv 1510.03055), also for references."""
    rows = []
    for prefix, texts in (("", [each.answer for each in found]), ("people_", [each.reference for each in found])):
        words = [text.lower().split() for text in texts]
        singles, pairs = ([(w,) for each in words for w in each], [p for each in words for p in pairwise(each)])
        for n, grams in (("1", singles), ("2", pairs)):
            value = len(set(grams)) / max(len(grams), 1)
            rows.append({"metric": f"{prefix}distinct{n}", "value": value, "interval": None})
    return rows


KINDS: dict[str, Metrics | None] = {
    "translation": translation,
    "summarisation": summarisation,
    "answers": answers,
    "transcription": transcription,
    "dialogue": dialogue,
    "naming": None,
}
"""Metrics of each task's answers; None if the task generates nothing."""
SCORERS = {"translation": "sacrebleu", "summarisation": "rouge_score", "transcription": "jiwer"}
"""Package that each task's metrics need."""


def mean(metric: str, values: Sequence[float]) -> dict[str, Any]:
    """Returns the row of a mean over answers."""
    around: Interval = ratio_interval(values, [1.0] * len(values), draws=DRAWS)
    return {"metric": metric, "value": sum(values) / len(values), "interval": around}


def loss(
    model: LanguageModel, template: ChatTemplate, conversations: Sequence[Conversation], *, max_length: int | None
) -> list[dict[str, Any]]:
    """Returns the row of the references' loss; none if the template cannot be trained with and ends no answer."""
    try:
        spelt = template.taught([each.messages for each in conversations], [each.tools for each in conversations])
    except ValueError:
        return []
    asked = []
    for ids, answered in spelt:
        begin = len(ids) - answered[::-1].index(False)  # start of the last answer
        asked.append(Request(ids[:begin][-(max_length or 0) :], ids[begin:]))
    rows = [rows_of(each.messages) for each in conversations]
    if any(rows):  # one by one, as questions with pictures and sound are read
        found = []
        with in_eval_mode(model):
            for (context, answer), of_one in zip(asked, rows, strict=True):
                state = read(model, context[:-1], of_one)
                found += score_from(model, state, [Request(context[-1:], answer)])
    else:
        requests, groups = iter(asked), list[list[Request]]()
        for count, contexts in together([request.context for request in asked]):
            part = [next(requests) for _ in contexts]
            groups += [part] if count else [[request] for request in part]
        found = [each for group in score(model, groups) for each in group]
    losses, counts = [-each.logprob for each in found], [float(each.tokens) for each in found]
    around: Interval = ratio_interval(losses, counts, draws=DRAWS)
    return [{"metric": "loss", "value": sum(losses) / sum(counts), "interval": around}]
