"""Few-shot tasks: what is asked was never shown; with one group all ways of remembering are the same one."""

import json
import re
from collections import defaultdict

import pytest
import torch

from retentive.bench import memory_file
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import RetNetConfig, build
from retentive.studies import prompting
from retentive.studies.prompting import NAMES, WAYS, Texts

GROUPS = (1, 2, 4)


def classes(count: int, sources: int) -> prompting.Classes:
    found = defaultdict(lambda: defaultdict(list))
    for c in range(count):
        for s in range(sources):
            prompting.add(found, f"class {c}", f"{c} source {s}", [f"one two {c} {s} {n}" for n in range(2)])
    return found


class Words(ByteTokenizer):
    """Bytes, but " A" to " D" are one token, as in a vocabulary that was learnt."""

    vocab_size = 261

    def encode(self, text: str) -> list[int]:
        for n, name in enumerate(NAMES):
            text = re.sub(rf" {name}(?=\n|$)", chr(0xE000 + n), text)
        return [257 + ord(c) - 0xE000 if ord(c) >= 0xE000 else ord(c) for c in text]


def test_texts_are_short_new_and_kept_by_source():
    found = classes(0, 0)
    prompting.add(found, "c", "s", ["a b c", "a b c d", "a  b\nc d", " ".join("abcdefghijklmnop")])
    assert found["c"]["s"] == ["a b c d", "a b c d e f"]


@pytest.mark.parametrize("new", [False, True])
def test_what_is_asked_was_never_shown(new):
    found = classes(20, 100)
    found["small"] = {"x": ["one two three four"]}
    train, known, unseen = prompting.split(found, new=new)
    assert set(known.asked) | set(unseen.asked) == set(found) - {"small"}
    assert set(known.asked) <= set(train) and not set(unseen.asked) & set(train)
    assert bool(unseen.asked) == new
    for texts in (known, unseen):
        for label, asked in texts.asked.items():
            assert len(asked) >= prompting.ASKED and len(texts.shown[label]) >= prompting.SHOWN
            assert not set(asked) & set(texts.shown[label]) and not set(asked) & set(train.get(label, ()))


def test_tasks_name_classes_anew_and_are_the_same_for_a_seed():
    texts = {f"class {c}": [f"text of {c} number {n}" for n in range(9)] for c in range(6)}
    tasks = list(prompting.tasks([texts], 30, seed=3))
    assert tasks == list(prompting.tasks([texts], 30, seed=3)) != list(prompting.tasks([texts], 30, seed=4))
    namings = set()
    for task in tasks:
        lines = task.text.splitlines()
        assert len(lines) == prompting.EPISODE
        assert all(line.split(" -> ")[1].split(" ")[1] == line.split()[2] for line in lines)
        pairs = {(line.split()[2], line[-1]) for line in lines}
        assert len(pairs) == len({c for c, _ in pairs}) == len({n for _, n in pairs}) in (2, 3, 4)
        namings.add(frozenset(pairs))
    assert len(namings) > 20


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
    config = RetNetConfig(vocab_size=261, dim=32, layers=1, heads=2, decay=prompting.decays(2))
    assert config.decay[0] == -1 and -0.01 < config.decay[1] < 0
    texts, said = {"x": ["a b c d"], "y": ["e f g h"], "z": ["i j k l"], "w": ["m n o p"]}, []
    how = dict(steps=100, batch=1, lr=1e-2, say=said.append)
    model = prompting.learn(config, Words(), [texts], **how)
    losses = [float(line.split()[-1]) for line in said]
    assert losses[1] < losses[0] < 4
    again = prompting.learn(config, Words(), [texts], **how)
    assert not model.training and torch.equal(again.head.weight, model.head.weight)


@pytest.fixture
def result():
    model = build(RetNetConfig(vocab_size=261, dim=32, layers=2, heads=2)).eval()
    texts = Texts(*({f"c{c}": [f"{c} {w} {n}" for n in range(30)] for c in range(5)} for w in ("shown", "asked")))
    return prompting.measure(model, Words(), {"letters": texts}, groups=GROUPS, episodes=6, queries=4)


def test_one_group_is_remembered_the_same_way_by_all(result):
    found = result["sets"]["letters"]
    for m in GROUPS:
        for way in WAYS:
            mean, half = found["accuracy"][way][str(m)]
            assert 0 <= mean <= 1 and half >= 0
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

    memory = type("M", (), {"state": build(RetNetConfig(dim=16, layers=1, heads=2)).init_state(1)})
    assert prompting.score(Oracle(), memory, asked, torch.tensor([1, 3])) == 1
    assert prompting.score(Oracle(), memory, asked, torch.tensor([3, 3])) == 0.5


def test_the_interval_of_a_mean():
    mean, half = prompting.interval([0.0, 1.0, 0.0, 1.0])
    assert mean == 0.5 and half == pytest.approx(1.96 * (1 / 3) ** 0.5 / 2, abs=1e-5)
    assert prompting.interval([0.25]) == [0.25, 0]


def test_the_table_and_the_plot_show_what_was_measured(result, tmp_path, lines):
    table = prompting.table(result).splitlines()
    assert table[0] == "letters" and len(table) == 4 + len(GROUPS)
    mean, half = result["sets"]["letters"]["accuracy"]["merged"]["4"]
    assert f"{100 * mean:.1f} ± {100 * half:.1f}" in table[-1]
    prompting.plot(result, tmp_path / "a.png", title="t")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert set(lines) == set(WAYS)
    found = result["sets"]["letters"]["accuracy"]
    assert all(lines[w] == [(list(GROUPS), [found[w][str(m)][0] for m in GROUPS])] for w in WAYS)


def test_asking_is_measured_in_turns_on_files_of_one_size():
    model = build(RetNetConfig(vocab_size=31, dim=16, layers=2, heads=2)).eval()
    said = []
    result = memory_file.measure(model, lengths=(10, 5000), repeats=3, say=said.append)
    small, large = result["rows"]
    assert small["file_bytes"] == large["file_bytes"] and small["state_bytes"] == large["state_bytes"]
    assert result["file_ratio"] == 1 and result["time_ratio"] == large["median"] / small["median"] > 0
    assert all(len(row["milliseconds"]) == 3 and min(row["milliseconds"]) > 0 for row in result["rows"])
    assert len(said) == 2 and said[-1].startswith("read 5,000 tokens in ")
    assert len(memory_file.table(result).splitlines()) == 4 and json.dumps(result)


@pytest.mark.parametrize("how", [dict(lengths=()), dict(lengths=(0,)), dict(repeats=0)])
def test_lengths_and_repeats_below_one_are_refused(how, refuses):
    with refuses("must be at least 1"):
        memory_file.measure(build(RetNetConfig(dim=16, layers=1, heads=2)), **how)


def test_sentences_are_cut_at_their_ends():
    assert prompting.sentences("One two. Three? Four! Five", 3) == ["One two.", "Three?", "Four!"]
