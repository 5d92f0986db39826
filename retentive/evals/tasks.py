"""Likelihood tasks: how a row of a task's file becomes a question with prompts, choices and the right answer.

Prompts, choices and metrics are those of lm-eval 0.4.13's stock tasks, including the two spaces before continuations of
COPA and Winograd. Winogrande and Winograd are scored as by Trinh and Le (arXiv 1806.02847): one prompt for each choice,
followed by the same words.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PROMPTS = "0.4.13"
"""Version of lm-eval that the prompts are from."""

PASSKEY = "passkey"
"""The only task without a file: contexts.py makes up its questions."""

Row = Mapping[str, Any]
"""A row of a file, by field."""


@dataclass(frozen=True)
class Question:
    """A question with its choices, and a prompt and a continuation for each choice."""

    prompts: tuple[str, ...]
    continuations: tuple[str, ...]
    """Each includes the space that separates it from its prompt."""
    gold: int
    """Index of the right choice."""
    choices: tuple[str, ...]
    """Texts of the choices; their lengths normalise log-likelihoods (acc_norm, acc_bytes)."""
    shot: str
    """Prompt and right answer, for use as an example before other questions."""


@dataclass(frozen=True)
class Task:
    kind: str
    """choice: picks the likeliest continuation. word: compares with greedy decoding. text: perplexity."""
    build: Callable[[Row], Any]
    """Makes a Question from a row (for kind text, the text). Raises ValueError if the row is unusable."""
    metrics: tuple[str, ...]
    files: tuple[str, ...] = ()
    """Files below the data folder, of which the first existing one is used; default NAME.jsonl, or a folder of .txt."""


# fields of rows


def string(row: Row, field: str) -> str:
    """Returns the string in a field; raises ValueError if there is none."""
    if field not in row:
        raise ValueError(f"no field {field!r}, expected one beside {', '.join(map(repr, row)) or 'nothing'}")
    if not isinstance(row[field], str):
        raise ValueError(f"field {field!r} must be a string, got {type(row[field]).__name__}")
    return row[field]


def strings(row: Row, field: str) -> list[str]:
    """Returns the list of at least two strings in a field; raises ValueError if there is none."""
    values = row.get(field)
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(v, str) for v in values):
        raise ValueError(f"field {field!r} must be a list of two strings or more, got {values!r:.80}")
    return values


def one_of(row: Row, field: str, names: list[Any]) -> int:
    """Returns the index in `names` of a field's value, where 1 equals "1"; raises ValueError for other values."""
    value = str(row.get(field)).strip()
    if value not in map(str, names):
        raise ValueError(f"field {field!r} must be one of {', '.join(map(str, names))}, got {row.get(field)!r:.80}")
    return [str(name) for name in names].index(value)


# questions


def ask(prompt: str, choices: list[str], gold: int) -> Question:
    """Returns a question with one prompt, followed by each of the choices after a space."""
    _no_empty(choices)
    continuations = tuple(" " + choice for choice in choices)
    return Question((prompt,) * len(choices), continuations, gold, tuple(choices), prompt + continuations[gold])


def fill(beginnings: list[str], end: str, gold: int) -> Question:
    """Returns a question with one prompt per choice, followed by the same end after a space."""
    _some(end)
    n = len(beginnings)
    return Question(tuple(beginnings), (" " + end,) * n, gold, tuple(beginnings), f"{beginnings[gold]} {end}")


def _no_empty(choices: list[str]) -> None:
    for n, choice in enumerate(choices, 1):
        if not choice.strip():
            raise ValueError(f"choice {n} of {len(choices)} is empty: it has no token to score")


def _some(continuation: str) -> None:
    if not continuation.strip():
        raise ValueError("nothing follows the prompt: there is no token to score")


def hellaswag(row: Row) -> Question:
    context = string(row, "ctx_a") + " " + string(row, "ctx_b").capitalize()
    endings = strings(row, "endings")
    query = _without_marks(string(row, "activity_label") + ": " + context)
    return ask(query, [_without_marks(e) for e in endings], one_of(row, "label", list(range(len(endings)))))


