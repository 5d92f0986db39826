"""Quantisation-aware training: it rounds as `quantize` does, trains floats, and evaluates integers."""

import pytest
import torch

from retentive.checkpoint import load
from retentive.checkpoint.quantize import quantize
from retentive.data.packed import Packed
from retentive.evals.heldout import held_out_loss
from retentive.models import build, retnet, transformer
from retentive.train.qat import Rounding

TINY = {"dim": 32, "layers": 2, "heads": 2}
MODELS = {"retnet": retnet(**TINY), "tied": transformer(**TINY, tie_embeddings=True)}


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_rounded_weights_compute_what_the_quantised_model_computes(name, to, same):
    model, ids = build(MODELS[name]), torch.randint(200, (2, 20))
    own = [p.detach().clone() for p in model.parameters()]
    made = quantize(model, {"int8": 8, "int4": 4}[to], dtype=torch.float32)
    model.blocks[0].requires_grad_(False)  # which is rounded only once
    rounding = Rounding(model, to)
    for _ in range(2):
        with pytest.raises(KeyError), rounding.in_place():
            same(model(ids)[0].detach(), made(ids)[0].detach(), 0)
            raise KeyError
        same([p.detach() for p in model.parameters()], own, 0)


def test_the_gradient_is_that_of_the_rounded_weights(same):
    model, other, ids = build(MODELS["retnet"]), build(MODELS["retnet"]), torch.randint(200, (2, 20))
    with Rounding(model, "int4").in_place():
        other.load_state_dict(model.state_dict())
        model(ids)[0].square().mean().backward()
    other(ids)[0].square().mean().backward()
    same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()], 0)


def test_a_run_evaluates_the_integers_that_its_model_becomes(run, metrics, packed, same_end):
    data = Packed(packed)
    how = dict(qat="int4", lr=3e-3, evaluate=lambda model, n: held_out_loss(model, data, tokens=n, length=32))
    done = run("trained", **how)
    floats, _ = load(done, dtype=torch.float32)
    integers = quantize(floats, 4, dtype=torch.float32)
    said = metrics(done)[-1]["held_out_loss"]
    assert said == held_out_loss(integers, data, tokens=65536, length=32).loss
    assert said != held_out_loss(floats, data, tokens=65536, length=32).loss

    class Crash(Exception):
        pass

    def crash(model):
        raise Crash

    with pytest.raises(Crash):
        run("stopped", **how, at=5, act=crash)
    same_end(run("stopped", **how, init=1, resume=True), done)


def test_models_that_cannot_be_quantised_are_refused(run, refuses):
    model = build(MODELS["retnet"])
    with refuses("the model is quantised, and integers cannot be trained"):
        run("again", model=quantize(model, 8), qat="int4")
    with refuses("`qat` is 'int2', expected one of none, int8, int4"):
        run("two", qat="int2")
