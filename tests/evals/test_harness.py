"""Answers to lm-eval's requests, without lm-eval: groups, texts, generation; and refusals."""

import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch

from retentive.evals.harness import _rows, likelihoods, rolling, run_tasks, write
from retentive.evals.likelihood import encode, score


@dataclass
class Asked:
    """The used part of lm-eval's Instance."""

    args: tuple[Any, ...]
    task_name: str | None = None
    doc_id: int | None = None


def test_requests_are_answered_in_their_order(model, tokenizer):
    """With and without the question that each belongs to."""
    pairs = [("a b", " c"), ("x", " yy"), ("a b", " dd"), ("", "e"), ("x", " z"), ("a b ", "c")]
    expected = [score(model, [[encode(tokenizer, *pair)]])[0][0].logprob for pair in pairs]
    plain = [Asked(pair) for pair in pairs]
    named = [Asked(pair, "t", n % 2) for n, pair in enumerate(pairs)]
    for requests in (plain, named):
        assert [s.logprob for s in likelihoods(model, tokenizer, requests)] == pytest.approx(expected, rel=1e-10)


def test_texts_uncut_and_in_windows(bigram, tokenizer):
    table = torch.randn(257, 257)
    text = "abcdefgh" * 3
    ids = [256, *tokenizer.encode(text)]
    expected = sum(float(table.double().log_softmax(-1)[a, b]) for a, b in pairwise(ids))
    model = bigram(table)
    for window in (None, 2, 7, 24, 100):  # a bigram ignores everything before the last token
        assert rolling(model, tokenizer, text, window) == pytest.approx(expected, rel=1e-6)  # a float32 table
    assert rolling(model, tokenizer, "") == 0


@pytest.fixture
def alphabet(bigram):
    """After each letter comes the next one, after z the end of the text."""
    table = torch.zeros(257, 257)
    for a, b in zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz", strict=True):
        table[ord(a), ord(b)] = 20
    table[ord("z"), 256] = 20
    return bigram(table)


GENERATING = {
    "limit": ({"max_gen_toks": 4}, "bcde"),
    "string": ({"until": "fg"}, "bcde"),
    "first-of-strings": ({"until": ["xyz", "gh"]}, "bcdef"),
    "end-of-text": ({"until": []}, "bcdefghijklmnopqrstuvwxyz"),
    "greedy-in-spite-of-a-temperature": ({"do_sample": False, "temperature": 90.0, "max_gen_toks": 2}, "bc"),
    "sampled": ({"do_sample": True, "temperature": 0.1, "top_p": 0.9, "top_k": 3, "max_gen_toks": 3}, "bcd"),
}


@pytest.mark.parametrize("case", GENERATING)
def test_generation(case, alphabet, tokenizer):
    options, expected = GENERATING[case]
    assert write(alphabet, tokenizer, "a", options) == expected


def test_an_option_of_generation_that_is_not_known(alphabet, tokenizer, refuses):
    with refuses("generation option 'num_beams' is not known, expected some of until, max_gen_toks"):
        write(alphabet, tokenizer, "a", {"num_beams": 4})


def test_without_lm_eval(alphabet, tokenizer, monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with refuses("pip install 'retentive[eval]'", ImportError):
        run_tasks(alphabet, tokenizer, ["piqa"], None)


def test_intervals_of_shares_lie_between_0_and_1():
    """The normal interval of three right out of five reaches 1.08, that of one right -0.19."""
    results = {"acc,none": 0.6, "acc_stderr,none": 0.245, "acc_norm,none": 0.2, "acc_norm_stderr,none": 0.2}
    results |= {"perplexity,none": 5.0, "perplexity_stderr,none": 1.0, "mcc,none": -0.2, "mcc_stderr,none": 0.1}
    rows = _rows({"results": {"t": results}, "n-samples": {"t": {"effective": 5}}}, 0)
    low_high = {row["metric"]: row["interval"] for row in rows}
    assert low_high["acc"] == (pytest.approx(0.6 - 1.96 * 0.245, abs=1e-3), 1.0)
    assert low_high["acc_norm"] == (0.0, pytest.approx(0.2 + 1.96 * 0.2, abs=1e-3))
    assert low_high["perplexity"][1] > 6 and low_high["mcc"][0] < -0.3
