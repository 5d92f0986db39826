"""Rows of every task against lm-eval 0.4.13's prompts, written out; and rows that are refused."""

import csv
import json
import math
from pathlib import Path

import pytest

from retentive.evals.read import find, known, parse
from retentive.evals.stats import mean_interval, ratio_interval, wilson
from retentive.evals.tasks import TASKS
from tests.evals.task_rows import ROWS

MADE = Path(__file__).parent / "fixtures"  # handmade rows, with the fields of the public files
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "eval"


@pytest.mark.parametrize("name", ROWS)
def test_prompts(name):
    row, (prompts, continuations, gold) = ROWS[name]
    question = TASKS[name].build(row)
    assert [list(question.prompts), list(question.continuations), question.gold] == [prompts, continuations, gold]


def test_lengths_that_normalise_are_those_of_the_choices():
    assert TASKS["piqa"].build(ROWS["piqa"][0]).choices == ("Heat it.", "Cool it.")


def test_texts():
    turns = [{"speaker": "A", "content": "Yes?"}, {"speaker": "B", "content": "No."}]
    assert TASKS["qmsum"].build({"meeting_transcripts": turns}) == "A: Yes?\nB: No.\n"
    assert TASKS["gov_report"].build({"document": "Text"}) == TASKS["perplexity"].build({"text": "Text"}) == "Text"


MADE_GOLDS = {
    "hellaswag": [1, 0, 3, 1],
    "piqa": [0, 1, 1, 0],
    "boolq": [0, 1, 1, 0],
    "copa": [0, 1, 0, 1],
    "winogrande": [1, 0, 1, 0],
    "wsc273": [0, 1, 1, 0],
    "arc_easy": [1, 0, 3, 0],
    "arc_challenge": [1, 0, 2, 1],
    "openbookqa": [0, 2, 1, 0],
    "lambada_openai": [0, 0, 0, 0],
}


@pytest.mark.parametrize("name", MADE_GOLDS)
def test_files_with_the_fields_of_the_public_ones(name):
    """Answers as letters, digits, strings and numbers; three to five choices; a blank at the pronoun."""
    assert {file.stem for file in MADE.glob("*.jsonl")} == set(MADE_GOLDS)
    questions = [item.content for item in parse(TASKS[name], find(name, MADE))]
    assert [question.gold for question in questions] == MADE_GOLDS[name]
    for question in questions:
        written = [a + b for a, b in zip(question.prompts, question.continuations, strict=True)]
        assert len(set(written)) == len(written) and "_" not in "".join(written)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public task files are not beside this project")
def test_every_line_of_the_public_files_can_be_used():
    """Answers are not all the same: BoolQ's are 62 % yes, the others balanced."""
    for name in [file.stem for file in SHARED.glob("*.jsonl")]:
        questions = [item.content for item in parse(TASKS[name], find(name, SHARED))]
        assert len(questions) >= 50
        if TASKS[name].kind == "choice":
            first = sum(question.gold == 0 for question in questions) / len(questions)
            assert 0.2 < first < 0.6, name


