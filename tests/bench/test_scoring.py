"""The bench of scoring: what it runs, what it counts, and that ways which disagree are not counted."""

import json
from pathlib import Path

import pytest

from retentive.bench import scoring
from retentive.bench.scoring import Contest
from retentive.checkpoint import save_model
from retentive.cli import main
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import RetNetConfig, build


def test_ways_take_turns_and_the_first_turn_is_not_counted():
    called = []

    def way(name):
        return lambda: called.append(name) or [-3.0, -0.5]

    result = scoring.measure({"x": Contest(2, way("once"), way("whole"), 10, 25)}, repeats=2)
    assert called == ["whole", "once", "once", "whole", "whole", "once"]
    (row,) = result["rows"]
    assert row["token_ratio"] == 2.5 and row["questions"] == 2 and row["largest_difference"] == 0
    assert scoring.table(result).splitlines()[2].startswith("| x | 2 | ")


@pytest.mark.parametrize("other", [-3.001, float("nan")])
def test_ways_that_disagree_are_not_counted(other, refuses):
    with refuses("x: log-likelihoods differ by", ArithmeticError):
        scoring.measure({"x": Contest(1, lambda: [other], lambda: [-3.0], 1, 1)}, repeats=1)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model("run", build(RetNetConfig(vocab_size=257, dim=32, layers=1, heads=2)), ByteTokenizer())
    rows = [{"goal": f"a goal number {n}", "sol1": "do it", "sol2": "do not do it", "label": n % 2} for n in range(6)]
    Path("piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    argv = ["bench", "scoring", "run", "--data", ".", "--task", "piqa", "--shots", "0", "3", "--repeats", "1"]
    main([*argv, "--json", "r.json"])
    result = json.loads(Path("r.json").read_text(encoding="utf-8"))
    zero, three = result["rows"]
    # the end of text and "Question: a goal number 0\nAnswer:"; " do it" and " do not do it", less a byte
    context, choices = 34, (6, 13)
    assert zero["token_ratio"] == (2 * (context - 1) + sum(choices)) / (context - 1 + sum(choices))
    assert three["token_ratio"] > zero["token_ratio"] and three["questions"] == 6
    assert capsys.readouterr().out.count("|") == 4 * 7
