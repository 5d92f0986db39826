"""The training bench: what it measures against what it was asked for, and the gate that no wrong form passes."""

import importlib
import json

import pytest
import torch

from retentive.bench import training
from retentive.bench.lab.parts import part_of
from retentive.bench.training import Options
from retentive.models import cost, retnet, twin
from retentive.ops import backends

CONFIG = retnet(vocab_size=31, dim=32, layers=2, heads=4)


@pytest.fixture(autouse=True)
def made_up(sizes, rates, monkeypatch):
    """A tiny size, a machine whose rates are known, the memory of processes that one test alone starts."""
    monkeypatch.setattr(training, "memory", lambda name, step: {"peak_bytes": 10**9})


def measured(**changes):
    how = dict(size="tiny", vocab_size=31, lengths=(16, 40), tokens=80, precision="fp32", repeats=1, device="cpu")
    return training.measure(Options(**{**how, **changes}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_of_both_models(precision):
    result = measured(precision=precision)
    assert json.loads(json.dumps(result)) == result
    assert result["precision"] == precision and result["hardware"]["torch"] == torch.__version__
    assert [(row["length"], row["batch"]) for row in result["rows"]] == [(16, 5), (40, 2)]
    for row in result["rows"]:
        for name, config in (("retnet", CONFIG), ("transformer", twin(CONFIG))):
            rate, flops = row[name]["tokens_per_second"], cost.training_flops_per_token(config, row["length"])
            assert row[name]["parameters"] == cost.parameters(config)
            assert row[name]["fraction_of_gemm_rate"] == pytest.approx(rate * flops / 1e12)


def test_a_length_beyond_the_tokens_is_one_row():
    assert [row["batch"] for row in measured(lengths=(100,), tokens=50)["rows"]] == [1]


def test_steps_are_real_steps():
    """Each model trains: its weights move, its gradients are gone afterwards."""
    trainer = training.Trainer("retnet", training.Step(CONFIG, 9, 18, "fp32"))
    model = trainer.model
    before = [p.detach().clone() for p in model.parameters()]
    trainer.run()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "name", [name for name in training.MODELS if name != "llama"]
)  # its blocks are another library's
def test_recomputed_activations_change_no_step(name, same):
    steps = [training.Step(CONFIG, 9, 18, "fp32", checkpoint_activations=on) for on in (False, True)]
    trainers = [training.Trainer(name, step) for step in steps]
    for trainer in trainers:
        trainer.run()
    same(list(trainers[0].model.parameters()), list(trainers[1].model.parameters()), 1e-6)


@pytest.mark.slow
def test_memory_is_that_of_a_step_in_a_process_of_its_own(monkeypatch):
    """At least weights, gradients and AdamW's two moments, and the residual stream of each block's two halves."""
    monkeypatch.undo()
    config = retnet(vocab_size=1000, dim=256, layers=2, heads=2)
    peak = training.memory("retnet", training.Step(config, 2048, 2048, "fp32"))["peak_bytes"]
    assert peak > 0.9 * 4 * cost.weight_bytes(config) + 4 * 2048 * 256 * 4  # it may have had some pages before


def test_a_process_that_fails_leaves_the_memory_out(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(training.sys, "executable", "false")
    assert training.memory("retnet", training.Step(CONFIG, 4, 4)) == {}


@pytest.fixture(params=["parallel", "chunkwise", "recurrent"])
def wrong(request, monkeypatch):
    """One of the forms is off by a little, as a kernel with a mistake would be."""
    real = backends.choose

    def choose(name, call):
        backend = real(name, call)
        if call.form != request.param:
            return backend

        def run(call):
            o, state = backend.run(call)
            return 1.01 * o + 0.01 * o.flip(1), state

        return backend._replace(run=run)

    # the package's name for it is the function's
    monkeypatch.setattr(importlib.import_module("retentive.ops.retention"), "choose", choose)


def test_nothing_is_timed_where_forms_differ(wrong, monkeypatch, refuses):
    monkeypatch.setattr(training.Trainer, "run", lambda self: pytest.fail("timed"))
    with refuses("RetNet's forms differ by", ArithmeticError):
        measured()


def test_dropout_is_no_difference_between_forms():
    """The paper's sizes have it."""
    measured(size="dropped")


def test_the_table_holds_the_rows():
    result = measured()
    header, rule, *lines = training.table(result).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, rule, *lines)]
    assert {len(row) for row in cells} == {9} and len(lines) == 2
    for row, line in zip(result["rows"], cells[2:], strict=True):
        rates = [f"{row[name]['tokens_per_second']:,.0f}" for name in ("retnet", "transformer")]
        ratio = row["retnet"]["tokens_per_second"] / row["transformer"]["tokens_per_second"]
        assert line[:5] == [str(row["length"]), str(row["batch"]), *rates, f"{ratio:.2f}x"]
        assert line[5:7] == ["1.0 GB", "1.0 GB"]
    assert training.table({key: value for key, value in result.items() if key != "models"}) == training.table(result)


