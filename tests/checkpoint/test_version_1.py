"""Folders, states and memory files of version 0.1.0: they load to the same logits (`fixtures/v0.1.0/README.md`)."""

from pathlib import Path

import pytest
import torch

from retentive.checkpoint import load
from retentive.files import load_tensors
from retentive.infer.memory import load_memory
from retentive.models import load_state

OLD = Path(__file__).parent / "fixtures" / "v0.1.0"
READ = 11
"""Number of tokens that the states and memories have read."""
NAMES = sorted(path.stem for path in OLD.glob("*.expected"))
TOL = 1e-5
"""Tolerance relative to the norm: float32 sums in another order, as on another processor or version of torch."""


@pytest.mark.parametrize("name", NAMES)
def test_old_folders_give_the_same_logits(name, same):
    dtype = torch.float32 if name == "retnet-int4" else None  # integers compute in bfloat16 unless asked otherwise
    adapter = OLD / name if name == "adapter" else None
    model, _ = load(OLD / ("retnet" if adapter else name), dtype=dtype, adapter=adapter)
    expected, _ = load_tensors(OLD / f"{name}.expected")
    with torch.no_grad():
        same(model(expected["ids"])[0], expected["logits"], TOL)


@pytest.mark.parametrize("name", [name for name in NAMES if (OLD / f"{name}.state").is_file()])
def test_old_states_go_on(name, same):
    model, _ = load(OLD / name)
    expected, _ = load_tensors(OLD / f"{name}.expected")
    with torch.no_grad():
        same(model(expected["ids"][:, READ:], load_state(OLD / f"{name}.state"))[0], expected["rest"], TOL)


@pytest.mark.parametrize("name", [name for name in NAMES if (OLD / f"{name}.memory").is_file()])
def test_old_memories_are_still_this_models(name, same):
    model, _ = load(OLD / name)
    expected, _ = load_tensors(OLD / f"{name}.expected")
    memory = load_memory(OLD / f"{name}.memory", model)
    assert memory.tokens == READ
    with torch.no_grad():
        same(model(expected["ids"][:, READ:], memory.state)[0], expected["rest"], TOL)
