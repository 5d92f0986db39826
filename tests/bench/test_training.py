"""The training bench: what it measures against what it was asked for, and the gate that no wrong form passes."""

import importlib
import json

import pytest
import torch

from retentive.bench import training
from retentive.models import RetNetConfig, build, cost, twin
from retentive.ops import backends

CONFIG = RetNetConfig(vocab_size=31, dim=16, layers=2, heads=2)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """The machine's own speed takes seconds to measure, and no test looks at it."""
    monkeypatch.setattr(training, "peak_flops", lambda *_, **__: 1e12)


def measure(config=CONFIG, **changes):
    return training.measure(config, **{"lengths": (16, 40), "tokens": 80, "precision": "fp32", "repeats": 1, **changes})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_of_both_models(precision):
    result = measure(precision=precision)
    assert json.loads(json.dumps(result)) == result
    assert result["precision"] == precision and result["hardware"]["torch"] == torch.__version__
    assert [(row["length"], row["batch"]) for row in result["rows"]] == [(16, 5), (40, 2)]
    for row in result["rows"]:
        for name, config in (("retnet", CONFIG), ("transformer", twin(CONFIG))):
            rate, flops = row[name]["tokens_per_second"], cost.training_flops_per_token(config, row["length"])
            assert row[name]["parameters"] == cost.parameters(config)
            assert row[name]["fraction_of_gemm_rate"] == pytest.approx(rate * flops / 1e12)
        assert row["ratio"] == pytest.approx(
            row["retnet"]["tokens_per_second"] / row["transformer"]["tokens_per_second"]
        )


def test_a_length_beyond_the_tokens_is_one_row():
    assert [row["batch"] for row in measure(lengths=(100,), tokens=50)["rows"]] == [1]


def test_steps_are_real_steps():
    """Each model trains: its weights move, its gradients are gone afterwards."""
    model = build(CONFIG)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = training.adamw(model, training.TrainConfig())
    assert training.step(model, optimizer, torch.randint(31, (2, 9)), "fp32") > 0
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


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
    monkeypatch.setattr(training, "step", lambda *_: pytest.fail("timed"))
    with refuses("RetNet's forms differ by", ArithmeticError):
        measure()


def test_forms_that_agree_pass_with_their_difference():
    # the gate's own bound; float32 sums of 40 tokens differ by 1e-6
    assert 0 < training.check_forms(build(CONFIG), 40) < training.TOLERANCE


def test_dropout_is_no_difference_between_forms():
    """The paper's sizes have it."""
    measure(RetNetConfig(vocab_size=31, dim=16, layers=2, heads=2, dropout=0.1))


def test_the_table_holds_the_rows():
    result = measure()
    header, rule, *lines = training.table(result).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, rule, *lines)]
    assert {len(row) for row in cells} == {6} and len(lines) == 2
    for row, line in zip(result["rows"], cells[2:], strict=True):
        rates = [f"{row[name]['tokens_per_second']:,.0f}" for name in ("retnet", "transformer")]
        assert line[:4] == [str(row["length"]), *rates, f"{row['ratio']:.2f}"]