def test_other_models_take_part():
    pytest.importorskip("transformers", reason="llama is that of transformers")
    result = measured(models=("grouped", "retnet", "llama"), lengths=(16,))
    assert result["models"] == ["retnet", "grouped", "llama"]
    assert all(result["rows"][0][name]["tokens_per_second"] > 0 for name in result["models"])
    assert "Transformer twin, grouped heads: tokens/s" in training.table(result)


def test_the_picture_shows_both_models(tmp_path, lines):
    result = measured()
    training.plot(result, tmp_path / "a.png", title="t")
    rates = [row["retnet"]["tokens_per_second"] for row in result["rows"]]
    assert set(lines) == {"RetNet", "Transformer twin"}
    assert lines["RetNet"] == [([16, 40], rates), ([16, 40], [1.0, 1.0])]


def test_a_profile_divides_the_time_of_each_step(tmp_path):
    result = measured(profile=True, lengths=(16,), models=("retnet", "hybrid"))
    assert json.loads(json.dumps(result)) == result
    for name in ("retnet", "hybrid"):
        part = result["rows"][0][name]["parts"]
        assert sum(part["shares"].values()) == pytest.approx(1) and part["written"] > 0
        assert {"matrix products", "retention", "norms", "optimiser"} <= part["shares"].keys()
        assert ("convolutions" in part["shares"]) == (name == "hybrid")
        assert 0 < part["of_the_gemm_rate"] < 1  # of the made-up rate
    table = training.table(result).split("\n\n")[1]
    assert table.startswith("| length | model | matrix products | retention |") and table.count("\n") == 3
    training.plot(result, tmp_path / "a.png", title="t")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "part"),
    [("aten::mm", "matrix products"), ("autograd::engine::evaluate_function: MmBackward0", "other"),
     ("retentive::cpu_backward", "retention"), ("GeneratedBackwardFor_retentive_cpu_default", "retention"),
     ("_RMSNormBackward", "norms"), ("aten::add_", "sums"), ("aten::addmm", "matrix products"),
     ("aten::_fused_adamw_", "optimiser"), ("aten::embedding_dense_backward", "loss"),
     ("_GatedBackward", "activations"), ("aten::scaled_dot_product_attention", "attention"), ("aten::view", "other")],
)  # fmt: skip
def test_parts_by_name(name, part):
    assert part_of(name) == part


def test_what_it_keeps_beside_a_neighbour_stands_in_the_file_and_under_the_table(monkeypatch):
    found = {"quiet_seconds": 0.003, "beside_seconds": 0.006, "kept": 0.5, "repeats": 1, "threads": 2}
    ran = []
    monkeypatch.setattr(training.neighbour, "speed_kept", lambda run, *_, **__: ran.append(run()) or found)
    result = measured(neighbour=True)
    assert result["neighbour"] == {"length": 16, "batch": 5, **found} and ran == [None]
    line = "a training step of RetNet (5 x 16 tokens) keeps 50% of its speed: 6 ms instead of 3 ms (2 threads)"
    assert line in training.table(result).splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [(dict(precision="fp8"), "unknown precision 'fp8'"), (dict(models=("mamba",)), "unknown model 'mamba'"),
     (dict(lengths=()), "`lengths=()`: must be at least 1"),
     (dict(repeats=0), "`repeats=0`: must be at least 1"), (dict(tokens=0), "`tokens=0`: must be at least 1")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(changes, words, refuses):
    with refuses(words):
        measured(**changes)
