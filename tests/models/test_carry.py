"""States between batches: rows that continue get their state, others a fresh one, for any sequences between."""

import pytest
import torch

from retentive.models import build, retnet
from retentive.models.carry import states_in, states_out


@pytest.fixture
def model():
    return build(retnet(dim=16, layers=2, heads=2))


def test_before_the_first_batch_all_are_fresh(model):
    state = states_in(model, None, torch.tensor([0, 2]), torch.tensor([True, False]), 3)
    assert state.position.tolist() == [0, 0, 0] and all(not m.value.any() for m in state.memories)


def test_rows_that_go_on_get_their_own_state(model, same):
    """Two rows of three and one sequences: the second goes on, the first has come to a document's end."""
    with torch.no_grad():
        _, after = model.hidden(torch.randint(257, (2, 5)))
    carried = states_out(after, torch.tensor([0, 1]))
    state = states_in(model, carried, torch.tensor([0, 3]), torch.tensor([False, True]), 4)
    assert state.position.tolist() == [0, 0, 0, 5]
    for got, had in zip(state.memories, carried.memories, strict=True):
        same(got.value[3], had.value[1], 0)
        assert not got.value[:3].any() and had.value.any()


def test_what_goes_out_is_the_last_of_each_row_without_a_graph(model, same):
    _, after = model.hidden(torch.randint(257, (1, 9)), cu_seqlens=torch.tensor([0, 2, 5, 9], dtype=torch.int32))
    out = states_out(after, torch.tensor([2, 0]))
    assert out.position.tolist() == [4, 2] and not any(m.value.requires_grad for m in out.memories)
    same(out.memories[0].value, after.memories[0].value[[2, 0]].detach(), 0)
