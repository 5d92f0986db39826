"""Held-out text token by token: against the model's own logits, one context after the other, and recall by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retentive.data.pack import pack
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer
from retentive.evals import heldout
from retentive.models import RetNetConfig, build
from retentive.train.evaluate import evaluate

TRAIN = ["the cat sat on the mat. " * 40, "a dog ran. " * 30]
VALID = ["xq zv xq zv the cat xq", "a dog and a quokka, a quokka! " * 3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("heldout") / "data"
    train, valid = ([Document(str(n), text) for n, text in enumerate(texts)] for texts in (TRAIN, VALID))
    pack(out, ByteTokenizer(), train, valid)
    return out


@pytest.fixture
def model():
    return build(RetNetConfig(vocab_size=257, dim=32, layers=2, heads=2)).eval()


@pytest.mark.parametrize("length", [7, 16, 64])
def test_losses_are_those_of_each_context_alone(data, model, length):
    """Contexts end with the window and with the document; ROWS of them go through the model at once."""
    tokens = heldout.read(model, data, length=length)
    eos = ByteTokenizer().eos_id
    assert len(tokens.losses) == sum(len(text.encode()) + 1 for text in VALID) - 1
    for context in np.unique(tokens.context):
        inside = tokens.context == context
        ids = torch.from_numpy(np.append(tokens.before[inside][:1], tokens.ids[inside]))
        with torch.no_grad():
            want = F.cross_entropy(model(ids[None, :-1])[0][0], ids[1:], reduction="none")
        # float32: sums in another order
        np.testing.assert_allclose(tokens.losses[inside], want.numpy(), atol=2e-5)
        assert tokens.position[inside].tolist() == list(range(1, inside.sum() + 1))
        assert eos not in tokens.before[inside][1:]  # a document's end begins a context


def test_bits_per_byte_are_trainings_own(data, model):
    tokenizer, pairs = ByteTokenizer(), heldout.Pairs(data, 257)
    report = heldout.report(model, data, tokenizer, pairs, length=16)
    want = evaluate(model, data, tokenizer, length=16)
    assert report["bits_per_byte"] == pytest.approx(want.bits_per_byte, rel=1e-5)
    assert (report["held_out_tokens"], report["held_out_bytes"]) == (want.tokens, want.bytes)
    parts = [report[name] for name in ("recalled", "others")]
    assert sum(part["tokens"] for part in parts) == want.tokens
    mean = sum(part["tokens"] * part["loss"] for part in parts) / want.tokens
    assert mean == pytest.approx(want.loss, rel=1e-5)
    begins = [begin for begin, _ in report["by_position"]]
    assert begins == [1, 2, 4, 8, 16]


def test_what_is_recalled_by_hand(data):
    """Pairs that stand earlier in the same context and are rare in the training text; there "the" is not rare."""
    pairs = heldout.Pairs(data, 257)
    assert pairs.most == 1  # of some 1,300 training tokens, a millionth is less than one
    text = b"xq the xq the "
    ids = np.frombuffer(text, np.uint8).astype(np.int64)
    n = len(ids) - 1
    tokens = heldout.Tokens(np.zeros(n), ids[1:], ids[:-1], np.zeros(n, np.int64), np.arange(1, n + 1))
    found = heldout.recalled(tokens, pairs)
    marked = [text[t : t + 2].decode() for t in range(n) if found[t]]
    assert marked == ["xq", "q "]
    again = tokens._replace(context=np.arange(n) // 7)  # each half a context of its own: nothing stands before
    assert not heldout.recalled(again, pairs).any()


def test_nothing_recalled_is_no_error(data, model, tmp_path):
    pack(tmp_path / "data", ByteTokenizer(), [Document("a", "ab" * 50)], [Document("b", "0123456789")])
    pairs = heldout.Pairs(tmp_path / "data", 257)
    report = heldout.report(model, tmp_path / "data", ByteTokenizer(), pairs, length=8)
    assert report["recalled"] == {"tokens": 0, "loss": None}
    assert math.isfinite(report["others"]["loss"])


def test_training_mode_is_as_before(data, model):
    model.train()
    heldout.read(model, data, length=16, tokens=20)
    assert model.training
