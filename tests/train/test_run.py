"""Whole runs from Python: resumed, lengthened, begun anew, begun from given weights, and refused."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

import retentive
from retentive.checkpoint import save_model
from retentive.data.mixture import Mixture
from retentive.data.pack import pack
from retentive.data.packed import Packed
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer, train_bpe
from retentive.evals.heldout import held_out_loss
from retentive.models import ARCHITECTURES, build, cost, retnet
from retentive.models.model import Block
from retentive.train import TrainConfig, TrainRun, language_modelling
from retentive.train.checkpoints import folders
from retentive.train.directory import read_options
from retentive.train.optim import learning_rate
from retentive.train.step import Training, accumulate_gradients

SMALL = {"dim": 32, "layers": 1, "heads": 2}
BRIEF = dict(steps=4, warmup=2, lr=5e-3, save_every=2, precision="fp32", device="cpu", eval_every=0, sample_every=0)


@pytest.fixture
def made(packed, tmp_path):
    """`made(name, **options)`: a run on the stories, with the options of `retentive.train`."""

    def make(name: str, **options) -> TrainRun:
        small = {"size": "1m", "set": SMALL, "batch": 2, "length": 32}
        return TrainRun.of(packed, tmp_path / name, **small | BRIEF | options)

    return make


def cut_back(run: Path) -> None:
    """Change the run as if it had been killed before its newest checkpoint."""
    shutil.rmtree(folders(run)[-1])


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


def test_one_call_trains(packed, tmp_path, made, same_end):
    options = {"size": "1m", "set": SMALL, "batch": 2, "length": 32, **BRIEF}
    run = retentive.train(packed, tmp_path / "called", **options)
    assert run == tmp_path / "called" and retentive.load(run)[0].config.dim == 32
    same_end(run, made("made").run(quiet=True))
    with pytest.raises(TypeError, match="no option 'legnth': did you mean length"):
        retentive.train(packed, tmp_path / "b", legnth=3)
    with pytest.raises(TypeError, match="no option 'zzz': expected one of accumulate, async_save, "):
        TrainRun.of(packed, tmp_path / "b", zzz=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"steps": "3"}, "steps must be a whole number, got '3'"),
        ({"batch": True}, "batch must be a whole number, got True"),
        ({"length": "64"}, "length must be a whole number, got '64'"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"compile": 1}, "compile must be True or False, got 1"),
        ({"size": 5}, "size must be a string, got 5"),
        ({"set": ["dim=32"]}, "set must be a dictionary, got ['dim=32']"),
    ],
    ids=str,
)
def test_an_option_of_another_type_is_refused_before_anything_is_written(options, words, packed, tmp_path, refuses):
    with refuses(words, TypeError):
        retentive.train(packed, tmp_path / "a", **options)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def letters(tmp_path) -> Path:
    """Other data with the same tokenizer: a pattern of letters that no story has."""
    texts = ["".join("ZYXWVUTSRQ"[(n + i * i) % 10] for i in range(80)) for n in range(20)]
    pack(tmp_path / "letters", ByteTokenizer(), *(map(Document, "ab" * 10, part) for part in (texts[:16], texts[16:])))
    return tmp_path / "letters"


def held_out(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "held_out_loss" in line]


def test_a_mixture_learns_from_all_and_is_evaluated_on_each(made, packed, letters, capsys):
    options = dict(data_weights=(3, 1), eval_every=10, eval_tokens=400, steps=30, lr=1e-2, batch=4)
    run = replace(made("mixed", **options), data=(packed, letters))
    lines = held_out(run.run())
    said = capsys.readouterr().err
    assert "(75.0% packed, 25.0% letters)" in said and "as mixed (packed " in said
    assert [line["step"] for line in lines] == [10, 20, 30, 30]
    data = Mixture([Packed(packed), Packed(letters)], [3, 1])
    model, _ = retentive.load(run.out)
    for name, part in data.parts.items():
        # of 400 tokens each part is read 200; the model was saved in the bits that were evaluated
        alone = held_out_loss(model, part, length=32, tokens=200)
        found = lines[-2]["parts"][name]
        assert (found["held_out_loss"], found["bits_per_byte"]) == (alone.loss, alone.bits_per_byte)
        assert found["held_out_loss"] < lines[0]["parts"][name]["held_out_loss"], "of both it learns"
    parts, last = lines[-2]["parts"], lines[-2]
    by_hand = 0.75 * parts["packed"]["held_out_loss"] + 0.25 * parts["letters"]["held_out_loss"]
    assert last["held_out_loss"] == pytest.approx(by_hand)
    stored = json.loads((run.out / "train.json").read_text(encoding="utf-8"))
    assert stored["data_sha256"] == data.fingerprint
    assert stored["command"]["data_weights"] == [3, 1] and stored["command"]["data"] == [str(packed), str(letters)]


def test_a_mixture_goes_on_in_the_same_bits_with_the_same_data_only(made, packed, letters, same_end, refuses):
    def mixed(name, *data, **more):
        return replace(made(name, data_weights=(0.3, 0.7), **more), data=data)

    whole = mixed("whole", packed, letters).run(quiet=True)
    run = mixed("cut", packed, letters, resume=True)
    run.run(quiet=True)
    cut_back(run.out)
    (letters.parent / "elsewhere").mkdir()
    moved = letters.rename(letters.parent / "elsewhere" / "letters")
    for data, words in (
        ((moved, packed), f"`data=('{moved}', '{packed}')` holds other data than the run at {run.out} was trained on"),
        ((packed, packed.parent / "packed"), "is given twice: give it more weight instead"),
        ((moved,), "2 weights for 1 folder of data"),
    ):
        with refuses(words):
            replace(run, data=data).run(quiet=True)
    with refuses("`data_weights=(1, 1)` contradicts `data_weights=(0.3, 0.7)` of the run at"):
        replace(run, data=(packed, moved), data_weights=(1, 1)).run(quiet=True)
    same_end(replace(run, data=(packed, moved)).run(quiet=True), whole)


def test_one_folder_is_the_same_however_it_is_given(made, packed):
    assert replace(made("a"), data=[str(packed)]).data == replace(made("a"), data=str(packed)).data == packed


def test_numbers_of_other_kinds_are_numbers(made, tmp_path):
    made_of = made("a", lr=np.float64(1e-3), clip=1, init=tmp_path / "base")
    assert (made_of.train.lr, made_of.train.clip, made_of.init) == (1e-3, 1, str(tmp_path / "base"))


@pytest.mark.parametrize("speed", [0.5, 2.0], ids=["fp32", "bf16"])
def test_what_auto_became_does_not_contradict_auto(speed, made, monkeypatch, same_end):
    """All fields count as chosen here, as in a comparison that is started twice."""
    rate = {torch.float32: 1.0, torch.bfloat16: speed}
    monkeypatch.setattr("retentive.train.speed.gemm_rate", lambda device, dtype, **how: rate[dtype])
    whole = made("whole", precision="auto").run(quiet=True)
    run = made("cut", precision="auto", resume=True)
    run.run(quiet=True)
    cut_back(run.out)
    rate[torch.bfloat16] = 1 / speed
    same_end(run.run(quiet=True), whole)


def test_the_learning_rate_of_a_new_model_follows_from_its_width(made, same_end, capsys):
    whole, run = made("whole", lr=1 / SMALL["dim"]).run(quiet=True), made("cut", lr=0.0, resume=True)
    run.run()
    assert "learning rate 0.031" in capsys.readouterr().err
    assert read_options(run.out)["train"]["lr"] == 1 / SMALL["dim"]
    same_end(run.out, whole)
    cut_back(run.out)
    same_end(run.run(quiet=True), whole)


def test_a_run_without_a_checkpoint_takes_the_learning_rate_of_its_new_width(made):
    run = made("cut", lr=0.0).run(quiet=True)
    shutil.rmtree(run / "checkpoints")  # as if it had been killed before the first one
    (run / "model.safetensors").unlink()
    made("cut", lr=0.0, set=SMALL | {"dim": 64}, resume=True).run(quiet=True)
    assert read_options(run)["train"]["lr"] == 1 / 64


def test_the_learning_rate_of_a_trained_model_is_lower(made, same_end, capsys):
    whole = made("whole").run(quiet=True)
    further = made("further", lr=0.0, set={}, size="5m", init=str(whole), resume=True)
    assert read_options(further.run())["train"]["lr"] == 1e-3
    assert "learning rate 0.001" in capsys.readouterr().err
    cut_back(further.out)
    same_end(further.run(quiet=True), made("again", lr=1e-3, set={}, size="5m", init=str(whole)).run(quiet=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": "bf16"}, "`precision='bf16'` contradicts `precision='fp32'` of the run at"),
        ({"lr": 0.5}, "`lr=0.5` contradicts `lr=0.005` of the run at"),
        (
            {"set": {"dim": 64}},
            "`set={'dim': 64}` contradicts `set={'dim': 32, 'layers': 1, 'heads': 2}` of the run",
        ),
        ({"steps": 8}, "`steps=8` contradicts `steps=4` of the run at"),
    ],
    ids=["precision", "lr", "set", "steps"],
)
def test_what_is_computed_is_not_changed_midway(change, words, made, refuses):
    made("a").run(quiet=True)
    with refuses(words):
        made("a", resume=True, **change).run(quiet=True)


def test_what_alters_nothing_may_change(made):
    run = made("a").run(quiet=True)
    cut_back(run)
    made("a", resume=True, keep=1).run(overrides={"keep"}, quiet=True)
    assert json.loads((run / "train.json").read_text(encoding="utf-8"))["train"]["keep"] == 1 and len(folders(run)) == 1


def test_its_own_options_hold(made, same_end):
    """A resumed run keeps its options: the user need not repeat them, and defaults do not contradict them."""
    whole = made("whole").run(quiet=True)
    run = made("cut").run(quiet=True)
    cut_back(run)
    TrainRun(made("cut").data, run, resume=True).run(overrides={"data", "out", "resume"}, quiet=True)
    same_end(run, whole)


def test_a_longer_run_at_a_constant_rate_is_the_longer_run(made):
    how = dict(schedule="constant", lr=1e-3)
    whole = made("whole", steps=8, **how).run(quiet=True)
    made("a", **how).run(quiet=True)
    run = made("a", steps=8, resume=True, **how).run(overrides={"steps"}, quiet=True)
    assert losses(run) == losses(whole)
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_longer_run_takes_the_rates_of_a_run_of_so_many_steps(made, metrics, capsys):
    made("a").run(quiet=True)
    run = made("a", steps=8, resume=True).run(overrides={"steps"})
    told = "going on from step 4, to 8 instead of 4: with the learning rates of a run of 8"
    assert told in capsys.readouterr().err.splitlines()
    rates = [line["lr"] for line in metrics(run) if "lr" in line]
    first, rest = (replace(made("a").train, steps=steps) for steps in (4, 8))
    assert rates == [learning_rate(n, first if n < 4 else rest) for n in range(8)]


def test_a_run_may_not_be_shorter_than_what_is_done(made, refuses):
    made("a").run(quiet=True)
    with refuses("`steps=3` is less than the 4 that the run at"):
        made("a", steps=3, resume=True).run(overrides={"steps"})


def test_going_on_and_being_done_are_said(made, capsys):
    run = made("a").run()
    cut_back(run)
    capsys.readouterr()
    made("a", resume=True).run()
    assert capsys.readouterr().err.splitlines()[0] == "going on from step 2 of 4"
    before = losses(run)
    made("a", resume=True).run()
    assert capsys.readouterr().err == f"done: {run} is at step 4 of 4 (more steps lengthen it)\n"
    assert losses(run) == before


def test_overwriting_begins_anew_and_leaves_what_is_not_the_runs(made, same_end):
    first = made("a", lr=1e-2, steps=6).run(quiet=True)
    (first / "notes.md").write_text("mine")
    same_end(made("a", overwrite=True).run(quiet=True), made("whole").run(quiet=True))
    assert (first / "notes.md").read_text() == "mine"
    assert [folder.name for folder in folders(first)] == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("more", [{}, {"resume": True}], ids=["again", "resume"])
def test_a_run_that_failed_before_its_first_checkpoint_is_no_obstacle(more, made, same_end, refuses):
    """After a learning rate that was too high, the same command works with a lower one."""
    with refuses("no checkpoint had been saved yet; try a lower `lr`", FloatingPointError):
        made("a", lr=1e30, clip=0.0, warmup=0, save_every=100).run(quiet=True)
    same_end(
        made("a", **more).run(overrides={"lr", "clip", "warmup", "save_every"}, quiet=True), made("b").run(quiet=True)
    )


@pytest.mark.parametrize("more", [{}, {"resume": True}], ids=["again", "resume"])
@pytest.mark.parametrize("gone", ["checkpoints", "training.json"])
def test_a_trained_model_whose_checkpoints_are_gone_is_not_trained_over(gone, more, made, refuses):
    run = made("a").run(quiet=True)
    if gone == "checkpoints":
        shutil.rmtree(run / "checkpoints")
    else:
        for folder in folders(run):
            (folder / "training.json").unlink()
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    words = f"{run} holds a trained model but no checkpoint to go on from: `overwrite=True` begins anew, `init='{run}'`"
    with refuses(words, FileExistsError):
        made("a", steps=6, **more).run(overrides={"steps"}, quiet=True)
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before
    made("a", overwrite=True).run(quiet=True)
    assert len(losses(run)) == 4


def test_resuming_and_overwriting_at_once_is_refused(made, refuses):
    with refuses("`resume` and `overwrite` exclude each other"):
        made("a", resume=True, overwrite=True).run()


@pytest.mark.parametrize("existing", [{}, {"resume": True}, {"overwrite": True}], ids=["new", "resume", "overwrite"])
def test_one_process_at_a_run(existing, made, refuses):
    out = made("a").out
    if existing:
        cut_back(made("a").run(quiet=True))
    out.mkdir(exist_ok=True)
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    with FileLock(out / ".lock"), refuses("another process is training the run at", BlockingIOError):
        made("a", **existing).run(quiet=True)
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file() and f.name != ".lock"} == {
        f: content for f, content in before.items() if f.name != ".lock"
    }
    made("a", **existing).run(quiet=True)


def first_loss(run: TrainRun, folder: Path) -> float:
    """Loss of a folder's model on the run's first batch."""
    model = retentive.load(folder)[0].train()
    options = TrainConfig(precision="fp32", device="cpu")
    return accumulate_gradients(Training(model, run.batches(Packed(run.data)), language_modelling, options))[0]


def test_training_on_from_given_weights(made, same_end, tmp_path):
    base = made("base", steps=20).run(quiet=True)
    tuned = made("tuned", set={}, size="5m", init=str(base), lr=1e-3)
    want = first_loss(tuned, base)
    run = tuned.run(quiet=True)
    assert losses(run)[0] == pytest.approx(want, rel=1e-6) and want < losses(base)[0]
    shutil.rmtree(base)
    shutil.copytree(run, tmp_path / "copy")
    cut_back(run)
    made("tuned", set={}, size="5m", init=str(base), lr=1e-3, resume=True).run(quiet=True)  # no longer needs the base
    same_end(run, tmp_path / "copy")


def test_training_on_from_another_projects_weights_with_dropout(made, tmp_path):
    torch.manual_seed(5)
    fields = ARCHITECTURES["torchscale"] | {"embed_scale": False}
    model = build(retnet(vocab_size=257, dim=32, layers=2, heads=2, **fields))
    save_model(tmp_path / "theirs", model, layout="torchscale")
    run = made("tuned", size="5m", init=str(tmp_path / "theirs"), set={"dropout": 0.5})
    assert losses(run.run(quiet=True))[0] != pytest.approx(first_loss(run, tmp_path / "theirs"), rel=1e-3)
    config = retentive.load(run.out)[0].config
    assert (config.dropout, config.retention.decay, config.layers) == (0.5, "paper", 2)


def test_weights_that_do_not_go_with_the_rest_are_refused(made, tmp_path, refuses, packed):
    base = made("base").run(quiet=True)
    with refuses("brings its architecture: leave out `size` and `model`"):
        made("a", init=str(base), set={}).run(quiet=True)
    for typed in ("size", "model"):  # at its default, but chosen
        with refuses("brings its architecture: leave out `size` and `model`"):
            made("a", size="5m", init=str(base), set={}).run(overrides={typed}, quiet=True)
    with refuses("brings its architecture: only dropout can be in `set`"):
        made("a", size="5m", init=str(base), set={"dim": 64}).run(quiet=True)
    pack(tmp_path / "bpe", train_bpe(["some other text"] * 9, 260), [Document("a", "text " * 99)], [])
    with refuses("has another tokenizer than"):
        replace(made("a", size="5m", init=str(base), set={}), data=tmp_path / "bpe").run(quiet=True)
    (base / "tokenizer.json").unlink()
    with refuses("knows 257 tokens, "):
        replace(made("a", size="5m", init=str(base), set={}), data=tmp_path / "bpe").run(quiet=True)
    with refuses("no model folder at", FileNotFoundError):
        made("a", size="5m", init=str(tmp_path / "nowhere"), set={}).run(quiet=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("model", ["transformer", "hybrid"])
def test_states_of_constant_size_are_carried_and_others_refused(model, made, packed, refuses):
    window = {**SMALL, "layers": 2, "attention_window": 20}
    run = made("a", model=model, mode="carry", set=window, eval_every=2, eval_tokens=200).run(quiet=True)
    assert len(losses(run)) == 4 and (folders(run)[-1] / "state.safetensors").is_file()
    growing = made("b", model=model, mode="carry", set={**SMALL, "layers": 2, "attention_window": None})
    with refuses("mode carry hands on a state of constant size, and a "):
        growing.run(quiet=True)
    assert not growing.out.exists()


@pytest.mark.parametrize("change", [{"batch": 10**9}, {"size": "torchscale-65b", "set": {}}], ids=["batch", "size"])
def test_what_cannot_fit_is_refused_before_anything_is_made(change, made, refuses):
    run = made("a", **change)
    with refuses("GB at the very least, "):
        run.run(quiet=True)
    assert not run.out.exists()


@pytest.mark.parametrize("model", ["retnet", "transformer", "hybrid"])
def test_what_a_step_takes_at_least_is_less_than_what_it_takes(model, made, packed):
    """The estimate counts weights, gradients and moments to the byte, and the inputs of the blocks."""
    run = made("a", model=model, set={**SMALL, "layers": 4})
    config, trained = run.build(Packed(packed))
    training = Training(trained, run.batches(Packed(packed)), language_modelling, run.train)
    optimizer = training.optimizer
    kept = 0

    def keep(x: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += x.nbytes if x.dtype == torch.float32 and not isinstance(x, torch.nn.Parameter) else 0
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        accumulate_gradients(training)
    optimizer.step()
    held = sum(p.nbytes + p.grad.nbytes for p in trained.parameters())
    held += sum(x.nbytes for s in optimizer.state.values() for name, x in s.items() if name != "step")
    assert cost.least_training_bytes(config, 0) == held
    assert held < cost.least_training_bytes(config, run.batch * run.length) < held + kept


def test_memory_that_is_free_is_enough(made, monkeypatch, refuses):
    """The check is exact to the byte: the minimum needed may equal the free memory."""
    run = made("a")
    need = cost.least_training_bytes(run.config(257), run.batch * run.length)
    monkeypatch.setattr("retentive.machine.free_memory", lambda device: need - 1)
    with refuses("choose a smaller `size`, `batch` or `length`"):
        run.run(quiet=True)
    monkeypatch.setattr("retentive.machine.free_memory", lambda device: need)
    run.run(quiet=True)


def test_seconds_per_step_are_the_median_without_the_first(made, monkeypatch):
    ticks = iter([0, 100, 100, 101, 200, 203, 300, 302])
    monkeypatch.setattr("retentive.train.run.time.perf_counter", lambda: next(ticks))
    run = made("a")
    assert run.seconds_per_step() == 2 and not run.out.exists()


def test_seconds_per_step_are_those_of_the_options(made, monkeypatch):
    """The timed step must recompute each block in the backward pass too, which takes a third more time."""
    calls = []
    forward, seconds = Block.forward, itertools.count()  # as many steps in both
    monkeypatch.setattr("retentive.train.run.time.perf_counter", lambda: next(seconds))
    monkeypatch.setattr(Block, "forward", lambda block, *args: (calls.append(block), forward(block, *args))[1])
    counts = []
    for recomputed in (False, True):
        calls.clear()
        made("a", checkpoint_activations=recomputed).seconds_per_step()
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0] > 0


def test_the_seed_initialises_the_model(made, packed):
    first, again, other = (made("a", seed=seed).build(Packed(packed))[1].head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_options_that_are_damaged_are_named(made, refuses):
    run = made("a").run(quiet=True)
    for content in ("", "{}", '{"train": {"precision": "fp32"}, "command": {"set": ["dim=3"]}}'):
        (run / "train.json").write_text(content, encoding="utf-8")
        with refuses("train.json does not hold a run's options"):
            made("a", resume=True).run(quiet=True)


def test_no_held_out_text_no_evaluation(made, tmp_path, metrics):
    pack(tmp_path / "bare", Packed(made("a").data).tokenizer, [Document("a", "text " * 99)], [])
    run = replace(made("a"), data=tmp_path / "bare").run(quiet=True)
    assert len(metrics(run)) == 4 and all(math.isfinite(line["loss"]) for line in metrics(run))


def test_a_run_whose_changes_are_kept_as_typed_goes_on(made, same_end):
    """Format of runs before 26 November 2026."""
    changes = {"dim": 32, "layers": 1, "heads": 2, "decay": [-0.5, -0.1], "score_norm": False, "activation": "gelu"}
    whole = made("whole", set=changes).run(quiet=True)
    run = made("old", set=changes).run(quiet=True)
    cut_back(run)
    record = json.loads((run / "train.json").read_text(encoding="utf-8"))
    del record["command"]["init"]
    record["command"]["set"] = [f"{name}={x if type(x) is str else json.dumps(x)}" for name, x in changes.items()]
    (run / "train.json").write_text(json.dumps(record), encoding="utf-8")
    made("old", set=changes, resume=True).run(quiet=True)
    same_end(whole, run)


@pytest.mark.parametrize("name", ["schedule", "precision"])
def test_a_word_that_is_none_of_those_known_is_refused(name, refuses):
    """The command line checks the words; from Python an unknown one must not be accepted silently."""
    with refuses(f"`{name}` is 'wat', expected one of "):
        TrainConfig(**{name: "wat"})
