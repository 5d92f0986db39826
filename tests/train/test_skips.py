"""Steps whose loss or gradient is not finite: skipped as if without their batch, counted, and limited in number."""

import pytest
import torch

from retentive.models import build, retnet
from retentive.train.checkpoints import folders

TINY = retnet(dim=32, layers=2, heads=2)


class Once:
    """Objective that gives the head's weight a NaN gradient at some steps."""

    def __init__(self, model, steps):
        self.calls, self.steps = 0, steps
        model.head.weight.register_hook(self.spoil)

    def spoil(self, gradient):
        self.calls += 1
        return gradient * torch.nan if self.calls - 1 in self.steps else gradient


def spoilt(steps, *, first=0):
    """A tiny model whose gradient is NaN at these steps of a run that begins with `first`."""
    torch.manual_seed(0)
    model = build(TINY)
    Once(model, {step - first for step in steps})
    return model


def test_by_default_the_first_ends_the_run(run, metrics):
    with pytest.raises(FloatingPointError, match="at step 5: training stopped, the last good checkpoint is"):
        run("a", model=spoilt([4]))
    assert [line["step"] for line in metrics(run.folder("a"))] == [1, 2, 3, 4]


def test_it_is_left_out_and_counted(run, metrics):
    lines = metrics(run("a", model=spoilt([2, 3, 6]), skip_nonfinite=2))
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [(line["step"], line["skipped"]) for line in lines if "skipped" in line] == [(3, 1), (4, 2), (7, 3)]
    assert all("loss" not in line for line in lines if "skipped" in line)


def test_weights_and_moments_are_as_before(run, same):
    """If the last steps fail, the checkpoint after them equals the one before them."""
    folder = run("a", model=spoilt([6, 7]), skip_nonfinite=2, steps=8, save_every=2, keep=4)
    before, after = folders(folder)[-2:]
    assert (before.name, after.name) == ("step-00000006", "step-00000008")
    for name in ("model", "optimizer"):
        assert (before / f"{name}.safetensors").read_bytes() == (after / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize("mode", ["reset", "carry"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_after_one(mode, optimizer, run, metrics):
    lines = metrics(run("a", model=spoilt([0, 3]), skip_nonfinite=1, mode=mode, optimizer=optimizer))
    assert [line["step"] for line in lines if "loss" in line] == [2, 3, 5, 6, 7, 8]


def test_one_too_many_in_a_row_ends_it(run, refuses):
    words = "at step 7, after 2 steps in a row left out for that: training stopped, the last good checkpoint"
    with refuses(words, FloatingPointError):
        run("a", model=spoilt([2, 4, 5, 6]), skip_nonfinite=2)


class Crash(Exception):
    """Error that no code of the package catches."""


def test_a_resumed_run_counts_on(run, same_end, refuses):
    def crash(model):
        raise Crash

    how = dict(skip_nonfinite=2, save_every=3)
    whole = run("whole", model=spoilt([1, 2, 4]), **how)
    with pytest.raises(Crash):
        run("stopped", model=spoilt([1, 2, 4]), **how, at=5, act=crash)
    same_end(run("stopped", model=spoilt([4], first=3), **how, resume=True), whole)
    with pytest.raises(Crash):
        run("bad", model=spoilt([1, 2]), **how, at=4, act=crash)
    with refuses("at step 4, after 2 steps in a row left out for that", FloatingPointError):
        run("bad", model=spoilt([3], first=3), **how, resume=True)
