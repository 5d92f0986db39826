"""The moving average of the weights against its definition, and its use in evaluation, saved model and resuming."""

import json

import pytest
import torch
from safetensors.torch import load_file

import retentive
from retentive.evals.heldout import HeldOut
from retentive.models import build, retnet
from retentive.train.checkpoints import folders
from retentive.train.ema import EMA

TINY = retnet(dim=32, layers=2, heads=2)


def test_it_is_the_weighted_mean_of_the_weights_after_each_step(same):
    model, decay = build(TINY).double(), 0.7
    model.embed.weight.requires_grad_(False)
    ema, seen = EMA(model, decay), []
    for step in range(1, 6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p)) if p.requires_grad else p
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        ema.update(step)
    weights = [decay ** (5 - step) for step in range(1, 6)]
    assert "embed.weight" not in ema.mean
    for name, mean in ema.mean.items():
        # five float64 roundings of 1e-16
        same(mean, sum(w * x[name] for w, x in zip(weights, seen, strict=True)) / sum(weights), 1e-14, name)


def test_in_place_and_back_again_in_the_same_bits(same):
    model = build(TINY)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(3)
    own, mean = [p.detach().clone() for p in model.parameters()], [x.clone() for x in ema.mean.values()]
    with pytest.raises(KeyError), ema.in_place():
        same([p.detach() for p in model.parameters()], mean, 0)
        raise KeyError
    same([p.detach() for p in model.parameters()], own, 0)
    same(list(ema.mean.values()), mean, 0)


class Crash(Exception):
    """Error that no code of the package catches."""


def crash(model):
    raise Crash


def evaluate(model, tokens):
    return HeldOut(model.head.weight.abs().sum().item(), 1.0, tokens, 1000)


def test_a_run_evaluates_and_saves_the_averages_and_trains_the_weights(run, metrics, same):
    plain, averaged = (run(name, ema=ema, eval_every=2, evaluate=evaluate) for name, ema in (("a", 0.0), ("b", 0.9)))
    mine, theirs = metrics(averaged), metrics(plain)
    assert [line for line in mine if "loss" in line] == [line for line in theirs if "loss" in line]
    held, other = ([line for line in lines if "held_out_loss" in line] for lines in (mine, theirs))
    assert all(line["weights"] == "averages" for line in held) and not any("weights" in line for line in other)
    assert all(a["held_out_loss"] != b["held_out_loss"] for a, b in zip(held, other, strict=True))
    newest = folders(averaged)[-1]
    kept, want = (load_file(folder / "model.safetensors") for folder in (newest, folders(plain)[-1]))
    same(list(kept.values()), list(want.values()), 0)
    mean = load_file(newest / "ema.safetensors")
    model, _ = retentive.load(averaged)
    same([p.detach() for p in model.parameters()], [mean[name] for name, _ in model.named_parameters()], 0)
    # the mean of the weights saved after each step
    each = run("each", save_every=1, keep=8)
    weights = [load_file(folder / "model.safetensors")["head.weight"] for folder in folders(each)]
    factors = [0.9 ** (8 - step) for step in range(1, 9)]
    # eight float32 roundings of 6e-8
    same(mean["head.weight"], sum(f * w for f, w in zip(factors, weights, strict=True)) / sum(factors), 1e-6)
    assert json.loads((averaged / "train.json").read_text())["train"]["ema"] == 0.9


def test_crashed_and_resumed_it_ends_in_the_same_bits(run, same_end):
    how = dict(ema=0.9, eval_every=2, evaluate=evaluate)
    whole = run("whole", **how)
    with pytest.raises(Crash):
        run("stopped", **how, at=5, act=crash)
    same_end(run("stopped", **how, init=1, resume=True), whole)


def test_a_checkpoint_without_its_averages_is_damaged(run, refuses):
    with pytest.raises(Crash):
        run("stopped", ema=0.9, at=5, act=crash)
    (folder,) = folders(run.folder("stopped"))
    file = folder / "ema.safetensors"
    file.unlink()
    with refuses(f"{file} is damaged: there is no other whole checkpoint"):
        run("stopped", ema=0.9, resume=True)
