"""`retentive compare`: runs that are `retentive train`'s own, a queue that goes on after anything, one at a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

import retentive
from retentive.checkpoint import ModelFolder
from retentive.cli import main
from retentive.compare import queue, worker
from retentive.models import PRESETS
from retentive.models.presets import Size
from retentive.train import TrainRun

ARGS = ["compare", "--data", "data", "--out", "cmp", "--batch", "2", "--length", "16", "--steps", "4", "--warmup", "2"]
ARGS += ["--precision", "fp32", "--device", "cpu", "--eval-every", "2", "--eval-tokens", "64", "--save-every", "2"]


ONE_M = PRESETS["1m"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiny models, and workers that are no processes of their own, which would not know them."""
    monkeypatch.setitem(PRESETS, "1m", Size(dict(dim=16, layers=2, heads=2, tie_embeddings=True)))
    monkeypatch.setitem(PRESETS, "2m", Size(dict(dim=24, layers=2, heads=2, tie_embeddings=True)))

    def start(task: queue.Task) -> queue.Job:
        code = worker.main(task.argument)
        return queue.Job(task, SimpleNamespace(poll=lambda: code, returncode=code, terminate=lambda: None))

    monkeypatch.setattr(queue, "start", start)


def record(name: str) -> dict:
    return json.loads(Path("cmp", name, "compared.json").read_text(encoding="utf-8"))


def test_a_comparison_from_end_to_end(place, capsys):
    pytest.importorskip("matplotlib")
    variants = ["retnet", "transformer", "no-gate"]
    with pytest.raises(SystemExit):  # before the first run, and not when its turn comes
        main([*ARGS, "--variants", *variants, "--set", "odd:heads=3"])
    assert "key_dim 16 is not divisible by heads 3" in capsys.readouterr().err and not Path("cmp").exists()
    with pytest.raises(SystemExit):
        main([*ARGS, "--batch", "0"])
    assert "--batch 0: must be at least 1" in capsys.readouterr().err and not Path("cmp").exists()
    main([*ARGS, "--variants", *variants, "--sizes", "1m", "2m", "--json", "out/a.json"])
    out, said = capsys.readouterr()
    assert "(12 of 12)" in said and out.startswith("| size | variant |") and out.count("transformer") == 2
    result = json.loads(Path("out/a.json").read_text(encoding="utf-8"))
    assert len(result["rows"]) == 6 and len(result["runs"]) == 12 and result["baseline"] == "retnet"
    assert Path("out/a.png").read_bytes().startswith(b"\x89PNG")
    for run in result["runs"]:
        model, _ = retentive.load(Path("cmp", run["name"]))
        assert run["parameters"] == sum(p.numel() for p in model.parameters())
        assert [tokens for tokens, _ in run["curve"]] == [64, 128] and run["tokens"] == 128
    # the same seed, the same tokens in the same order: only the model differs
    commands = [json.loads(Path("cmp", r["name"], "train.json").read_text(encoding="utf-8")) for r in result["runs"]]
    assert {c["train"]["seed"] for c in commands} == {0, 1} and len({c["data_sha256"] for c in commands}) == 1
    main(["report", "--results", "out", "-o", "report.html"])
    assert "<td>no-gate</td>" in Path("report.html").read_text(encoding="utf-8")


def test_variants_of_ones_own_are_compared_under_their_names(place, capsys):
    own = ["bare:rotary=none,decay=[-0.5,-0.1]", "narrow:model=transformer,kv_heads=1"]
    main([*ARGS, "--seeds", "0", "--variants", "retnet", "--set", *own, "--json", "out/a.json"])
    rows = {row["variant"]: row for row in json.loads(Path("out/a.json").read_text(encoding="utf-8"))["rows"]}
    assert set(rows) == {"retnet", "bare", "narrow"}
    bare, narrow = (ModelFolder.open(f"cmp/{v}_1m_lr0.002_seed0").config.blocks[0].mixer for v in ("bare", "narrow"))
    assert (bare.kind, bare.rotary, bare.decay) == ("retention", "none", (-0.5, -0.1))
    assert (narrow.kind, narrow.kv_heads) == ("attention", 1)
    # of two feed-forward layers one unit of width
    assert abs(rows["narrow"]["block_parameters"] - rows["retnet"]["block_parameters"]) <= 2 * 3 * 16
    main(["report", "--results", "out", "-o", "report.html"])
    assert "<td>narrow</td>" in Path("report.html").read_text(encoding="utf-8")


