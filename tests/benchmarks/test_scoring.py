"""`bench scoring`: its runs, its counts, and an error if the two ways disagree."""

import json

import pytest

from benchmarks import scoring
from benchmarks.scoring import Options
from retentive.checkpoint import save_model
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import build, retnet


def test_ways_take_turns_after_the_gate_and_the_first_turn_is_not_counted():
    called = []

    def way(name):
        return lambda: called.append(name) or [-3.0, -0.5]

    found = scoring.compared("x", {"once": way("once"), "whole": way("whole")}, 2)
    assert called == ["once", "whole"] * 4 and found["largest_difference"] == 0 and found["ratio"] > 0


@pytest.mark.parametrize("other", [-3.001, float("nan")])
def test_ways_that_disagree_are_not_counted(other, refuses):
    with refuses("x: log-likelihoods differ by", ArithmeticError):
        scoring.compared("x", {"once": lambda: [-1.0, other], "whole": lambda: [-1.0, -3.0]}, 1)


def test_tokens_are_those_that_either_way_reads(tmp_path, refuses):
    save_model(tmp_path / "run", build(retnet(vocab_size=257, dim=32, layers=1, heads=2)), ByteTokenizer())
    rows = [{"goal": f"a goal number {n}", "sol1": "do it", "sol2": "do not do it", "label": n % 2} for n in range(6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "piqa.jsonl").write_text(lines, encoding="utf-8")
    said = []
    options = Options(str(tmp_path / "run"), tmp_path, task="piqa", shots=(0, 3), repeats=1)
    result = scoring.measure(options, said.append)
    zero, three = result["rows"]
    # the end of text and "Question: a goal number 0\nAnswer:"; " do it" and " do not do it", less a byte
    context, choices = 34, (6, 13)
    assert zero["token_ratio"] == (2 * (context - 1) + sum(choices)) / (context - 1 + sum(choices))
    assert three["token_ratio"] > zero["token_ratio"] and three["questions"] == 6
    assert result["model"] == "RetNet" and len(said) == 2 and json.loads(json.dumps(result)) == result
    assert scoring.table(result).splitlines()[2].startswith("| piqa, 0 shots | 6 | ")
    with refuses("task lambada_openai has no choices"):
        scoring.measure(Options(str(tmp_path / "run"), tmp_path, task="lambada_openai"))
