"""Few-shot tasks: questions were never demonstrations; with one group all ways of remembering agree."""

import json
import math
import re

import pytest
import torch

from benchmarks import prompting
from benchmarks.prompting import WAYS, Options
from benchmarks.prompting_tasks import NAMES, Texts
from retentive.compare.variants import short_head
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import ARCHITECTURES, build, retnet

GROUPS = (1, 2, 4)

FIXED = ARCHITECTURES["retnet-paper"] | {"decay": short_head(2)}
"""Memories of decays per token cannot be chained."""


class Words(ByteTokenizer):
    """Bytes, but " A" to " D" are one token, as in a vocabulary that was learnt."""

    vocab_size = 261

    def encode(self, text: str) -> list[int]:
        for n, name in enumerate(NAMES):
            text = re.sub(rf" {name}(?=\n|$)", chr(0xE000 + n), text)
        return [257 + ord(c) - 0xE000 if ord(c) >= 0xE000 else ord(c) for c in text]


def test_classes_and_names_count_and_texts_do_not():
    documents = [Document("a", "one -> ice C\ntwo words -> b A\n"), Document("b", "x -> b B\n")]
    ids, counts = prompting.answers_of(Words(), documents)
    assert ids.shape == counts.shape and ids[:, 0].tolist() == [256, 256]
    letters = {257: "A", 258: "B", 259: "C", 260: "D"}
    counted = [
        "".join(letters.get(i, chr(i)) for i in row[mark].tolist()) for row, mark in zip(ids, counts, strict=True)
    ]
    assert counted == [" iceC bA", " bB"]


def test_learning_the_game_lowers_the_loss():
    config = retnet(vocab_size=261, dim=32, layers=1, heads=2, **FIXED)
    assert config.retention.decay[0] == -1 and -0.01 < config.retention.decay[1] < 0
    texts, said = {"x": ["a b c d"], "y": ["e f g h"], "z": ["i j k l"], "w": ["m n o p"]}, []
    model = prompting.learn(config, Words(), [texts], steps=100, batch=1, lr=2e-2, say=said.append)
    losses = [float(line.split()[-1]) for line in said]
    # a blank, a letter of four, a name of four: who knows no more than that has a loss of log(4) at two tokens of three
    assert len(losses) == 2 and losses[1] < 2 * math.log(4) / 3 < losses[0] and not model.training
    twice = [prompting.learn(config, Words(), [texts], steps=2, batch=1) for _ in range(2)]
    assert torch.equal(twice[0].head.weight, twice[1].head.weight)


def test_the_model_is_trained_once_and_then_read(tmp_path, monkeypatch):
    trained = []
    found = {f"class {c}": {f"{c} source {s}": [f"one two {c} {s}"] for s in range(40)} for c in range(8)}

    def learn(config, tokenizer, families, *, steps, say):
        trained.append((steps, len(families)))
        return build(config)

    monkeypatch.setattr(prompting, "kinds", lambda options: found)
    monkeypatch.setattr(prompting, "activities", lambda options: found)
    monkeypatch.setattr(prompting, "learn", learn)
    monkeypatch.setattr(prompting, "of_model", lambda model, _, sets, **how: (model.head.weight, list(sets), how))
    options = Options(tmp_path, out=tmp_path / "model", steps=7, episodes=3)
    (weight, sets, how), (again, *_) = prompting.measure(options), prompting.measure(options)
    assert trained == [(7, 2)] and torch.equal(weight, again) and how["episodes"] == 3
    assert sets == ["kinds of text", "activities", "activities never seen"]


@pytest.fixture
def result():
    model = build(retnet(vocab_size=261, dim=32, layers=2, heads=2, **FIXED)).eval()
    texts = Texts(*({f"c{c}": [f"{c} {w} {n}" for n in range(30)] for c in range(5)} for w in ("shown", "asked")))
    return prompting.of_model(model, Words(), {"letters": texts}, groups=GROUPS, episodes=6, queries=4)


def test_one_group_is_remembered_the_same_way_by_all(result):
    found = result["sets"]["letters"]
    for way in WAYS:
        for mean, half in found["accuracy"][way].values():
            rights = mean * 6 * 16  # of six episodes with four questions about each of four classes
            assert rights == pytest.approx(round(rights), abs=1e-3) and 0 <= half < 0.5
    first = {way: found["accuracy"][way]["1"] for way in WAYS if way != "nothing"}
    assert len(set(map(tuple, first.values()))) == 1 and found["merged - in a row"]["1"] == [0, 0]
    assert len({tuple(found["accuracy"]["nothing"][str(m)]) for m in GROUPS}) == 1
    layer, other = found["chain errors"]
    assert layer < 1e-5 < other  # float32 in the first layer
    assert json.loads(json.dumps(result)) == result and result["queries"] == 16


def test_the_right_name_is_that_of_the_class_which_the_text_is_taken_for():
    """Told by a model that takes a text with b in it for class 'yy', and calls 'x' B and 'yy' D."""
    tokenizer = Words()
    asked = prompting.Questions.of(tokenizer, ["a", "long b"], ["x", "yy"])
    assert asked.begin.tolist() == [4, 4, 9, 9] and asked.lengths.tolist() == [6, 7, 11, 12]

    class Oracle:
        def hidden(self, ids, state, lengths):
            assert torch.equal(lengths, asked.lengths) and ids.shape == (4, 12)
            x = torch.zeros(4, 12, 261)
            for row, words in enumerate(["a -> x", "a -> yy", "long b -> x", "long b -> yy"]):
                assert ids[row].tolist() == [ord(c) for c in words] + [0] * (12 - len(words))
                begin = words.index(">") + 1
                x[row, begin, ord("y" if "b" in words else "x")] = 9  # after the blank: which class
                x[row, len(words) - 1, 260 if words.endswith("y") else 258] = 9
            return x, state

        def head(self, x):
            return x

    memory = type("M", (), {"state": build(retnet(dim=16, layers=1, heads=2)).init_state(1)})
    assert prompting.score(Oracle(), memory, asked, torch.tensor([1, 3])) == 1
    assert prompting.score(Oracle(), memory, asked, torch.tensor([3, 3])) == 0.5


def test_the_interval_of_a_mean():
    mean, half = prompting.interval([0.0, 1.0, 0.0, 1.0])
    assert mean == 0.5 and half == pytest.approx(1.959964 * (1 / 3) ** 0.5 / 2, abs=1e-5)
    assert prompting.interval([0.25]) == [0.25, 0]


def test_the_table_and_the_plot_show_what_was_measured(result, tmp_path, lines):
    table = prompting.table(result).splitlines()
    assert table[0] == "letters" and len(table) == 4 + len(GROUPS)
    mean, half = result["sets"]["letters"]["accuracy"]["merged"]["4"]
    assert f"{100 * mean:.1f} ± {100 * half:.1f}" in table[-1]
    prompting.plot(result, tmp_path / "a.png", title="t")
    assert set(lines) == set(WAYS)
    found = result["sets"]["letters"]["accuracy"]
    assert all(lines[w] == [(list(GROUPS), [found[w][str(m)][0] for m in GROUPS])] for w in WAYS)
