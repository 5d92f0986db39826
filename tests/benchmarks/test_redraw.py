"""`benchmarks redraw`: renews the table from the numbers and the picture if there was one, nothing else."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.__main__ import run
from benchmarks.redraw import ALL
from retentive.bench import prefill
from retentive.bench.run import title_of
from retentive.compare import title_of as title_of_comparison
from retentive.report.page import read

RESULTS = sorted((Path(__file__).parents[2] / "results").glob("*.json"))

HARDWARE = {"cpu": "a CPU", "threads": 2, "gpu": "none"}
RATE = {"seconds": 1.0, "tokens_per_second": 8.0, "fraction": 0.5}
PREFILL = {
    "command": "retentive bench prefill --size 5m",
    "hardware": HARDWARE,
    "size": "5m",
    "parameters": {"retnet": 10},
    "rows": [{"length": 8, "models": {"retnet": RATE}}],
}


def write(path, result):
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def test_tables_and_pictures_that_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prefill, "plot", lambda result, path, *, title: path.write_text(title, encoding="utf-8"))
    with_picture = write(tmp_path / "a.json", PREFILL | {"table": "of old"})
    (tmp_path / "a.png").write_text("of old", encoding="utf-8")
    without = write(tmp_path / "b.json", PREFILL)
    other = write(tmp_path / "c.json", {"command": "retentive eval run", "results": []})
    before = other.read_bytes()
    run(["redraw", *map(str, (with_picture, without, other))])
    assert capsys.readouterr().out == f"{with_picture}\n{without}\n"
    for path in (with_picture, without):
        assert json.loads(path.read_text(encoding="utf-8")) == PREFILL | {"table": prefill.table(PREFILL)}
    assert (tmp_path / "a.png").read_text(encoding="utf-8") == "Reading a prompt (5m) on a CPU, 2 threads"
    assert other.read_bytes() == before and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_shown_as_their_benches_show_them(path):
    file = read(path)
    verb, _, name = file.kind.partition(" ")
    if verb == "bench":
        bench = importlib.import_module(ALL[name])
        assert file.table == bench.table(file.result), "run: python -m benchmarks redraw results/*.json"
        assert bench.PICTURE is None or title_of(bench, file.result)
    elif verb == "compare":
        assert title_of_comparison(file.result)
