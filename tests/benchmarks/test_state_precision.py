"""Rounded states: exact where nothing is rounded, and as far off as their levels where something is."""

import pytest
import torch

from benchmarks.state_precision import ROUNDINGS, Options, Rounded, measure, plot, state_bytes, table
from retentive.checkpoint import save_model
from retentive.data.pack import pack
from retentive.data.packed import Packed
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer
from retentive.evals.heldout import held_out_loss
from retentive.models import build, config_of


def made(**fields):
    torch.manual_seed(0)
    model = build(config_of("hybrid", "1m", vocab_size=257, dim=16, layers=2, heads=2, **fields)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return model


@pytest.fixture
def folders(tmp_path):
    text = "The state of a model is a sum over all tokens that fade. " * 9
    pack(tmp_path / "data", ByteTokenizer(), [Document("a", text)], [Document("b", text[7:])])
    save_model(tmp_path / "model", made(), ByteTokenizer())
    return tmp_path / "model", tmp_path / "data"


def test_without_rounding_it_is_the_model():
    model, ids = made(), torch.randint(257, (2, 50))
    whole, _ = model.hidden(ids)
    torch.testing.assert_close(Rounded(model, None, 7).hidden(ids)[0], whole, rtol=1e-4, atol=1e-5)  # float32 sums


@pytest.mark.parametrize(("name", "levels"), [("bf16", 2**8), ("int8", 127), ("int8 rows", 127)])
def test_a_rounding_is_off_by_half_a_level_at_most(name, levels):
    x = torch.randn(2, 3, 8, 12)
    largest = x.abs().amax(-1, keepdim=True) if "rows" in name else x.abs().amax((-2, -1), keepdim=True)
    off = (ROUNDINGS[name](x) - x).abs()
    assert bool((off <= 0.51 * (x.abs() if name == "bf16" else largest) * (2 if name == "bf16" else 1) / levels).all())
    assert off.any() and not ROUNDINGS[name](torch.zeros(1, 1, 2, 2)).any()


def test_rounded_states_change_what_follows():
    model, ids = made(), torch.randint(257, (1, 60))
    whole = Rounded(model, None).hidden(ids)[0]
    off = [(Rounded(model, ROUNDINGS["int8"], every).hidden(ids)[0] - whole).norm() for every in (1, 60)]
    assert off[0] > 0 and off[1] < 1e-3 * whole.norm()  # rounded after the last token alone, nothing has followed yet


@pytest.mark.slow
def test_rows_are_of_held_out_text(folders, refuses, tmp_path):
    run, data = folders
    result = measure(Options(models=(str(run),), data=data, texts=1, length=256, every=(1, 16)))
    exact, *others = result["rows"]
    packed = Packed(data)
    loss = held_out_loss(made(), packed, length=256, tokens=256).loss
    assert exact["by_position"][-1][0] == 128 and exact["rounding"] == "float32"
    n = 255
    mean = sum(nats * min(begin, n - begin + 1) for begin, nats in exact["by_position"]) / n
    assert mean == pytest.approx(loss, rel=1e-4)
    assert [(row["rounding"], row["every"]) for row in others] == [(r, e) for e in (1, 16) for r in ROUNDINGS]
    assert [row["bytes"] for row in others[:2]] == [exact["bytes"] // 2, exact["bytes"] // 4 + 4 * 2]
    assert state_bytes(made(), None) == exact["bytes"] == 4 * 2 * 8 * 16
    assert "every token" in table(result)
    plot(result, tmp_path / "a.png", title="t")
    with refuses("the held-out text has 1 text of 400 tokens"):
        measure(Options(models=(str(run),), data=data, texts=2, length=400))
