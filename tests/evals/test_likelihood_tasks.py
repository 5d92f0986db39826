"""Evaluations of models with known answers, right, wrong and at chance; numbers by hand."""

import json
import math
import random

import pytest
import torch

from retentive.evals.likelihood_tasks import score_likelihood_tasks
from retentive.evals.run import table
from retentive.models import LanguageModel, build, retnet, twin


@pytest.fixture
def write(tmp_path):
    """`write(name, rows)` writes a task's file and returns its folder."""

    def put(name, rows):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return tmp_path

    return put


def values(rows) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows}


def piqa(good: str, bad: str, label: int) -> dict:
    return {"goal": "g", "sol1": bad if label else good, "sol2": good if label else bad, "label": label}


def test_a_model_that_knows_the_letters_is_right_and_its_contrary_wrong(bigram, tokenizer, write):
    """x follows x; the right choices consist of x, the wrong ones of y."""
    table = torch.zeros(257, 257)
    table[:, ord("x")] = 5.0
    folder = write("piqa", [piqa("xxx", "yyy", n % 2) for n in range(10)])
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        rows, records = score_likelihood_tasks(bigram(sign * table), tokenizer, ["piqa"], folder)
        assert values(rows) == {"acc": expected, "acc_norm": expected, "acc_bytes": expected}
        assert [r["line"] for r in records] == list(range(1, 11)) and all(r["acc"] == expected for r in records)


def test_a_model_that_knows_nothing_answers_by_length(bigram, tokenizer, write):
    """Each token has probability 1/257, so the shortest choice is the likeliest. Per character or byte it is the choice
    that gains most from the space before it, again the shortest; per byte é counts twice."""
    rows = [piqa("bb", "cccc", 0), piqa("bbbb", "cc", 0), piqa("bbbb", "éé", 1), piqa("bbb", "éé", 0)]
    found, records = score_likelihood_tasks(bigram(torch.zeros(257, 257)), tokenizer, ["piqa"], write("piqa", rows))
    nat = math.log(257)
    assert records[0]["logprobs"] == pytest.approx([-3 * nat, -5 * nat])
    assert [r["acc"] for r in records] == [True, False, False, True]  # tokens 3 5, 5 3, 5 5 (a tie), 4 5
    # per character 3/2 5/4, 5/4 3/2, 5/2 5/4 (éé bbbb), 4/3 5/2; per byte 3/2 5/4, 5/4 3/2, a tie, 4/3 5/4
    assert [r["acc_norm"] for r in records] == [False, True, True, True]
    assert [r["acc_bytes"] for r in records] == [False, True, False, False]
    assert values(found) == {"acc": 0.5, "acc_norm": 0.75, "acc_bytes": 0.25}


def test_random_weights_are_at_chance(tokenizer, write):
    """300 questions with choices drawn alike: within four standard errors of 1/2."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(600)]
    rows = [piqa(a, b, n % 2) for n, (a, b) in enumerate(zip(words[::2], words[1::2], strict=True))]
    model = build(retnet(vocab_size=257, dim=32, layers=1, heads=2))
    (acc, *_), _ = score_likelihood_tasks(model, tokenizer, ["piqa"], write("piqa", rows))
    assert abs(acc["value"] - 0.5) < 4 * 0.5 / math.sqrt(300)
    low, high = acc["interval"]
    assert low < acc["value"] < high


@pytest.mark.parametrize("kind", ["RetNet", "Transformer"])
def test_a_model_that_has_learnt_the_answers_knows_them(kind, tokenizer, write):
    """The answer depends on the subject at the start of the question, so it must pass through the copied state."""
    names = ["Ann", "Bob", "Cyd", "Dan"]
    rows = [{"goal": f"{name} likes", "sol1": "red", "sol2": "tea", "label": n % 2} for n, name in enumerate(names)]
    texts = [f"Question: {r['goal']}\nAnswer: {r['sol2'] if r['label'] else r['sol1']}" for r in rows]
    ids = torch.tensor([[256, *tokenizer.encode(text)] for text in texts])
    config = retnet(vocab_size=257, dim=32, layers=2, heads=2, decay="paper")
    model = build(config if kind == "RetNet" else twin(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        logits, _ = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lambada = [{"text": text} for text in texts]
    write("piqa", rows)
    found, _ = score_likelihood_tasks(model, tokenizer, ["piqa", "lambada_openai"], write("lambada_openai", lambada))
    assert [row["value"] for row in found[:4]] == [1.0] * 4  # the fourth: LAMBADA's accuracy
    assert 1 <= found[4]["value"] < 1.1  # its perplexity


def test_perplexities_by_hand(bigram, tokenizer, write):
    """Each token has probability 1/257: 8.0056 bits per byte, 257 per byte, and per word its bytes and spaces."""
    folder = write("perplexity", [{"text": "ab cd ef"}, {"text": "a" * 30}])
    model = bigram(torch.zeros(257, 257))
    found, records = score_likelihood_tasks(model, tokenizer, ["perplexity"], folder, text_window=7)
    nats = 38 * math.log(257)
    assert sum(-r["logprob"] for r in records) == pytest.approx(nats)
    got = values(found)
    for suffix in ("", "_windowed"):
        assert got["bits_per_byte" + suffix] == pytest.approx(math.log2(257))
        assert got["byte_perplexity" + suffix] == pytest.approx(257)
        assert got["word_perplexity" + suffix] == pytest.approx(math.exp(nats / 4))


def test_uncut_knows_what_windows_do_not(tokenizer, write):
    """A text that repeats itself, read by a model that looks far back; the model's own call gives the uncut sum."""
    text = "the cat sat on the mat. " * 4
    model = LanguageModel(retnet(vocab_size=257, dim=32, layers=1, heads=2)).double().eval()
    _, (record,) = score_likelihood_tasks(
        model, tokenizer, ["perplexity"], write("perplexity", [{"text": text}]), text_window=16
    )
    ids = torch.tensor([[256, *tokenizer.encode(text)]])
    with torch.no_grad():
        logp = model(ids[:, :-1])[0].log_softmax(-1).gather(2, ids[:, 1:, None]).sum()
    assert record["logprob"] == pytest.approx(float(logp), rel=1e-10)
    assert record["windowed_logprob"] != pytest.approx(float(logp), rel=1e-6)


REFUSED = {
    "shots": ({"shots": -1}, "`shots=-1`: must be at least 0"),
    "limit": ({"limit": 0}, "`limit=0`: must be at least 1"),
    "max-length": ({"max_length": 1}, "`max_length=1`: must be at least 2"),
    "window": ({"text_window": 1}, "`text_window=1`: must be at least 2"),
    "long": ({"max_length": 20}, "piqa.jsonl line 1: its question has 24 tokens; raise `max_length=20`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_asked(case, bigram, tokenizer, write, refuses):
    how, words = REFUSED[case]
    told = []
    with refuses(words):
        folder = write("piqa", [piqa("xxx", "yyy", 0)])
        score_likelihood_tasks(
            bigram(torch.zeros(257, 257)), tokenizer, ["piqa"], folder, progress=lambda *a: told.append(a), **how
        )
    assert told == []


def test_the_table(bigram, tokenizer, write):
    folder = write("piqa", [piqa("xxx", "yyy", 0)] * 3)
    rows, _ = score_likelihood_tasks(bigram(torch.zeros(257, 257)), tokenizer, ["piqa"], folder, shots=0, limit=2)
    lines = table(rows).splitlines()
    assert lines[2] == "| piqa | 0 | 2 | acc | 1 | 0.3424 to 1 |" and len(lines) == 5
