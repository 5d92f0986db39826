"""Windows by layer: costs against the divergence that each window alone makes, and how the tokens are shared out."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from retentive.linearization.windows import dearest, shared_out, sizes, window_costs
from retentive.models import build, transformer
from retentive.ops.distillation import kl_divergence

TEACHER = transformer(vocab_size=61, dim=64, layers=3, heads=4, kv_heads=2, tie_embeddings=True)


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return build(TEACHER).double().eval()


def test_costs_follow_the_divergence_of_each_window_alone(teacher):
    ids = torch.randint(61, (4, 48))
    windows = [4, 12, 40]
    costs = torch.tensor(window_costs(teacher, [SimpleNamespace(ids=ids, cu_seqlens=None)], windows, sinks=1))
    measured = torch.zeros(3, 3)
    for layer in range(3):
        for n, window in enumerate(windows):
            blocks = list(TEACHER.blocks)
            limited = replace(blocks[layer].mixer, window=window, sinks=1, moving_sinks=True)
            blocks[layer] = replace(blocks[layer], mixer=limited)
            model = build(replace(TEACHER, blocks=tuple(blocks))).double().eval()
            model.load_state_dict(teacher.state_dict())
            with torch.no_grad():
                x, y = model.hidden(ids)[0], teacher.hidden(ids)[0]
                measured[layer, n] = kl_divergence(x, model.head.weight, y, model.head.weight) / ids.numel()
    together = torch.corrcoef(torch.stack([costs.flatten().log(), measured.flatten().log()]))[0, 1]
    assert together > 0.9, (costs, measured)  # one draw of labels for each of 192 tokens: no exact figure
    assert (costs.diff(dim=1) < 0).all() and (costs > 0).all()


def test_a_window_that_holds_all_tokens_costs_nothing(teacher):
    batch = SimpleNamespace(ids=torch.randint(61, (1, 20)), cu_seqlens=None)
    [[cost], *_] = window_costs(teacher, [batch], [20], sinks=0)
    assert cost < 1e-20


def test_documents_of_a_row_are_apart(teacher):
    """A window needs to reach no further than the document."""
    batch = SimpleNamespace(ids=torch.randint(61, (1, 20)), cu_seqlens=torch.tensor([0, 10, 20], dtype=torch.int32))
    assert all(cost < 1e-20 for own in window_costs(teacher, [batch], [10], sinks=0) for cost in own)


def test_tokens_go_where_they_save_most():
    windows, costs = [1, 2, 4], [[8.0, 4.0, 0.0], [1.0, 0.9, 0.8], [3.0, 2.0, 0.5]]
    assert shared_out(costs, windows, 1) == [1, 1, 1]
    assert shared_out(costs, windows, 2) == [4, 1, 1]  # one token is left that nothing needs more than layer 2
    assert shared_out(costs, windows, 7 / 3) == [4, 1, 2]
    assert shared_out(costs, windows, 3) == [4, 1, 4]
    assert shared_out(costs, windows, 9) == [4, 4, 4]
    assert dearest([0.1, 0.5, 0.3], 2) == (1, 2) and dearest([0.1], 0) == ()


def test_windows_to_choose_from():
    assert sizes(256) == [64, 96, 128, 192, 256, 384, 512, 768, 1024] and sizes(1) == [1, 2, 3, 4]
