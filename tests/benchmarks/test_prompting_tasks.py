"""Tasks of structured prompting: questions were never demonstrations, classes get new names, files are configurable."""

import json
from collections import defaultdict

import pytest

from benchmarks import prompting_tasks
from benchmarks.prompting_tasks import Classes, Files


def classes(count: int, sources: int) -> Classes:
    found = defaultdict(lambda: defaultdict(list))
    for c in range(count):
        for s in range(sources):
            prompting_tasks.add(found, f"class {c}", f"{c} source {s}", [f"one two {c} {s} {n}" for n in range(2)])
    return found


def test_texts_are_short_new_and_kept_by_source():
    found = classes(0, 0)
    prompting_tasks.add(found, "c", "s", ["a b c", "a b c d", "a  b\nc d", " ".join("abcdefghijklmnop")])
    assert found["c"]["s"] == ["a b c d", "a b c d e f"]


@pytest.mark.parametrize("new", [False, True])
def test_what_is_asked_was_never_shown(new):
    found = classes(20, 100)
    found["small"] = {"x": ["one two three four"]}
    train, known, unseen = prompting_tasks.split(found, new=new)
    assert set(known.asked) | set(unseen.asked) == set(found) - {"small"}
    assert set(known.asked) <= set(train) and not set(unseen.asked) & set(train)
    assert bool(unseen.asked) == new
    for texts in (known, unseen):
        for label, asked in texts.asked.items():
            assert len(asked) >= prompting_tasks.ASKED and len(texts.shown[label]) >= prompting_tasks.SHOWN
            assert not set(asked) & set(texts.shown[label]) and not set(asked) & set(train.get(label, ()))


def test_tasks_name_classes_anew_and_are_the_same_for_a_seed():
    texts = {f"class {c}": [f"text of {c} number {n}" for n in range(9)] for c in range(6)}
    tasks = list(prompting_tasks.tasks([texts], 30, seed=3))
    assert tasks == list(prompting_tasks.tasks([texts], 30, seed=3)) != list(prompting_tasks.tasks([texts], 30, seed=4))
    namings = set()
    for task in tasks:
        lines = task.text.splitlines()
        assert len(lines) == prompting_tasks.EPISODE
        assert all(line.split(" -> ")[1].split(" ")[1] == line.split()[2] for line in lines)
        pairs = {(line.split()[2], line[-1]) for line in lines}
        assert len(pairs) == len({c for c, _ in pairs}) == len({n for _, n in pairs}) in (2, 3, 4)
        namings.add(frozenset(pairs))
    assert len(namings) > 20


def test_the_texts_are_where_the_options_say(tmp_path):
    """Every file that is read is named by an option; the classes are their sorts, the sources hold together."""
    files = {
        "books/a.txt": "\n\n".join(f"paragraph number {n} of a" for n in range(30)),
        "a play.txt": "ANN:\nwhat a fine day it is\n\nBOB:\nit is not at all",
        "meetings": json.dumps({"meeting_transcripts": [{"content": "let us begin now please"}]}),
        "papers": json.dumps({"source": ["we show that it works"]}),
        "reports": json.dumps({"id": "r1", "document": "The first of its sentences. The second of its sentences."}),
        "articles": json.dumps({"passage": "A passage of an article."}),
        "en": "a phrase of four\n",
        "ja": "this stands for Japanese\n",
        "videos": json.dumps(
            {"source_id": "activitynet~1", "activity_label": "Ice fishing", "label": "1", "ctx_a": "a man kneels on",
             "ctx_b": "he", "endings": ["flies away from it", "waits for a fish"]}
        ),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    names = ("play", "meetings", "papers", "reports", "articles", "english", "japanese", "hellaswag")
    paths = ("a play.txt", "meetings", "papers", "reports", "articles", "en", "ja", "videos")
    options = Files(tmp_path, novels="books", **dict(zip(names, paths, strict=True)))
    found = {label: dict(sources) for label, sources in prompting_tasks.kinds(options).items()}
    assert found["novel"] == {"a": [f"paragraph number {n} of a" for n in range(20, 30)]}
    assert found["play"] == {"play 0": ["what a fine day it is", "it is not at all"]}
    assert found["report"] == {"r1": ["The first of its sentences.", "The second of its sentences."]}
    assert set(found) == {"novel", "play", "meeting", "paper", "report", "article", "English", "Japanese"}
    videos = {"Ice fishing": {"activitynet~1": ["a man kneels on", "he waits for a fish"]}}
    assert prompting_tasks.activities(options) == videos
    with pytest.raises(FileNotFoundError, match="missing"):
        prompting_tasks.kinds(Files(tmp_path, novels="books", play="missing"))


def test_sentences_are_cut_at_their_ends():
    assert prompting_tasks.sentences("One two. Three? Four! Five", 3) == ["One two.", "Three?", "Four!"]
