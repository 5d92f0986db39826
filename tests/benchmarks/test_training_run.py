"""The report of a training run against hand-made metrics, and its yardsticks against what is known of the text."""

import json
from pathlib import Path

import pytest

from benchmarks import training_run
from benchmarks.training_run import Options
from retentive.data.pack import pack
from retentive.data.packed import Packed
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer

HELD_OUT = "abcdefgh" * 100  # 3 bits a byte by their frequencies, next to nothing by their order


@pytest.fixture
def data(tmp_path) -> Path:
    pack(tmp_path / "data", ByteTokenizer(), [Document("a", "text")], [Document("b", HELD_OUT), Document("c", "é")])
    return tmp_path / "data"


def step(n: int) -> dict:
    return {"step": n, "loss": 4.0 / n, "tokens_per_second": 100.0 + n}


def evaluation(n: int, bits: float) -> dict:
    return {"step": n, "bits_per_byte": bits, "held_out_loss": 1.0, "bytes": 50}


FINAL = {"step": 3, "final_bits_per_byte": 2.25, "held_out_loss": 1.0, "bytes": 802}
LINES = [step(1), step(2), evaluation(2, 2.5), {"step": 2, "sample": "some é"}, step(3), evaluation(3, 2.0), FINAL]


@pytest.fixture
def made(tmp_path):
    """`made(lines)`: the folder of a run of two batches a step, 4 x 8 tokens each, that wrote those metrics."""

    def make(lines) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        options = {"train": {"accumulate": 2}, "command": {"batch": 4, "length": 8}}
        (folder / "train.json").write_text(json.dumps(options), encoding="utf-8")
        text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        return folder

    return make


def test_the_report_is_the_metrics_against_tokens(made, data):
    result = training_run.report(made(LINES), Packed(data))
    assert json.loads(json.dumps(result)) == result
    assert (result["tokens"], result["tokens_per_second"]) == (3 * 64, 102.0)
    assert result["train_loss"] == [[64, 4.0], [128, 2.0], [192, pytest.approx(4 / 3)]]
    assert result["held_out"] == [[128, 2.5], [192, 2.0]] and result["final"] == [802, 2.25]
    assert result["samples"] == {"2": "some é"} and result["hardware"]["cores"] >= 1


def test_long_runs_are_thinned_to_means(made, data):
    result = training_run.report(made([*map(step, range(1, 1001)), FINAL]), Packed(data))
    points = result["train_loss"]
    assert len(points) == 200 and points[-1][0] == 1000 * 64
    assert points[0][1] == pytest.approx(sum(4.0 / n for n in range(1, 6)) / 5)


UNFINISHED = {
    "no-steps": [],
    "no-last-evaluation": LINES[:-1],
    "nothing-held-out": [step(1), step(2)],
    "a-line-half-written": [*LINES[:3], '{"step": 3, "lo'],
}


@pytest.mark.parametrize("case", UNFINISHED)
def test_a_run_that_is_not_finished_is_refused(case, made, data):
    with pytest.raises(ValueError, match=r"^[^\n]*run[^\n]*$"):
        training_run.report(made(UNFINISHED[case]), Packed(data))


def test_the_plot_and_the_table_show_the_report(made, data, tmp_path, lines):
    result = training_run.report(made(LINES), Packed(data))
    result["yardsticks"] = {"order-0 entropy": 3.0, "xz -9": 1.25, "bytes": 802}
    training_run.plot(result, tmp_path / "run.png", title="a run")
    million = [n / 1e6 for n in (64, 128, 192)]
    assert lines == {"this model": [(million, [4.0, 2.0, pytest.approx(4 / 3)]), (million[1:], [2.5, 2.0])]}
    rows = [line.split(" | ") for line in training_run.table(result).splitlines()[2:]]
    assert rows == [["| order-0 entropy", "3.000 |"], ["| xz -9", "1.250 |"], ["| this model", "2.250 |"]]


def test_a_run_is_measured_by_its_folders(made, data):
    result = training_run.measure(Options(made(LINES), data))
    assert result["final"] == [802, 2.25] and result["yardsticks"]["bytes"] == 802


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"command": {"batch": 2}}'])
def test_a_run_whose_options_are_damaged_is_refused(content, made, data, refuses):
    run = made(LINES)
    (run / "train.json").write_text(content, encoding="utf-8")
    with refuses("train.json does not say how the run was made"):
        training_run.report(run, Packed(data))
