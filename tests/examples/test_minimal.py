"""examples/minimal.py against the package: the same weights give the same losses, and training steps the same again."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from retentive.data.loader import Batch
from retentive.models import ARCHITECTURES, LanguageModel, retnet
from retentive.train import TrainConfig, language_modelling
from retentive.train.step import Training, take_step

FILE = Path(__file__).parents[2] / "examples" / "minimal.py"
EXACT = 1e-12  # float64: sums of some thousand terms, added up in another order; measured 1e-14


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pair(minimal):
    """The example's model and the package's, with the same weights, in float64."""
    config = retnet(
        vocab_size=minimal.VOCAB,
        dim=minimal.D,
        layers=minimal.LAYERS,
        heads=minimal.H,
        value_dim=minimal.H * minimal.V,
        ffn_dim=minimal.FFN,
        tie_embeddings=True,
        **ARCHITECTURES["retnet-paper"],
    )
    small, package = minimal.RetNet().double(), LanguageModel(config).double()
    package.load_state_dict(small.state_dict())  # strict: the same names and shapes
    return small, package


def package_loss(model, rows):
    total, count, _ = language_modelling(model, Batch(rows[:, :-1], rows[:, 1:], None, None), None)
    return total / count


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
    config = TrainConfig(steps=minimal.STEPS, warmup=minimal.WARMUP, lr=minimal.LR, weight_decay=0.0, precision="fp32")
    ours, batches = minimal.adamw(small), {}
    training = Training(package, batches, language_modelling, config)
    for step in (0, 1, minimal.WARMUP, minimal.STEPS - 1):
        rows = torch.randint(minimal.VOCAB, (2, 41))
        batches[step] = Batch(rows[:, :-1], rows[:, 1:], None, None)
        loss = minimal.train_step(small, ours, rows, step)
        training.step = step
        metrics = take_step(training)
        # Adam divides by the root of gradients that may be nearly 0: rounding comes back larger
        assert math.isclose(loss, metrics["loss"], rel_tol=1e-9), step
        assert math.isclose(ours.param_groups[0]["lr"], metrics["lr"], rel_tol=1e-15), step


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
    same(states, [memory.value for memory in their_state.memories], EXACT)


def test_it_runs_from_its_text_to_its_own(minimal, capsys, monkeypatch):
    write = minimal.write
    monkeypatch.setattr(minimal, "write", lambda model, prompt, count: write(model, prompt, count // 10))
    for name, brief in {"STEPS": 50, "WARMUP": 10, "BATCH": 1, "LENGTH": 64}.items():
        monkeypatch.setattr(minimal, name, brief)
    minimal.main()
    head, _, held_out, text = capsys.readouterr().out.split("\n", 3)
    assert "parameters" in head and "bytes to learn from" in head
    assert float(held_out.split()[2]) < 6.5  # bytes at random have 8 bits each: 50 short steps learn the common ones
    assert text.startswith("def ") and len(text) > 20