BAD = {
    "no-field": ("piqa", {"goal": None}, "no field 'goal', expected one beside 'sol1', 'sol2', 'label'"),
    "number": ("piqa", {"sol1": 3}, "field 'sol1' must be a string, got int"),
    "gold": ("piqa", {"label": 2}, "field 'label' must be one of 0, 1, got 2"),
    "no-gold": ("boolq", {"label": None}, "field 'label' must be one of 0, 1, got None"),
    "empty-choice": ("piqa", {"sol2": " "}, "choice 2 of 2 is empty: it has no token to score"),
    "empty-first-choice": ("copa", {"choice1": ""}, "choice 1 of 2 is empty"),
    "one-ending": ("hellaswag", {"endings": ["a"]}, "field 'endings' must be a list of two strings or more"),
    "bracketed-ending": ("hellaswag", {"endings": ["[step]", "a"]}, "choice 1 of 2 is empty"),
    "cause": ("copa", {"question": "why"}, "field 'question' must be one of cause, effect, got 'why'"),
    "no-blank": ("winogrande", {"sentence": "Ann ran."}, "field 'sentence' has no '_'"),
    "nothing-after": (
        "winogrande",
        {"sentence": "Ann saw _"},
        "nothing follows the prompt: there is no token to score",
    ),
    "pronoun": ("wsc273", {"pronoun_loc": 3}, "field 'pronoun_loc' must say where 'his' stands in 'text', got 3"),
    "choices": ("arc_easy", {"choices": ["ice"]}, "field 'choices' must hold 'text' and 'label', got list"),
    "labels": (
        "arc_easy",
        {"choices": {"text": ["a", "b"], "label": ["1", "2", "3"]}},
        "field 'choices' has 2 texts and 3 labels",
    ),
    "answer": ("openbookqa", {"answerKey": "E"}, "field 'answerKey' must be one of A, B, got 'E'"),
    "ending": ("storycloze", {"answer_right_ending": 0}, "field 'answer_right_ending' must be one of 1, 2, got 0"),
    "no-word": ("lambada_openai", {"text": "a "}, "nothing follows the prompt"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_cannot_be_used_is_named_by_its_line(case, tmp_path, refuses):
    name, change, words = BAD[case]
    row = {key: value for key, value in {**ROWS[name][0], **change}.items() if value is not None}
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps(ROWS[name][0]) + "\n\n" + json.dumps(row) + "\n", encoding="utf-8")
    with refuses(f"t.jsonl line 3: {words}"):
        parse(TASKS[name], file)


FILES = {
    "empty": ("", "t.jsonl is empty: expected a JSON object a line"),
    "no-json": ('{"text": "a b"}\n{', "t.jsonl line 2 is not JSON"),
    "no-object": ("[1]", "t.jsonl line 1: expected a JSON object, got list"),
    "empty-document": ('{"text": " "}', "t.jsonl line 1: the document is empty: there is nothing to predict"),
    "no-turns": ('{"meeting_transcripts": "A: a"}', "line 1: no field 'text'"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be_read(case, tmp_path, refuses):
    content, words = FILES[case]
    (tmp_path / "t.jsonl").write_text(content, encoding="utf-8")
    with refuses(words):
        parse(TASKS["perplexity"], tmp_path / "t.jsonl")


def test_text_that_is_not_utf8(tmp_path, refuses):
    (tmp_path / "t.jsonl").write_bytes('{"text": "café"}'.encode("latin-1"))
    with refuses("t.jsonl is not UTF-8 text"):
        parse(TASKS["perplexity"], tmp_path / "t.jsonl")


def test_names_and_places(tmp_path, refuses):
    with refuses("unknown task 'hellaswig', expected some of hellaswag, piqa"):
        known(["piqa", "hellaswig"])
    with refuses("`tasks` is empty"):
        known([])
    with refuses("task storycloze needs", FileNotFoundError):
        find("storycloze", tmp_path)
    (tmp_path / "storycloze.csv").write_text("x", encoding="utf-8")
    assert find("storycloze", tmp_path).name == "storycloze.csv"


def test_a_csv_file_with_an_open_quotation(tmp_path, refuses):
    (tmp_path / "storycloze.csv").write_text('a,b\n1,"' + "x" * 140_000, encoding="utf-8")
    limit = csv.field_size_limit(131_072)  # a setting of the process, which `retentive data` raises
    try:
        with refuses("storycloze.csv line 1: field larger than field limit"):
            parse(TASKS["storycloze"], tmp_path / "storycloze.csv")
    finally:
        csv.field_size_limit(limit)


def test_the_authors_csv_of_storycloze(tmp_path):
    heads = "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
    heads += "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding"
    line = 'x,Ann ran.,"She fell, hard.",She cried.,Bo came.,He helped.,He left.,1'
    (tmp_path / "s.csv").write_text(f"\ufeff{heads}\n{line}\n", encoding="utf-8")
    ((at, question),) = parse(TASKS["storycloze"], tmp_path / "s.csv")
    assert at == 2 and question.gold == 0 and question.prompts[0] == "Ann ran. She fell, hard. She cried. Bo came."


@pytest.fixture
def twenty(tmp_path):
    """LAMBADA's file with twenty texts."""
    file = tmp_path / "t.jsonl"
    file.write_text("".join(f'{{"text": "text number w{n}"}}\n' for n in range(20)), encoding="utf-8")
    return file


def test_examples_come_before_each_question_and_never_hold_it(twenty):
    items = parse(TASKS["lambada_openai"], twenty, shots=4)
    assert len(items) == 20
    for item in items:
        *examples, prompt = item.content.prompts[0].split("\n\n")
        assert prompt == "text number" and len(set(examples)) == 4
        assert f"text number {item.content.continuations[0]}" not in examples
    assert len({item.content.prompts[0] for item in items}) == 20


def test_examples_are_the_same_each_time_and_with_a_limit(twenty):
    task = TASKS["lambada_openai"]
    assert parse(task, twenty, shots=4, limit=3) == parse(task, twenty, shots=4)[:3]


def test_too_few_questions_for_the_examples(twenty, refuses):
    with refuses("20 questions are too few for 20 examples before each; lower `shots`"):
        parse(TASKS["lambada_openai"], twenty, shots=20)
    with refuses("holds texts, and examples are for questions; set `shots=0`"):
        parse(TASKS["perplexity"], twenty, shots=1)


def test_wilson():
    """Brown, Cai and DasGupta's form, by hand for 8 of 10; and its bounds."""
    low, high = wilson(8, 10)
    assert math.isclose(low, 0.4902, abs_tol=5e-5) and math.isclose(high, 0.9433, abs_tol=5e-5)
    assert wilson(0, 10)[0] == 0 and math.isclose(wilson(10, 10)[1], 1)


def test_intervals_of_means_and_ratios():
    low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert math.isclose(high - low, 2 * 1.959964 * math.sqrt(5 / 3 / 4)) and math.isclose(low + high, 5)
    low, high = ratio_interval([2.0, 4.0, 9.0, 8.0] * 20, [1.0, 2.0, 3.0, 4.0] * 20)
    assert low < 2.3 < high and high - low < 0.4
    assert ratio_interval([3.0, 6.0], [1.0, 2.0]) == (3, 3)
    assert mean_interval([1.0]) is ratio_interval([1.0], [1.0]) is None
