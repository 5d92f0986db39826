"""`retentive bench`: one verb for every bench; the file and the picture it keeps, bad options in a line."""

import importlib
import json
import signal
from types import SimpleNamespace

import pytest

from retentive.bench import BENCHES, decode, memory, step
from retentive.cli import bench, main
from retentive.models import PRESETS
from retentive.models.config import Size
from retentive.train import Interrupted

STEP = ["bench", "step", "--shapes", "small", "--device", "cpu"]
HARDWARE = {"cpu": "a CPU", "threads": 2, "gpu": "a GPU"}


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_has_the_one_shape(name):
    module = importlib.import_module(BENCHES[name])
    assert all(callable(getattr(module, part)) for part in ("Options", "measure", "table"))
    assert module.PICTURE is None or callable(module.plot)


@pytest.fixture
def made_up(monkeypatch):
    """A bench that measures nothing, whose plot writes its title; `made_up(**result)` changes its result."""

    def make(**changes):
        def measure(options, say):
            say(f"shapes {options.shapes}")
            return {"hardware": HARDWARE, "device": "cpu", **changes}

        monkeypatch.setattr(step, "measure", measure)
        monkeypatch.setattr(step, "table", lambda result: f"a table of {result['device']}")
        monkeypatch.setattr(step, "plot", lambda result, path, *, title: path.write_text(title, encoding="utf-8"))

    return make


def test_the_file_holds_the_command_and_the_picture_is_beside_it(made_up, tmp_path, capsys):
    made_up()
    out = tmp_path / "results" / "step.json"
    main([*STEP, "--json", str(out)])
    assert capsys.readouterr() == ("a table of cpu\n", "shapes ('small',)\n")
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result == {
        "command": f"retentive bench step --shapes small --device cpu --json {out}",
        "hardware": HARDWARE,
        "device": "cpu",
        "table": "a table of cpu",
    }
    assert out.with_suffix(".png").read_text(encoding="utf-8") == "A decoding step on a CPU, 2 threads"
    assert sorted(path.name for path in out.parent.iterdir()) == ["step.json", "step.png"]
    made_up(device="cuda")
    main([*STEP, "--json", str(out)])
    assert out.with_suffix(".png").read_text(encoding="utf-8") == "A decoding step on a GPU"


def test_the_title_has_what_the_options_say():
    assert decode.PICTURE.format(**vars(decode.Options(size="130m"))) == "Decoding (130m)"
    assert "RetNet (5m)" in memory.PICTURE.format(**vars(memory.Options()))


def test_what_found_something_wrong_is_kept_and_ends_with_2(made_up, tmp_path, capsys):
    made_up(ok=False)
    with pytest.raises(SystemExit) as stop:
        main([*STEP, "--json", str(tmp_path / "a.json")])
    shown = capsys.readouterr()
    assert stop.value.code == 2 and "retentive: the step found what must not be: see above" in shown.err
    assert shown.out == "a table of cpu\n" and (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("raised", "words"),
    [(KeyboardInterrupt(), ""), (Interrupted("stopped at step 3 of 4", signal.SIGINT), "the same command goes on")],
    ids=["of a bench that measures", "of one that trains"],
)
def test_an_interrupt_leaves_nothing(raised, words, monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise raised

    monkeypatch.setattr(step, "measure", interrupted)
    with pytest.raises(SystemExit) as stop:
        main([*STEP, "--json", str(tmp_path / "new" / "x.json")])
    said = capsys.readouterr().err
    assert stop.value.code == 130 and not list(tmp_path.iterdir()) and words in said and said.count("\n") == 1


def test_a_picture_that_fails_leaves_the_file_alone(made_up, monkeypatch, tmp_path, capsys):
    made_up()

    def failing(result, path, *, title):
        path.write_text("half", encoding="utf-8")
        raise ModuleNotFoundError("plots need an extra")

    monkeypatch.setattr(step, "plot", failing)
    with pytest.raises(SystemExit):
        main([*STEP, "--json", str(tmp_path / "a.json")])
    assert "plots need an extra" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["a.json"]


BAD = {
    "unknown": (["speed"], "unknown bench 'speed', expected one of train, prefill, decode, memory"),
    "shape": (["retention", "--shapes", "big"], "unknown shape 'big', expected one of 5m, small"),
    "device": (["decode", "--device", "tpu"], "unknown device 'tpu'"),
    "size": (["train", "--size", "3m"], "unknown size '3m'"),
    "minutes": (["soak", "--minutes", "0"], "--minutes must be above 0, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_told_in_a_line(case, tmp_path, capsys):
    options, words = BAD[case]
    with pytest.raises(SystemExit) as stop:
        main(["bench", *options, *([] if case == "unknown" else ["--json", str(tmp_path / "new" / "x.json")])])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and words in line
    assert not list(tmp_path.iterdir())


def test_a_bench_without_a_picture_keeps_its_file_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, "tiny", Size(dict(dim=16, layers=1, heads=2)))
    argv = ["bench", "ask", "--size", "tiny", "--vocab-size", "31", "--lengths", "9", "--repeats", "1"]
    main([*argv, "--json", str(tmp_path / "ask.json")])
    assert capsys.readouterr().out.startswith("| tokens read |")
    assert [p.name for p in tmp_path.iterdir()] == ["ask.json"]


def test_json_is_asked_for_with_what_it_makes():
    texts = {}
    for picture in ("A title", None):
        module = SimpleNamespace(PICTURE=picture, Options=step.Options)
        (field,) = (f for f in bench.command_of(module).__dataclass_fields__.values() if f.name == "json")
        texts[picture] = str(field.type)
    assert "a picture is put beside it" in texts["A title"] and "a picture" not in texts[None]
