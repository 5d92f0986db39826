"""Objectives: language modelling, and a test's own objective in the loop."""

import pytest
import torch
import torch.nn.functional as F

from retentive.data.loader import Batch
from retentive.data.packed import Packed
from retentive.models import build, retnet
from retentive.ops.cross_entropy import IGNORE
from retentive.train import Hooks, TrainConfig, language_modelling, train

TINY = retnet(dim=32, layers=2, heads=2)


def test_language_modelling_is_the_sum_over_targets_that_count():
    model = build(TINY).double()
    ids, targets = torch.randint(257, (2, 3, 8))
    targets[:, ::2] = IGNORE
    total, count, state = language_modelling(model, Batch(ids, targets, None, None), None)
    logits, _ = model(ids)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert count == 12 and state is None
    assert total.item() == pytest.approx(want.item(), rel=1e-12)  # float64: sums in another order


def test_carried_states_come_back_for_the_rows(packed):
    """Each row has a state, so that the next batch has the losses of continued text."""
    batches, model = Packed(packed).batches(mode="carry", batch=3, length=16), build(TINY).double()
    first, _, state = language_modelling(model, batches[0], None)
    assert len(state.position) == 3 and first.requires_grad
    assert not any(x.requires_grad for x in state.tensors())
    on, afresh = (language_modelling(model, batches[1], before)[0].item() for before in (state, None))
    assert on != pytest.approx(afresh, rel=1e-6)


def test_any_objective_trains(packed, tmp_path, metrics):
    """Lower logits of one token, counted by twos, with a number for a state: all three reach the loop."""
    seen = []

    def objective(model, batch, state):
        seen.append(state)
        x, _ = model.hidden(batch.ids, cu_seqlens=batch.cu_seqlens)
        return 10 * model.head(x)[..., 7].mean(), 2, torch.tensor(len(seen))

    config = TrainConfig(steps=3, warmup=0, lr=1e-2, precision="fp32", device="cpu", accumulate=2, save_every=100)
    batches = Packed(packed).batches(batch=2, length=16)
    model, saved = build(TINY), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retentive.train.checkpoints.Writer.save", lambda writer, found: saved.update(state=found.state))
        folder = train(model, batches, objective, config, tmp_path / "run", Hooks(quiet=True))
    assert [x if x is None else int(x) for x in seen] == [None, 1, 2, 3, 4, 5] and int(saved["state"]) == 6
    losses = [line["loss"] for line in metrics(folder)]
    assert losses[2] < losses[1] < losses[0]
