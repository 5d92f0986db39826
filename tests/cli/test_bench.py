"""`retentive bench` and `python -m benchmarks`: the file and the picture that they keep, bad options in a line."""

import importlib
import json
import signal
from types import SimpleNamespace

import pytest

import benchmarks
from benchmarks.__main__ import run as program
from retentive.bench import BENCHES, prefill
from retentive.cli import bench, main
from retentive.models import PRESETS
from retentive.models.presets import Size
from retentive.train import Interrupted

PREFILL = ["bench", "prefill", "--lengths", "8", "--device", "cpu"]
HARDWARE = {"cpu": "a CPU", "threads": 2, "gpu": "a GPU"}


@pytest.mark.parametrize("path", [*BENCHES.values(), *benchmarks.BENCHES.values()])
def test_every_bench_has_the_one_shape(path):
    module = importlib.import_module(path)
    assert all(callable(getattr(module, part)) for part in ("Options", "measure", "table"))
    assert module.PICTURE is None or callable(module.plot)


@pytest.fixture
def made_up(monkeypatch):
    """A bench that measures nothing, whose plot writes its title; `made_up(**result)` changes its result."""

    def make(**changes):
        def measure(options, say):
            say(f"lengths {options.lengths}")
            return {"size": options.size, "hardware": HARDWARE, "device": "cpu", **changes}

        monkeypatch.setattr(prefill, "measure", measure)
        monkeypatch.setattr(prefill, "table", lambda result: f"a table of {result['device']}")
        monkeypatch.setattr(prefill, "plot", lambda result, path, *, title: path.write_text(title, encoding="utf-8"))

    return make


def test_the_file_holds_the_command_and_the_picture_is_beside_it(made_up, tmp_path, capsys):
    made_up()
    out = tmp_path / "results" / "prefill.json"
    main([*PREFILL, "--json", str(out)])
    assert capsys.readouterr() == ("a table of cpu\n", "lengths (8,)\n")
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result == {
        "command": f"retentive bench prefill --lengths 8 --device cpu --json {out}",
        "size": "5m",
        "hardware": HARDWARE,
        "device": "cpu",
        "table": "a table of cpu",
    }
    assert out.with_suffix(".png").read_text(encoding="utf-8") == "Reading a prompt (5m) on a CPU, 2 threads"
    assert sorted(path.name for path in out.parent.iterdir()) == ["prefill.json", "prefill.png"]
    made_up(device="cuda")
    main([*PREFILL, "--json", str(out)])
    assert out.with_suffix(".png").read_text(encoding="utf-8") == "Reading a prompt (5m) on a GPU"


def test_what_found_something_wrong_is_kept_and_ends_with_2(made_up, tmp_path, capsys):
    made_up(ok=False)
    with pytest.raises(SystemExit) as stop:
        main([*PREFILL, "--json", str(tmp_path / "a.json")])
    shown = capsys.readouterr()
    assert stop.value.code == 2 and "retentive: the prefill found what must not be: see above" in shown.err
    assert shown.out == "a table of cpu\n" and (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("raised", "words"),
    [(KeyboardInterrupt(), ""), (Interrupted("stopped at step 3 of 4", signal.SIGINT), "the same command goes on")],
    ids=["of a bench that measures", "of one that trains"],
)
def test_an_interrupt_leaves_nothing(raised, words, monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise raised

    monkeypatch.setattr(prefill, "measure", interrupted)
    with pytest.raises(SystemExit) as stop:
        main([*PREFILL, "--json", str(tmp_path / "new" / "x.json")])
    said = capsys.readouterr().err
    assert stop.value.code == 130 and not list(tmp_path.iterdir()) and words in said and said.count("\n") == 1


def test_a_picture_that_fails_leaves_the_file_alone(made_up, monkeypatch, tmp_path, capsys):
    made_up()

    def failing(result, path, *, title):
        path.write_text("half", encoding="utf-8")
        raise ModuleNotFoundError("plots need an extra")

    monkeypatch.setattr(prefill, "plot", failing)
    with pytest.raises(SystemExit):
        main([*PREFILL, "--json", str(tmp_path / "a.json")])
    assert "plots need an extra" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["a.json"]


BAD = {
    "unknown": (["speed"], "unknown bench 'speed', expected one of train, prefill, decode, serving"),
    "device": (["decode", "--device", "tpu"], "unknown device 'tpu'"),
    "size": (["train", "--size", "3m"], "unknown size '3m'"),
}
BENCHMARKS = {
    "unknown": (["train"], "unknown bench 'train', expected one of memory, run"),
    "shape": (["retention", "--shapes", "big"], "unknown shape 'big', expected one of 5m, small"),
    "minutes": (["soak", "--minutes", "0"], "minutes must be above 0, got 0"),
}


@pytest.mark.parametrize(("case", "cases"), [*((c, BAD) for c in BAD), *((c, BENCHMARKS) for c in BENCHMARKS)])
def test_bad_options_are_told_in_a_line(case, cases, tmp_path, capsys):
    options, words = cases[case]
    options = [*options, *([] if case == "unknown" else ["--json", str(tmp_path / "new" / "x.json")])]
    with pytest.raises(SystemExit) as stop:
        main(["bench", *options]) if cases is BAD else main(options, program)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and words in line
    assert not list(tmp_path.iterdir())


def test_a_bench_without_a_picture_keeps_its_file_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, "tiny", Size(dict(dim=16, layers=1, heads=2)))
    argv = ["ask", "--size", "tiny", "--vocab-size", "31", "--lengths", "9", "--repeats", "1"]
    main([*argv, "--json", str(tmp_path / "ask.json")], program)
    command = json.loads((tmp_path / "ask.json").read_text(encoding="utf-8"))["command"]
    assert command.startswith("python -m benchmarks ask --size tiny")
    assert capsys.readouterr().out.startswith("| tokens read |")
    assert [p.name for p in tmp_path.iterdir()] == ["ask.json"]


def test_json_is_asked_for_with_what_it_makes():
    texts = {}
    for picture in ("A title", None):
        module = SimpleNamespace(PICTURE=picture, Options=prefill.Options)
        (field,) = (f for f in bench.command_of(module).__dataclass_fields__.values() if f.name == "json")
        texts[picture] = str(field.type)
    assert "a picture is written beside it" in texts["A title"] and "a picture" not in texts[None]
