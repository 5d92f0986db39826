"""The optimiser's groups against the model's own parameters, and the learning rate at the places that define it."""

import math
from itertools import pairwise

import pytest
import torch

from retentive.models import RetNetConfig, TransformerConfig, build
from retentive.train import TrainConfig
from retentive.train.optim import adamw, learning_rate

SMALL = dict(dim=16, layers=2, heads=2)
CONFIGS = {
    "retnet": RetNetConfig(**SMALL),
    "retnet-affine-tied": RetNetConfig(**SMALL, head_norm_affine=True, embed_norm=True, tie_embeddings=True),
    "transformer": TransformerConfig(**SMALL),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_in_one_group_and_vectors_are_not_decayed(name):
    model = build(CONFIGS[name])
    optimizer = adamw(model, TrainConfig(weight_decay=0.3, lr=0.01, beta1=0.8, beta2=0.7))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters()) and len(set(held)) == len(held)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decay[id(p)] == (0.3 if p.ndim == 2 else 0.0) for p in model.parameters())
    assert all(group["betas"] == (0.8, 0.7) and group["lr"] == 0.01 for group in optimizer.param_groups)


def test_frozen_parameters_are_in_no_group():
    model = build(CONFIGS["retnet"])
    model.embed.weight.requires_grad_(False)
    held = {id(p) for group in adamw(model, TrainConfig()).param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p is not model.embed.weight}


def test_a_step_decays_matrices_only():
    """Without a gradient AdamW does nothing but decay: p * (1 - lr * weight_decay)."""
    model = build(CONFIGS["retnet"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw(model, TrainConfig(lr=0.5, weight_decay=0.2)).step()
    for name, p in model.named_parameters():
        # one rounding of a float32 product, 6e-8
        torch.testing.assert_close(p.detach(), before[name] * (0.9 if p.ndim == 2 else 1.0), rtol=1e-6, atol=0)


def rates(**options) -> list[float]:
    config = TrainConfig(**{"steps": 100, "warmup": 10, "lr": 2.0, "final_lr": 0.1, **options})
    return [learning_rate(step, config) for step in range(config.steps)]


# cosine at half of its way stands at the mean of peak and end, and so does a straight line
SHAPES = {"cosine": (1.1, 0.2), "linear": (1.1, 0.2), "constant": (2.0, 2.0)}


@pytest.mark.parametrize("schedule", SHAPES)
def test_the_rate_rises_to_the_peak_and_falls_to_its_end(schedule):
    middle, end = SHAPES[schedule]
    rate = rates(schedule=schedule, steps=101)
    assert rate[:11] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.0])
    assert rate[55] == pytest.approx(middle)
    assert rate[-1] == pytest.approx(end)
    assert all(a >= b for a, b in pairwise(rate[10:])), "never up again"


def test_cosine_is_a_cosine_and_linear_a_line():
    part = (30 - 10) / 89  # of the way from the end of the warm-up to the last step
    assert rates(schedule="linear")[30] == pytest.approx(0.2 + 1.8 * (1 - part))
    assert rates(schedule="cosine")[30] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * part)) / 2)


@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize(
    ("steps", "warmup", "first"), [(1, 0, 2.0), (2, 0, 2.0), (5, 0, 2.0), (3, 10, 0.2), (10, 10, 0.2), (11, 10, 0.2)]
)
def test_short_runs_have_a_rate_at_every_step(schedule, steps, warmup, first):
    rate = rates(schedule=schedule, steps=steps, warmup=warmup)
    assert rate[0] == pytest.approx(first) and all(0 < x <= 2.0 for x in rate)
    if warmup == 0 and steps > 1 and schedule != "constant":
        assert rate[-1] == pytest.approx(0.2)


BAD = {
    "steps": (dict(steps=0), "steps must be at least 1, got 0"),
    "accumulate": (dict(accumulate=0), "accumulate must be at least 1, got 0"),
    "keep": (dict(keep=0), "keep must be at least 1, got 0"),
    "save_every": (dict(save_every=0), "save_every must be at least 1, got 0"),
    "eval_tokens": (dict(eval_tokens=1), "eval_tokens must be at least 2, got 1"),
    "warmup": (dict(warmup=-1), "warmup must not be negative, got -1"),
    "weight_decay": (dict(weight_decay=-0.1), "weight_decay must not be negative, got -0.1"),
    "clip": (dict(clip=-1.0), "clip must not be negative, got -1.0"),
    "final_lr": (dict(final_lr=-0.1), "final_lr must be in [0, 1], a fraction of lr, got -0.1"),
    "final_lr-above-1": (dict(final_lr=5.0), "final_lr must be in [0, 1], a fraction of lr, got 5.0"),
    "final_lr-nan": (dict(final_lr=math.nan), "final_lr must be in [0, 1], a fraction of lr, got nan"),
    "lr": (dict(lr=0.0), "lr must be above 0, got 0.0"),
    "lr-nan": (dict(lr=math.nan), "lr must be above 0, got nan"),
    "beta1": (dict(beta1=1.0), "beta1 must be in [0, 1), got 1.0"),
    "beta2": (dict(beta2=-0.5), "beta2 must be in [0, 1), got -0.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_cannot_be(case, refuses):
    options, message = BAD[case]
    with refuses(message):
        TrainConfig(**options)
