"""The optimiser's groups against the model's parameters, and the learning rate at its defining steps."""

import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch

from retentive.checkpoint.adapter import targets_of, with_adapter
from retentive.layers.lora import Adapter
from retentive.models import LanguageModel, build, retnet, transformer
from retentive.models.encoders import ImageConfig, with_encoders
from retentive.train import TrainConfig
from retentive.train.optim import Muon, adamw, hidden_matrices, learning_rate, optimizer_of, orthogonal
from tests.configs import hybrid

SMALL = dict(dim=16, layers=2, heads=2)
CONFIGS = {
    "retnet": retnet(**SMALL),
    "retnet-affine-tied": retnet(**SMALL, head_norm_affine=True, embed_norm=True, tie_embeddings=True),
    "transformer": transformer(**SMALL),
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
    """With zero gradients AdamW only decays: p * (1 - lr * weight_decay)."""
    model = build(CONFIGS["retnet"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw(model, TrainConfig(lr=0.5, weight_decay=0.2)).step()
    for name, p in model.named_parameters():
        # one rounding of a float32 product, 6e-8
        torch.testing.assert_close(p.detach(), before[name] * (0.9 if p.ndim == 2 else 1.0), rtol=1e-6, atol=0)


MUON = {
    "retnet": retnet(**SMALL),
    "gated": retnet(**SMALL, decay="gated", decay_bias=True, qk_bias=True, tie_embeddings=True),
    "transformer": transformer(**SMALL, forget_gate=True),
    "hybrid": hybrid(**SMALL),
}
MATRICES = {"q_proj", "k_proj", "v_proj", "g_proj", "out_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("name", MUON)
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(name):
    model = build(MUON[name])
    optimizer = optimizer_of(model, TrainConfig(optimizer="muon", weight_decay=0.3, lr=0.01))
    assert isinstance(optimizer, Muon)
    names = {p: name for name, p in model.named_parameters()}
    muon, matrices, vectors = ([names[p] for p in group["params"]] for group in optimizer.param_groups)
    assert sorted([*muon, *matrices, *vectors]) == sorted(names.values())
    assert all(name.startswith("blocks.") and name.split(".")[-2] in MATRICES for name in muon)
    left = {name.split(".")[-2] for name in matrices}
    assert left <= {"embed", "head", "decay_proj", "forget_proj"} and "embed" in left
    assert len(muon) == sum(len(list(p for p in b.parameters() if p.ndim == 2)) for b in model.blocks) - sum(
        "blocks" in name for name in matrices
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]
    assert all(group["lr"] == 0.01 for group in optimizer.param_groups)


def test_muon_has_the_blocks_of_encoders_but_not_their_ends():
    image = ImageConfig(token=250, dim=16, layers=1, heads=2)
    model = with_encoders(build(MUON["retnet"]), {"image": image})
    names = {p: name for name, p in model.named_parameters()}
    mine = {names[p] for p in hidden_matrices(model) if names[p].startswith("encoders")}
    assert mine and all(name.startswith("encoders.image.blocks.0.") for name in mine)


def step_twice(model: LanguageModel, optimizer: torch.optim.Optimizer, rate: float = 0.02) -> list[torch.Tensor]:
    """Weights after two steps with made-up gradients, the second at half the learning rate."""
    generator = torch.Generator().manual_seed(3)
    for lr in (rate, rate / 2):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [p.detach().clone() for p in model.parameters()]


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """The iteration of the source: five times p(X) = a X + b (X X^T) X + c (X X^T)^2 X, from X / |X| (Frobenius)."""
    x = x / x.square().sum().sqrt()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7)])
def test_orthogonal_is_the_iteration_and_brings_singular_values_near_one(shape, same):
    x = torch.randn(shape, dtype=torch.float64)
    # float64 rounds to 1e-16; five steps multiply small singular values, and their errors, by up to 3.4 each
    same(orthogonal(x), newton_schulz(x), 1e-12)
    values = torch.linalg.svdvals(orthogonal(torch.randn(64, 128, dtype=torch.float64)))
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_two_steps_of_muon_are_the_formula(same):
    """m <- 0.95 m + 0.05 g, u = 0.05 g + 0.95 m, W <- (1 - lr decay) W - 0.2 lr sqrt(max(rows, columns)) NS(u)."""
    model = build(MUON["gated"]).double()
    config = TrainConfig(optimizer="muon", weight_decay=0.1, precision="fp32")
    before, plain = {name: p.detach().clone() for name, p in model.named_parameters()}, deepcopy(model)
    hidden = {id(p) for p in hidden_matrices(model)}
    step_twice(model, optimizer_of(model, config))
    generator = torch.Generator().manual_seed(3)
    gradients = [{n: torch.randn(p.shape, generator=generator).double() for n, p in before.items()} for _ in range(2)]
    after = dict(model.named_parameters())
    for name, w in before.items():
        if id(after[name]) in hidden:
            momentum = torch.zeros_like(w)
            for lr, g in zip((0.02, 0.01), (g[name] for g in gradients), strict=True):
                momentum = 0.95 * momentum + 0.05 * g
                update = newton_schulz(0.05 * g + 0.95 * momentum)
                w = (1 - lr * 0.1) * w - 0.2 * lr * max(w.shape) ** 0.5 * update
            same(after[name].detach(), w, 1e-12, name)
    step_twice(plain, adamw(plain, config))
    for name, p in plain.named_parameters():
        if id(after[name]) not in hidden:
            assert torch.equal(after[name], p), f"{name} is AdamW's"


def test_muon_in_bf16_is_torchs(same):
    """torch.optim.Muon, which iterates in bfloat16, gives the same bits on the same matrices."""
    model = build(MUON["retnet"])
    config = TrainConfig(optimizer="muon", weight_decay=0.1, precision="bf16")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    hidden = {id(p) for p in hidden_matrices(model)}
    mine = step_twice(model, optimizer_of(model, config))
    at = [n for n, p in enumerate(model.parameters()) if id(p) in hidden]
    model.load_state_dict(start)
    torchs = torch.optim.Muon(hidden_matrices(model), weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    theirs = step_twice(model, torchs)
    same([mine[n] for n in at], [theirs[n] for n in at], 0)


def test_a_step_of_muon_is_as_large_as_one_of_adamw():
    """A step is 0.2 lr in root mean square for every size of gradient and shape of matrix."""
    model = build(retnet(dim=64, layers=1, heads=2))
    before = [p.detach().clone() for p in hidden_matrices(model)]
    optimizer = Muon(model, TrainConfig(weight_decay=0.0, precision="fp32"))
    step_twice(model, optimizer, rate=0.01)
    for p, w in zip(hidden_matrices(model), before, strict=True):
        size = float((p.detach() - w).square().mean().sqrt())
        # two steps of 0.01 and 0.005, nearly the same way; singular values are 0.7 to 1.2
        assert 0.5 < size / (0.2 * 0.015) < 1.2


def test_muon_refuses_what_has_no_whole_matrices(refuses):
    model = build(MUON["retnet"])
    adapter = Adapter("base", "0", 2, 4.0, targets_of(model, "all", 2))
    with refuses("`optimizer='muon'` steps whole matrices"):
        optimizer_of(with_adapter(model, adapter), TrainConfig(optimizer="muon"))


def test_muon_computes_the_closure():
    model = build(MUON["retnet"])
    optimizer = optimizer_of(model, TrainConfig(optimizer="muon", lr=1e-3))
    ids = torch.arange(8)[None]

    def closure():
        optimizer.zero_grad()
        loss = model(ids)[0].square().mean()
        loss.backward()
        return loss

    first, second = (optimizer.step(closure).item() for _ in range(2))
    assert second < first


def rates(**options) -> list[float]:
    config = TrainConfig(**{"steps": 100, "warmup": 10, "lr": 2.0, "final_lr": 0.1, **options})
    return [learning_rate(step, config) for step in range(config.steps)]


# halfway, both cosine and straight line are at the mean of peak and end
SHAPES = {"cosine": (1.1, 0.2), "linear": (1.1, 0.2), "wsd": (2.0, 0.2), "constant": (2.0, 2.0)}


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


def test_wsd_stays_and_then_falls_in_a_line():
    rate = rates(schedule="wsd", decay_fraction=0.25, steps=101)
    assert rate[10:76] == pytest.approx([2.0] * 66)
    assert rate[75:] == pytest.approx([2.0 - 1.8 * n / 25 for n in range(26)])
    longer = rates(schedule="wsd", decay_fraction=0.25, steps=201)
    assert longer[:76] == rate[:76], "a run can be lengthened from where it had not begun to fall"
    # all of it, and then the warm-up comes first
    assert rates(schedule="wsd", decay_fraction=1.0) == pytest.approx(rates(schedule="linear"))


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
    "steps": (dict(steps=0), "`steps` must be at least 1, got 0"),
    "accumulate": (dict(accumulate=0), "`accumulate` must be at least 1, got 0"),
    "keep": (dict(keep=0), "`keep` must be at least 1, got 0"),
    "save_every": (dict(save_every=0), "`save_every` must be at least 1, got 0"),
    "eval_tokens": (dict(eval_tokens=1), "`eval_tokens` must be at least 2, got 1"),
    "warmup": (dict(warmup=-1), "`warmup` must be a number of at least 0, got -1"),
    "weight_decay": (dict(weight_decay=-0.1), "`weight_decay` must be a number of at least 0, got -0.1"),
    "clip": (dict(clip=-1.0), "`clip` must be a number of at least 0, got -1.0"),
    "final_lr": (dict(final_lr=-0.1), "`final_lr` must be in [0, 1], a fraction of lr, got -0.1"),
    "final_lr-above-1": (dict(final_lr=5.0), "`final_lr` must be in [0, 1], a fraction of lr, got 5.0"),
    "final_lr-nan": (dict(final_lr=math.nan), "`final_lr` must be in [0, 1], a fraction of lr, got nan"),
    "decay_fraction": (dict(decay_fraction=0.0), "`decay_fraction` must be in (0, 1], a part of the steps, got 0.0"),
    "optimizer": (dict(optimizer="sgd"), "`optimizer` is 'sgd', expected one of adamw, muon"),
    "skip_nonfinite": (dict(skip_nonfinite=-1), "`skip_nonfinite` must be a number of at least 0, got -1"),
    "ema": (dict(ema=1.0), "`ema` must be in [0, 1), got 1.0"),
    "lr": (dict(lr=-1e-3), "`lr` must be a number of at least 0, got -0.001"),
    "lr-nan": (dict(lr=math.nan), "`lr` must be a number of at least 0, got nan"),
    "beta1": (dict(beta1=1.0), "`beta1` must be in [0, 1), got 1.0"),
    "beta2": (dict(beta2=-0.5), "`beta2` must be in [0, 1), got -0.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_cannot_be(case, refuses):
    options, message = BAD[case]
    with refuses(message):
        TrainConfig(**options)