def test_the_help_shows_how_a_variant_is_written(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "--set NAME:FIELD=VALUE" in capsys.readouterr().out


WRONG = {
    "no-name": ("gate=false", "expected NAME:FIELD=VALUE"),
    "no-fields": ("mine:", "expected NAME:FIELD=VALUE"),
    "a-name-of-a-folder-elsewhere": ("../mine:gate=false", "expected NAME:FIELD=VALUE"),
    "misspelt-field": ("mine:gates=false", "unknown field 'gates': did you mean gate?"),
    "unknown-field": ("mine:nonsense=1", "--set mine:nonsense=1: unknown field 'nonsense', expected one of model, "),
    "misspelt-model": ("mine:modle=hybrid", "unknown field 'modle': did you mean model?"),
    "no-block": ("mine:model=hybrid,attention=[9]", "attention names block 9, but those that are no convolutions are"),
    "wrong-type": ("mine:gate=maybe", "--set mine:gate=maybe: expected true or false"),
    "contradiction": ("mine:score_norm=true", "score_norm needs decays that are known beforehand"),
    "unknown-model": ("mine:model=lstm", "unknown model 'lstm'"),
    "of-another-model": ("mine:forget_gate=true", "variant mine, size 1m: a RetNet has no field forget_gate"),
    "of-a-hybrid": ("mine:attention_window=64", "a RetNet has no field attention_window, but a hybrid has"),
    "of-the-twin": ("mine:model=hybrid,forget_gate=true", "a hybrid has no field forget_gate: beside a RetNet's"),
    "no-window": ("mine:model=hybrid,attention_window=0", "variant mine, size 1m: the window must be at least 1"),
    "named-architecture": ("mine:model=fla,qk_norm=true", "fla stands for qk_norm=False"),
    "defined-twice": (["mine:heads=1", "mine:heads=2"], "--set mine:heads=2: mine is defined twice"),
    "field-twice": ("mine:heads=1,heads=2", "--set mine:heads=2: heads is given twice"),
    "taken": ("no-gate:rotary=none", "that is a variant already"),
    "bias-of-nan": ("mine:decay=[NaN,-0.1]", "log decays <= 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_variant_that_is_none_is_refused_before_anything_is_written(case, place, capsys):
    typed, message = WRONG[case]
    with pytest.raises(SystemExit) as stop:
        main([*ARGS, "--set", *([typed] if isinstance(typed, str) else typed)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1 and not Path("cmp").exists()


def test_what_is_done_is_not_done_again_and_more_can_be_asked(place, capsys):
    main([*ARGS, "--seeds", "0"])
    before = Path("cmp/retnet_1m_lr0.002_seed0/compared.json").stat().st_mtime_ns
    capsys.readouterr()
    main([*ARGS, "--seeds", "0", "1"])
    said = capsys.readouterr().err
    assert "seed1" in said and "seed0" not in said
    assert Path("cmp/retnet_1m_lr0.002_seed0/compared.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_runs_of_an_earlier_result_are_not_done_again(place, capsys, refuses):
    """Wherever their folders are: the file is enough, and one that is of another comparison is refused."""
    main([*ARGS, "--seeds", "0", "--json", "first.json"])
    shutil.rmtree("cmp")
    capsys.readouterr()
    main([*ARGS, "--seeds", "0", "1", "--earlier", "first.json", "--json", "both.json"])
    said = capsys.readouterr().err
    assert "seed1: " in said and "seed0: " not in said and not Path("cmp/retnet_1m_lr0.002_seed0/config.json").exists()
    first, both = (json.loads(Path(name).read_text(encoding="utf-8"))["runs"] for name in ("first.json", "both.json"))
    assert [run for run in both if run["seed"] == 0] == first and len(both) == 2 * len(first)
    for typed, message in (
        (["--earlier", "none.json"], "none.json: no such file; name a result of"),
        (["--earlier", "data/meta.json"], "is not a result of a comparison"),
        (["--earlier", "first.json", "--batch", "3"], "of another comparison (batch"),
    ):
        shutil.rmtree("again", ignore_errors=True)
        with pytest.raises(SystemExit):
            main([*[a if a != "cmp" else "again" for a in ARGS], "--seeds", "0", *typed])
        assert message in capsys.readouterr().err


def test_several_learning_rates(place, capsys):
    main([*ARGS, "--seeds", "0", "--lrs", "1e-3", "1e-1", "--variants", "retnet"])
    out = capsys.readouterr().out
    assert "retnet, lr 0.001" in out and "retnet, lr 0.1" in out


def test_another_budget_in_the_same_folder_is_refused(place, capsys):
    main([*ARGS, "--seeds", "0", "--variants", "retnet"])
    for change, words in ((["--steps", "5"], "(steps 4, now 5)"), (["--length", "8"], "(length 16, now 8)")):
        with pytest.raises(SystemExit):
            main([*ARGS, "--seeds", "0", "--variants", "retnet", *change])
        assert f"of another comparison {words}; choose another --out" in capsys.readouterr().err


def test_a_run_that_another_is_at_is_left_to_it(place, capsys):
    Path("cmp").mkdir()
    with FileLock("cmp/.retnet_1m_lr0.002_seed0.lock"), pytest.raises(SystemExit) as end:
        main([*ARGS, "--seeds", "0"])
    out, said = capsys.readouterr()
    assert "| retnet |" not in out and "| transformer |" in out and "1 of 2 runs done" in said
    assert end.value.code == 1  # so that `compare && next` does not go on
    main([*ARGS, "--seeds", "0"])
    assert "transformer" in capsys.readouterr().out


def test_a_run_that_fails_does_not_stop_the_others(place, capsys, monkeypatch):
    real = TrainRun.run

    def run(self, **how):
        if self.model == "retnet":
            raise FloatingPointError("loss nan")
        return real(self, **how)

    monkeypatch.setattr(TrainRun, "run", run)
    main([*ARGS, "--seeds", "0"])
    out, said = capsys.readouterr()
    assert "retnet_1m_lr0.002_seed0: loss nan" in said and "(2 of 2)" in said
    assert "| transformer |" in out and "retnet_1m_lr0.002_seed0 did not train: loss nan" in out
    assert record("retnet_1m_lr0.002_seed0")["failed"] == "loss nan"


def test_runs_of_unlike_machines_are_refused_unless_asked(place, capsys):
    main([*ARGS, "--seeds", "0"])
    file = Path("cmp/retnet_1m_lr0.002_seed0/compared.json")
    changed = record("retnet_1m_lr0.002_seed0")
    changed["hardware"]["cpu"] = "another"
    file.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(SystemExit):
        main([*ARGS, "--seeds", "0"])
    assert "results of 2 kinds of machine in one table" in capsys.readouterr().err
    main([*ARGS, "--seeds", "0", "--mixed", "--json", "out/a.json"])
    assert len(json.loads(Path("out/a.json").read_text(encoding="utf-8"))["machines"]) == 2
    main(["report", "--results", "out", "-o", "report.html"])
    page = Path("report.html").read_text(encoding="utf-8")
    assert page.count("another, ") == 2 and "Several machines" in page


def test_a_recipe_that_is_none_is_refused(place, capsys):
    Path("r.py").write_text("def recipe():\n    return 1\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["compare", "--recipe", "r.py"])
    assert "expected a function recipe() that returns a Comparison" in capsys.readouterr().err


def test_bad_input_is_one_line_and_nothing_is_written(place, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*ARGS, "--variants", "lstm"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "unknown variant 'lstm'" in said and not Path("cmp").exists()


RECIPE = """
from pathlib import Path
from retentive.compare import Comparison
from retentive.train import TrainConfig

def recipe():
    train = TrainConfig(steps=30, warmup=2, device="cpu", eval_every=10, eval_tokens=64, save_every=1)
    how = dict(batch=2, length=16, seeds=(0,), train=train)
    return Comparison(data=Path("data"), out=Path("OUT"), variants=VARIANTS, jobs=JOBS, **how)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variants", "number"),
    [(("retnet",), signal.SIGKILL), (("retnet", "transformer"), signal.SIGINT)],
    ids=["killed", "two-jobs-stopped"],
)
def test_after_an_interruption_the_same_command_ends_as_if_there_had_been_none(place, monkeypatch, variants, number):
    """With the default precision, auto, which a run that goes on must not take for a contradiction."""
    monkeypatch.setitem(PRESETS, "1m", ONE_M)  # as the processes know it
    for name in ("whole", "cut"):
        text = RECIPE.replace("OUT", name).replace("VARIANTS", str(variants)).replace("JOBS", str(len(variants)))
        Path(f"{name}.py").write_text(text, encoding="utf-8")
    main(["compare", "--recipe", "whole.py"])
    Path("cut").mkdir()
    Path("cut/.precision").write_text(Path("whole/.precision").read_text())  # a busy machine may measure another one
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "retentive", "compare", "--recipe", "cut.py"]
    first = Path("cut/retnet_1m_lr0.002_seed0")
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as cut:
        deadline = time.monotonic() + 100
        while not list(first.glob("checkpoints/step-*/training.json")):
            assert time.monotonic() < deadline and cut.poll() is None
            time.sleep(0.005)
        cut.send_signal(number)
        said = cut.communicate(timeout=100)[1]
    assert cut.returncode == (130 if number == signal.SIGINT else -number), said
    with FileLock("cut/.retnet_1m_lr0.002_seed0.lock", timeout=60):  # a worker whose parent is gone saves and ends
        assert not Path(first, "compared.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "| 1m | retnet |" in done.stdout, done.stderr
    names = [f"{variant}_1m_lr0.002_seed0" for variant in variants]
    for name in names:
        one, two = (Path(out, name, "model.safetensors") for out in ("whole", "cut"))
        assert one.read_bytes() == two.read_bytes()
    # a process of its own each: memory does not depend on what ran before
    memory = [json.loads(Path("cut", name, "compared.json").read_text(encoding="utf-8"))["memory"] for name in names]
    assert max(memory) < 1.3 * min(memory)  # as many parameters; what a first run sets up is 0.1 GB, twice such a model
