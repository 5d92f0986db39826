"""examples/minimal.py against the package: the same weights give the same losses, and training steps the same again."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from retentive.models import RetNet, RetNetConfig
from retentive.ops.cross_entropy import cross_entropy
from retentive.train import TrainConfig
from retentive.train.optim import adamw, learning_rate

FILE = Path(__file__).parents[2] / "examples" / "minimal.py"
EXACT = 1e-11  # float64: sums of some thousand terms, added up in another order; measured 1e-14


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pair(minimal):
    """The example's model and the package's, with the same weights, in float64."""
    config = RetNetConfig(
        vocab_size=minimal.VOCAB,
        dim=minimal.D,
        layers=minimal.LAYERS,
        heads=minimal.H,
        value_dim=minimal.H * minimal.V,
        ffn_dim=minimal.FFN,
        tie_embeddings=True,
    )
    small, package = minimal.RetNet().double(), RetNet(config).double()
    package.load_state_dict(small.state_dict())  # strict: the same names and shapes
    return small, package


def package_loss(model, rows):
    x, _ = model.hidden(rows[:, :-1])
    return cross_entropy(x, model.head.weight, rows[:, 1:]) / rows[:, 1:].numel()


@pytest.mark.parametrize("length", [1, 64, 150])  # less than a chunk, one, two and a shorter one
def test_loss_and_gradients_equal_the_packages(minimal, pair, length, same):
    rows = torch.randint(minimal.VOCAB, (2, length + 1))
    ours, theirs = (loss(model, rows) for loss, model in zip((minimal.loss_of, package_loss), pair, strict=True))
    same(ours, theirs, EXACT)
    ours.backward(), theirs.backward()
    for (name, a), b in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        same(a.grad, b.grad, EXACT, name)


def test_training_steps_equal_the_packages(minimal, pair):
    """Rate, clipping and AdamW too: a difference in any of them shows in the loss of the next step."""
    small, package = pair
    config = TrainConfig(steps=minimal.STEPS, warmup=minimal.WARMUP, lr=minimal.LR, weight_decay=0.0)
    optimizers = minimal.adamw(small), adamw(package, config)
    for step in (0, 1, minimal.WARMUP, minimal.STEPS - 1):
        rows = torch.randint(minimal.VOCAB, (2, 41))
        ours = minimal.train_step(small, optimizers[0], rows, step)
        for group in optimizers[1].param_groups:
            group["lr"] = learning_rate(step, config)
        theirs = package_loss(package, rows)
        theirs.backward()
        torch.nn.utils.clip_grad_norm_(package.parameters(), config.clip)
        optimizers[1].step()
        optimizers[1].zero_grad()
        # Adam divides by the root of gradients that may be nearly 0: rounding comes back larger
        assert math.isclose(ours, theirs.item(), rel_tol=1e-9), step


@torch.no_grad()
def test_both_forms_go_on_from_each_others_state(minimal, pair, same):
    ids = torch.randint(minimal.VOCAB, (2, 100))
    whole, (count, states) = pair[0](ids)
    first, state = pair[0](ids[:, :70])
    rest, (again, after) = pair[0](ids[:, 70:], state, form=minimal.recurrent)
    assert count == again == 100
    same(torch.cat((first, rest), 1), whole, EXACT)
    same(after, states, EXACT)
    theirs, their_state = pair[1](ids)
    same(whole, theirs, EXACT)
    same(states, their_state.layers, EXACT)


def test_it_runs_from_its_text_to_its_own(minimal, capsys, monkeypatch):
    monkeypatch.setattr(minimal, "STEPS", 50)
    monkeypatch.setattr(minimal, "BATCH", 1)
    monkeypatch.setattr(minimal, "LENGTH", 64)
    monkeypatch.setattr(minimal, "WARMUP", 10)
    minimal.main()
    head, _, held_out, rest = capsys.readouterr().out.split("\n", 3)
    assert "parameters" in head and "bytes to learn from" in head
    assert float(held_out.split()[2]) < 6.5  # bytes at random have 8 bits each: 50 short steps learn the common ones
    assert rest.startswith("def ") and len(rest) > 200