def _without_marks(text: str) -> str:
    """Removes WikiHow's headings and brackets, as lm-eval does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def piqa(row: Row) -> Question:
    choices = [string(row, "sol1"), string(row, "sol2")]
    return ask(f"Question: {string(row, 'goal')}\nAnswer:", choices, one_of(row, "label", [0, 1]))


def boolq(row: Row) -> Question:
    prompt = f"{string(row, 'passage')}\nQuestion: {string(row, 'question')}?\nAnswer:"
    return ask(prompt, ["no", "yes"], one_of(row, "label", [0, 1]))


def copa(row: Row) -> Question:
    word = ("because", "therefore")[one_of(row, "question", ["cause", "effect"])]
    choices = [string(row, "choice1"), string(row, "choice2")]
    _no_empty(choices)
    prompt = f"{string(row, 'premise').strip()[:-1]} {word}"  # drops the premise's full stop
    return ask(prompt, [f" {c[0].lower()}{c[1:]}" for c in choices], one_of(row, "label", [0, 1]))


def winogrande(row: Row) -> Question:
    before, blank, after = string(row, "sentence").partition("_")
    if not blank:
        raise ValueError("field 'sentence' has no '_' where the options go")
    options = [string(row, "option1"), string(row, "option2")]
    return fill([before + option for option in options], after.strip(), one_of(row, "answer", [1, 2]))


UPPER = ("A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their")
"""First words of options that are not names: lower-cased in the middle of a sentence."""


def wsc273(row: Row) -> Question:
    text, pronoun, place = string(row, "text").replace("  ", " "), string(row, "pronoun"), row.get("pronoun_loc")
    if not isinstance(place, int) or text[place : place + len(pronoun)] != pronoun or not pronoun:
        raise ValueError(f"field 'pronoun_loc' must say where {pronoun!r} stands in 'text', got {place!r}")
    options = [_fitted(option, text, pronoun, place) for option in strings(row, "options")]
    gold = one_of(row, "label", list(range(len(options))))
    return fill([text[:place] + option for option in options], text[place + len(pronoun) :], gold)


def _fitted(option: str, text: str, pronoun: str, place: int) -> str:
    """Returns the option in the form that replaces the pronoun."""
    _no_empty([option])
    if pronoun.lower() in ("my", "his", "her", "our", "their"):
        option += "'s"
    first = option.split()[0]
    # a full stop two characters before the pronoun marks the beginning of a sentence
    return option.replace(first, first.lower()) if first in UPPER and text[place - 2] != "." else option


def lettered(prompt: Callable[[Row], str]) -> Callable[[Row], Question]:
    """Returns a builder of questions with labelled choices, as in ARC and OpenBookQA."""

    def build(row: Row) -> Question:
        choices = row.get("choices")
        if not isinstance(choices, dict):
            raise ValueError(f"field 'choices' must hold 'text' and 'label', got {type(choices).__name__}")
        texts, labels = strings(choices, "text"), strings(choices, "label")
        if len(texts) != len(labels):
            raise ValueError(f"field 'choices' has {len(texts)} texts and {len(labels)} labels")
        return ask(prompt(row), texts, one_of(row, "answerKey", labels))

    return build


def storycloze(row: Row) -> Question:
    """Reads lm-eval's field names, or those of the authors' CSV."""
    new = "input_sentence_1" in row
    sentences = [string(row, f"input_sentence_{n}" if new else f"InputSentence{n}") for n in range(1, 5)]
    ends = [string(row, f"sentence_quiz{n}" if new else f"RandomFifthSentenceQuiz{n}") for n in (1, 2)]
    return ask(" ".join(sentences), ends, one_of(row, "answer_right_ending" if new else "AnswerRightEnding", [1, 2]))


def lambada(row: Row) -> Question:
    prompt, _, word = string(row, "text").rpartition(" ")
    _some(word)
    # two spaces in examples, since lm-eval joins prompt and " word" with one more
    return Question((prompt,), (" " + word,), 0, (word,), f"{prompt}  {word}")


# texts


def text(row: Row) -> str:
    return _not_blank(string(row, "text"))


def report(row: Row) -> str:
    return _not_blank(string(row, "document"))


def meeting(row: Row) -> str:
    turns = row.get("meeting_transcripts")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("field 'meeting_transcripts' must be a list of turns with 'speaker' and 'content'")
    return _not_blank("".join(f"{string(turn, 'speaker')}: {string(turn, 'content')}\n" for turn in turns))


def _not_blank(document: str) -> str:
    if not document.strip():
        raise ValueError("the document is empty: there is nothing to predict")
    return document


ACC, NORM = ("acc",), ("acc", "acc_norm", "acc_bytes")
LENGTHS = ("bits_per_byte", "byte_perplexity", "word_perplexity")

TASKS = {
    "hellaswag": Task("choice", hellaswag, NORM),
    "piqa": Task("choice", piqa, NORM),
    "boolq": Task("choice", boolq, ACC),
    "copa": Task("choice", copa, ACC),
    "winogrande": Task("choice", winogrande, ACC),
    "wsc273": Task("choice", wsc273, ACC),
    "storycloze": Task("choice", storycloze, ACC, ("storycloze.jsonl", "storycloze.csv")),
    "arc_easy": Task("choice", lettered(lambda row: f"Question: {string(row, 'question')}\nAnswer:"), NORM),
    "arc_challenge": Task("choice", lettered(lambda row: f"Question: {string(row, 'question')}\nAnswer:"), NORM),
    "openbookqa": Task("choice", lettered(lambda row: string(row, "question_stem")), NORM),
    "lambada_openai": Task("word", lambada, ("acc", "perplexity")),
    "perplexity": Task("text", text, LENGTHS),
    "novels": Task("text", text, LENGTHS, ("novels.jsonl", "novels/valid", "../novels/valid")),
    "qmsum": Task("text", meeting, LENGTHS, ("qmsum.jsonl", "qmsum/val.jsonl", "../qmsum/val.jsonl")),
    "gov_report": Task(
        "text",
        report,
        LENGTHS,
        ("gov_report.jsonl", "gov_report/gov_report.jsonl", "../gov_report/gov_report.jsonl"),
    ),
}
