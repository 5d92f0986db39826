"""Resumed runs against uninterrupted ones: they end in the same bits, and no good checkpoint is lost."""

import errno
import importlib
import json
import math
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import retentive
from retentive.checkpoint import save_model
from retentive.evals.heldout import HeldOut
from retentive.models import build, retnet, twin
from retentive.train import TrainRun
from retentive.train.checkpoints import folders
from retentive.train.parallel import checkpoint as sharded
from retentive.train.signals import Interrupted
from tests.configs import changed, hybrid

TINY = retnet(dim=32, layers=2, heads=2, dropout=0.1)
HYBRID = hybrid(dim=32, layers=2, heads=2, dropout=0.1, attention_every=2, attention_window=40)


class Crash(Exception):
    """Error that no code of the package catches."""


def crash(model):
    raise Crash


def files(folder) -> dict:
    """Name -> content of all files below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def steps(folder) -> list[str]:
    return [f.name for f in folders(folder)]


@pytest.mark.parametrize(
    ("model", "mode"),
    [
        (TINY, "reset"),
        (TINY, "packed"),
        (TINY, "carry"),
        (twin(TINY), "reset"),
        (twin(TINY), "packed"),
        (HYBRID, "carry"),
    ],
    ids=["reset", "packed", "carry", "twin-reset", "twin-packed", "hybrid-carry"],
)
def test_crashed_and_resumed_ends_in_the_bits_of_never_stopped(model, mode, run, same_end):
    """With dropout and two batches a step; the crash comes two steps and a half after a checkpoint."""
    how = dict(model=model, mode=mode, accumulate=2, init=0)
    whole = run("whole", **how)
    with pytest.raises(Crash):
        run("stopped", **how, at=2 * 5 + 1, act=crash)
    assert steps(run.folder("stopped")) == ["step-00000003"]
    stopped = run("stopped", **how | dict(init=1), resume=True)
    assert (folders(stopped)[-1] / "state.safetensors").exists() == (mode == "carry")
    same_end(stopped, whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_goes_on_in_the_same_bits(precision, run, same_end):
    how = dict(model=TINY, optimizer="muon", schedule="wsd", precision=precision)
    whole = run("whole", **how)
    with pytest.raises(Crash):
        run("stopped", **how, at=5, act=crash)
    same_end(run("stopped", **how, init=1, resume=True), whole)
    moments = load_file(folders(whole)[-1] / "optimizer.safetensors")
    kinds = {key.partition(".")[0] for key in moments if key.endswith("blocks.0.ffn.up_proj.weight")}
    assert kinds == {"momentum_buffer"} and "exp_avg.embed.weight" in moments


def test_crashed_before_its_first_checkpoint_it_begins_anew(run, same_end):
    with pytest.raises(Crash):
        run("stopped", model=TINY, at=2, act=crash)
    same_end(run("stopped", model=TINY, resume=True), run("whole", model=TINY))


def test_crashed_many_times(run, same_end):
    how = dict(model=TINY, steps=7, save_every=1, mode="carry")
    for at in (0, 2, 4, 4, 6):
        with pytest.raises(Crash):
            run("stopped", **how, at=at, act=crash, resume=at > 0)
    same_end(run("stopped", **how, init=9, resume=True), run("whole", **how))


def test_resuming_what_is_not_there_begins(run, same_end):
    same_end(run("new", resume=True), run("whole"))


def test_a_finished_run_is_left_as_it_is(run, same_end):
    whole = run("whole")
    shutil.copytree(whole, whole.with_name("copy"))
    same_end(run("copy", init=1, resume=True), whole)


def test_the_carried_state_is_what_it_goes_on_from(run, metrics):
    with pytest.raises(Crash):
        run("stopped", mode="carry", at=4, act=crash)
    folder = run.folder("stopped")
    shutil.copytree(folder, folder.with_name("robbed"))
    newest = folders(folder.with_name("robbed"))[-1]
    (newest / "state.safetensors").unlink()
    (newest / "training.json").write_text(json.dumps({"step": 3}))  # without checksums
    with_, without = (metrics(run(name, mode="carry", resume=True)) for name in ("stopped", "robbed"))
    assert with_[:3] == without[:3] and with_[3]["loss"] != without[3]["loss"]


def test_frozen_parameters_stay_and_the_run_goes_on(run, same_end):
    def frozen(init):
        torch.manual_seed(init)
        model = build(TINY)
        model.embed.weight.requires_grad_(False)
        return model

    whole = run("whole", model=frozen(0))
    torch.testing.assert_close(
        load_file(whole / "model.safetensors")["embed.weight"], frozen(0).embed.weight, rtol=0, atol=0
    )
    with pytest.raises(Crash):
        run("stopped", model=frozen(0), at=5, act=crash)
    same_end(run("stopped", model=frozen(1), resume=True), whole)


def test_metrics_go_on_where_the_checkpoint_was(run, metrics, same_end):
    """Later records are dropped: steps, evaluations, and a line that the crash cut short."""

    def evaluate(model, tokens):
        return HeldOut(model.head.weight.sum().item(), 1.0, tokens, 1000)

    how = dict(eval_every=1, evaluate=evaluate)
    whole = run("whole", **how)
    with pytest.raises(Crash):
        run("stopped", **how, at=5, act=crash)
    file = run.folder("stopped") / "metrics.jsonl"
    assert metrics(file.parent)[-1]["step"] == 5
    with file.open("a") as f:
        f.write('{"step": 6, "loss": 4.')
    same_end(run("stopped", **how, resume=True), whole)


def cut(file):
    file.write_bytes(file.read_bytes()[:-4])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def scribble(file):
    file.write_text("[1]")


DAMAGE = {
    "cut": ("model.safetensors", cut),
    "flipped": ("optimizer.safetensors", flip),
    "gone": ("state.safetensors", Path.unlink),
    "scribbled": ("training.json", scribble),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(damage, run, same_end, capsys, monkeypatch):
    name, spoil = DAMAGE[damage]
    whole = run("whole", mode="carry", save_every=2, keep=3)
    with pytest.raises(Crash):
        run("stopped", mode="carry", save_every=2, keep=3, at=7, act=crash)
    before, newest = folders(run.folder("stopped"))[-2:]
    spoil(newest / name)
    monkeypatch.setattr("retentive.train.loop.say", lambda text, **_: print(text))
    folder = run("stopped", mode="carry", save_every=2, keep=3, init=1, resume=True)
    aside = newest.with_name(f"damaged-{newest.name}")
    assert f"{newest / name} is damaged: put aside as {aside.name}, going on from step 4" in capsys.readouterr().out
    assert before.name == "step-00000004" and aside.is_dir()
    same_end(folder, whole)


def test_where_all_checkpoints_are_damaged_nothing_is_touched(run, refuses):
    with pytest.raises(Crash):
        run("stopped", save_every=2, keep=3, at=5, act=crash)
    found = folders(run.folder("stopped"))
    for folder in found:
        cut(folder / "optimizer.safetensors")
    with refuses(f"{found[-1] / 'optimizer.safetensors'} is damaged: there is no other whole checkpoint"):
        run("stopped", save_every=2, keep=3, resume=True)
    assert folders(run.folder("stopped")) == found


def test_a_checkpoint_without_sums_is_read(run, same_end):
    """Older versions wrote such checkpoints."""
    whole = run("whole")
    with pytest.raises(Crash):
        run("stopped", at=5, act=crash)
    for folder in folders(run.folder("stopped")):
        (folder / "training.json").write_text(json.dumps({"step": int(folder.name[5:])}))
    same_end(run("stopped", init=1, resume=True), whole)


@pytest.mark.parametrize("keep", [1, 3], ids=lambda n: f"keep{n}")
def test_the_newest_checkpoints_are_kept(keep, run):
    folder = run("a", keep=keep, steps=7, save_every=2)
    assert steps(folder) == ["step-00000002", "step-00000004", "step-00000006", "step-00000007"][-keep:]
    newest = folders(folder)[-1]
    assert (folder / "model.safetensors").read_bytes() == (newest / "model.safetensors").read_bytes()
    assert sorted(f.name for f in (folder / "checkpoints").iterdir()) == steps(folder)


def test_a_run_is_not_begun_over(run, refuses):
    before = files(run("a"))
    words = "already holds a run: `resume=True` goes on with it, `overwrite=True` begins anew, or choose another `out`"
    with refuses(words, FileExistsError):
        run("a", init=1)
    assert files(run.folder("a")) == before


@pytest.mark.parametrize("clip", [1.0, 0.0], ids=["clipped", "not-clipped"])
def test_at_the_first_nan_it_stops_and_the_good_checkpoint_stays(clip, run, refuses):
    def spoil(model):
        with torch.no_grad():
            model.blocks[0].ffn.up_proj.weight[0, 0] = math.nan

    with refuses("step-00000003; try a lower `lr`", FloatingPointError):
        run("a", clip=clip, at=5, act=spoil)
    folder = run.folder("a")
    assert steps(folder) == ["step-00000003"]
    assert all(p.isfinite().all() for p in retentive.load(folder)[0].parameters())
    assert all(x.isfinite().all() for x in load_file(folders(folder)[-1] / "optimizer.safetensors").values())


def test_at_a_gradient_that_overflows_it_stops_as_well(run):
    """The loss is still finite then; a step would spoil every weight."""

    def overflow(model):
        model.head.weight.register_hook(lambda gradient: math.inf * gradient)

    words = r"^loss \d\.\d{1,3} and gradient norm (inf|nan) at step 6: .*step-00000003; try a lower `lr`"
    with pytest.raises(FloatingPointError, match=words):
        run("a", at=5, act=overflow)
    assert all(p.isfinite().all() for p in retentive.load(run.folder("a"))[0].parameters())


def test_at_a_nan_before_any_checkpoint_that_is_said(run, refuses):
    with refuses("no checkpoint had been saved yet; try a lower `lr`", FloatingPointError):
        run("a", at=1, act=lambda model: model.embed.weight.data.fill_(math.inf))


def fill_disk(patch: pytest.MonkeyPatch, allowed: int) -> None:
    """Fill the disk in the middle of tensor file number `allowed` + 1, so that only a part of it is written."""
    calls = 0

    def filling(real):
        def save(*args, **how):
            nonlocal calls
            calls += 1
            if calls > allowed:
                (path,) = (Path(x) for x in args if isinstance(x, str | Path))
                with path.open("ab") as file:
                    file.truncate(100)
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **how)

        return save

    for place in ("safetensors.torch.save_file", "retentive.train.parallel.checkpoint.write"):
        module, _, name = place.rpartition(".")
        patch.setattr(place, filling(getattr(importlib.import_module(module), name)))


# files of the second checkpoint: the weights, the moments, the carried state
@pytest.mark.parametrize("background", [False, True], ids=["at-once", "async"])
@pytest.mark.parametrize(
    "allowed",
    [4, 5, 6],
    ids=["weights", "moments", "state"],  # after the fresh model and the three of the first
)
def test_a_full_disk_costs_the_new_checkpoint_only(allowed, background, run, same_end, monkeypatch):
    whole = run("whole", mode="carry")
    with monkeypatch.context() as patch:
        fill_disk(patch, allowed)
        with pytest.raises(OSError, match=r"cannot write .*step-00000006.*: No space left"):
            run("full", mode="carry", async_save=background)
    folder = run.folder("full")
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert {f.name for f in folder.iterdir()} == {f.name for f in whole.iterdir()}
    assert (folder / "model.safetensors").read_bytes() == (folders(folder)[0] / "model.safetensors").read_bytes()
    same_end(run("full", mode="carry", init=1, resume=True), whole)


def test_what_is_written_while_training_goes_on_is_what_the_step_ended_with(run, same_end, monkeypatch):
    """Steps continue and change the weights while a slow disk writes."""
    whole, written = run("whole", mode="carry", ema=0.9), []
    real, steps_on = sharded.write, threading.Event()

    def slow(path, *args):
        if not path.parent.name.startswith(".step"):  # the first weights
            return real(path, *args)
        assert threading.current_thread() is not threading.main_thread()
        steps_on.wait(10)
        written.append(path.parent.name)
        real(path, *args)

    monkeypatch.setattr("retentive.train.parallel.checkpoint.write", slow)
    how = dict(mode="carry", ema=0.9, async_save=True, at=5, act=lambda model: steps_on.set())
    same_end(run("async", **how), whole)
    assert written == [f".step-0000000{n}.partial" for n in (3, 3, 3, 6, 6, 6, 8, 8, 8)]


def test_a_full_disk_on_resuming_costs_nothing(run, same_end, monkeypatch):
    """The run's model is a hard link to the checkpoint's: writing one must not change the other."""
    whole = run("whole")
    with pytest.raises(Crash):
        run("stopped", at=5, act=crash)
    with monkeypatch.context() as patch:
        fill_disk(patch, 0)
        with pytest.raises(OSError, match="No space left"):
            run("stopped", resume=True)
    same_end(run("stopped", init=1, resume=True), whole)


def test_a_full_disk_while_metrics_are_cut_keeps_them(run, same_end, monkeypatch):
    whole = run("whole")
    with pytest.raises(Crash):
        run("stopped", at=5, act=crash)
    real = Path.write_text

    def write(path, text, **how):
        if "metrics" in path.name:
            real(path, "")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, text, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write)
        with pytest.raises(OSError, match="No space left"):
            run("stopped", resume=True)
    same_end(run("stopped", init=1, resume=True), whole)


def test_what_a_killed_save_left_is_cleared_away(run, same_end):
    """It is as large as a checkpoint, and no later save would take its name."""
    whole = run("whole")
    with pytest.raises(Crash):
        run("stopped", at=5, act=crash)
    rest = run.folder("stopped") / "checkpoints" / ".step-00000006.x1y2z3"
    rest.mkdir()
    (rest / "model.safetensors").write_bytes(b"half of it")
    stopped = run("stopped", resume=True)
    same_end(stopped, whole)
    assert sorted(f.name for f in (stopped / "checkpoints").iterdir()) == steps(whole)


def test_a_model_that_is_no_run_is_not_trained_over(run):
    """A converted or downloaded model has no train.json."""
    torch.manual_seed(1)
    save_model(run.folder("mine"), build(TINY))
    before = files(run.folder("mine"))
    with pytest.raises(FileExistsError):
        run("mine")
    assert files(run.folder("mine")) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_step_and_saves(number, run, same_end):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"stopped at step 5 of 8, saved; go on with `resume=True`"):
        run("stopped", at=4, act=lambda model: signal.raise_signal(number))
    assert signal.getsignal(number) is before
    assert steps(run.folder("stopped")) == ["step-00000003", "step-00000005"]
    same_end(run("stopped", keep=2, init=1, resume=True), run("whole"))


def test_a_second_interrupt_stops_at_once(run):
    def twice(model):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run("stopped", at=4, act=twice)
    assert steps(run.folder("stopped")) == ["step-00000003"]


def test_a_signal_in_the_last_step_changes_nothing(run, same_end):
    whole = run("whole")
    same_end(run("late", at=7, act=lambda model: signal.raise_signal(signal.SIGTERM)), whole)


def test_in_a_thread_it_trains_without_listening(run, same_end):
    """Only the main thread may set handlers; a notebook or a server trains in another."""

    def work():
        torch.set_num_threads(1)  # as in the main thread
        run("threaded")

    whole = run("whole")
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    same_end(run.folder("threaded"), whole)


def test_train_json_keeps_the_options_of_the_run(run):
    with pytest.raises(Crash):
        run("a", at=5, act=crash, lr=0.001)
    options = json.loads((run.folder("a") / "train.json").read_text(encoding="utf-8"))["train"]
    run("a", resume=True, lr=0.001, keep=1)
    again = json.loads((run.folder("a") / "train.json").read_text(encoding="utf-8"))["train"]
    assert again == {**options, "keep": 1}


def test_weights_of_another_shape_are_refused(run):
    with pytest.raises(Crash):
        run("a", at=5, act=crash)
    before = files(run.folder("a"))
    with pytest.raises((RuntimeError, ValueError)):
        run("a", model=changed(TINY, dim=48), resume=True)
    assert files(run.folder("a")) == before


def test_killed_before_its_options_were_written_it_begins_anew(run, same_end, monkeypatch):
    def killed(path, value):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("retentive.train.directory.write_json", killed)
        with pytest.raises(Crash):
            run("stopped")
    same_end(run("stopped", resume=True), run("whole"))


def test_a_run_of_version_0_1_0_goes_on(tmp_path, metrics):
    """A run with averages, dropout and carried states, resumed from step 4: losses of steps 5 to 8 are in its metrics.

    It was made by version 0.1.0: `retentive train --size 1m --set dim=8 layers=1 heads=2 dropout=0.1 --mode carry
    --batch 2 --length 16 --steps 8 --save-every 4 --ema 0.9 --precision fp32`. The checkpoint of step 8 was deleted.
    """
    shutil.copytree(Path(__file__).parent / "fixtures" / "run-0.1.0", tmp_path / "old")
    want = metrics(tmp_path / "old/run")
    TrainRun.of(tmp_path / "old/data", tmp_path / "old/run", resume=True).run(overrides={"resume"}, quiet=True)
    got = metrics(tmp_path / "old/run")
    assert [line["step"] for line in got if "loss" in line] == list(range(1, 9))
    for name in ("loss", "lr", "held_out_loss"):
        a, b = ([line[name] for line in lines if name in line] for lines in (got, want))
        # instruction sets sum in different orders: as for golden losses
        assert a == pytest.approx(b, rel=1e-5) and a, name
