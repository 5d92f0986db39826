"""Held-out loss token by token, against the model's own logits, context by context; recall by hand."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retentive.data.mixture import Mixture
from retentive.data.pack import pack
from retentive.data.packed import Packed
from retentive.data.prepare import prepare
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer
from retentive.evals import heldout
from retentive.models import build, retnet, twin
from retentive.ops.cross_entropy import IGNORE

TRAIN = ["the cat sat on the mat. " * 40, "a dog ran. " * 30]
VALID = ["xq zv xq zv the cat xq", "a dog and a quokka, a quokka! " * 3, "le café noir " * 9]
EOS = 256
IDS = [id for text in VALID for id in [*text.encode(), EOS]]
TINY = retnet(dim=32, layers=2, heads=2)
# float64 has 53 bits, 1e-16: hundreds of losses of two layers, summed in another order, lose thousands of times that
EXACT = 1e-12


def packed(folder, train, valid) -> Packed:
    documents = ([Document(str(n), text) for n, text in enumerate(texts)] for texts in (train, valid))
    pack(folder, ByteTokenizer(), *documents)
    return Packed(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Packed:
    return packed(tmp_path_factory.mktemp("heldout") / "data", TRAIN, VALID)


@pytest.fixture
def model():
    return build(TINY).eval()


def nats(model, ids: list[int]) -> float:
    """Returns minus the log probabilities of all tokens but the first, read as one sequence."""
    logprobs = model(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
    return -float(logprobs[range(len(ids) - 1), ids[1:]].sum())


@torch.no_grad()
def test_a_mixture_is_as_its_text_would_be_mixed(data, model, tmp_path):
    """By shares of tokens, 1 to 3, whatever the lengths of the held-out texts; and bytes of the same tokens."""
    other = packed(tmp_path / "other", TRAIN, ["so long " * 40, "and thanks"])
    silent = packed(tmp_path / "silent", TRAIN, [])
    mixture = Mixture([data, silent, other], [1, 4, 3])
    found = heldout.mixture_loss(model, mixture, length=16, tokens=200)
    alone = [heldout.held_out_loss(model, part, length=16, tokens=100) for part in (data, other)]
    assert list(found.parts.values()) == alone and list(found.parts) == ["data", "other"]
    assert found.loss == pytest.approx(0.25 * alone[0].loss + 0.75 * alone[1].loss, rel=EXACT)
    per_token = 0.25 * alone[0].bytes / alone[0].tokens + 0.75 * alone[1].bytes / alone[1].tokens
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / per_token, rel=EXACT)
    assert found.tokens == 198 and not found.exhausted(200) and found.exhausted(202)
    assert not alone[0].exhausted(100) and alone[0].exhausted(101)


@pytest.mark.parametrize("together", [1, 8192], ids=["one-by-one", "together"])
@pytest.mark.parametrize("tokens", [None, 133], ids=["all", "some"])
@pytest.mark.parametrize(
    ("config", "carry"), [(TINY, False), (TINY, True), (twin(TINY), False)], ids=["retnet", "retnet-carry", "twin"]
)
@torch.no_grad()
def test_bits_per_byte_by_hand(config, carry, tokens, together, data, monkeypatch):
    """A sequence begins with the end of the story before and, without carry, with every window."""
    monkeypatch.setattr(heldout, "TOGETHER", together)
    length, model = 24, build(config).double()
    ids = IDS[:tokens]
    starts = {0} | {n for n, id in enumerate(ids[:-1]) if id == EOS}
    starts |= set() if carry else set(range(0, len(ids) - 1, length))
    pieces = [ids[a : b + 1] for a, b in pairwise([*sorted(starts), len(ids) - 1])]
    want = sum(nats(model.eval(), piece) for piece in pieces)
    text = bytes(id for id in ids if id != EOS).decode(errors="ignore")
    got = heldout.held_out_loss(model, data, length=length, tokens=tokens, carry=carry)
    assert (got.tokens, got.bytes) == (len(ids) - 1, len(text.encode()))
    assert got.loss == pytest.approx(want / (len(ids) - 1), rel=EXACT)
    assert got.bits_per_byte == pytest.approx(want / math.log(2) / len(text.encode()), rel=EXACT)
    found = heldout.token_losses(model, data, length=length, tokens=tokens, carry=carry)
    counts = [len(piece) - 1 for piece in pieces]
    assert found.context.tolist() == [n for n, count in enumerate(counts) for _ in range(count)]
    assert found.position.tolist() == [t for count in counts for t in range(1, count + 1)]


@pytest.mark.parametrize("length", [1, 7, 10**6], ids=lambda n: f"length{n}")
def test_a_uniform_model_spends_the_logarithm_of_the_vocabulary(length, data):
    model = build(TINY).double()
    torch.nn.init.zeros_(model.head.weight)
    got = heldout.held_out_loss(model, data, length=length)
    assert got.loss / math.log(2) == pytest.approx(math.log2(257), rel=EXACT)
    assert got.bits_per_byte == pytest.approx(math.log2(257) * (len(IDS) - 1) / got.bytes, rel=EXACT)


def test_bytes_are_those_of_whole_characters(data, model):
    """A token count that ends within é only covers the text before it."""
    second = next(n for n, id in enumerate(IDS) if 0x80 <= id < 0xC0)
    counts = (second - 1, second, second + 1)
    sizes = [heldout.held_out_loss(model, data, length=64, tokens=tokens).bytes for tokens in counts]
    ends = IDS[: second + 1].count(EOS)
    assert sizes == [second - 1 - ends, second - 1 - ends, second + 1 - ends]


def test_it_disturbs_nothing(data):
    """Dropout, random numbers, gradients and mode of a model in training stay as they are."""
    model = build(retnet(dim=32, layers=1, heads=2, dropout=0.5)).eval()
    want = heldout.held_out_loss(model, data, length=64)
    assert not model.training
    model.train()
    before, weights = torch.get_rng_state(), [p.detach().clone() for p in model.parameters()]
    assert heldout.held_out_loss(model, data, length=64) == want
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_a_failed_evaluation_leaves_the_model_in_its_mode(data, model, monkeypatch):
    monkeypatch.setattr(model, "hidden", lambda *args, **options: 1 / 0)
    model.train()
    with pytest.raises(ZeroDivisionError):
        heldout.token_losses(model, data, length=8)
    assert model.training


@pytest.mark.parametrize("length", [7, 16, 64])
def test_losses_are_those_of_each_context_alone(data, model, length):
    """Contexts end with the window and with the document; several windows go through the model at once."""
    tokens = heldout.token_losses(model, data, length=length)
    assert len(tokens.losses) == len(IDS) - 1
    for context in np.unique(tokens.context):
        inside = tokens.context == context
        ids = torch.from_numpy(np.append(tokens.before[inside][:1], tokens.ids[inside]))
        with torch.no_grad():
            want = F.cross_entropy(model(ids[None, :-1])[0][0], ids[1:], reduction="none")
        # float32: sums in another order
        np.testing.assert_allclose(tokens.losses[inside], want.numpy(), atol=2e-5)
        assert tokens.position[inside].tolist() == list(range(1, inside.sum() + 1))
        assert EOS not in tokens.before[inside][1:]  # the end of a document begins a context


def test_the_report_adds_up(data, model):
    report = heldout.report(model, data, heldout.Pairs(data), length=16)
    want = heldout.held_out_loss(model, data, length=16)
    assert (report["bits_per_byte"], report["loss"]) == (want.bits_per_byte, want.loss)
    assert (report["held_out_tokens"], report["held_out_bytes"]) == (want.tokens, want.bytes)
    parts = [report[name] for name in ("recalled", "others")]
    assert sum(part["tokens"] for part in parts) == want.tokens
    mean = sum(part["tokens"] * part["loss"] for part in parts) / want.tokens
    assert mean == pytest.approx(want.loss, rel=EXACT)
    begins = [begin for begin, _ in report["by_position"]]
    assert begins == [1, 2, 4, 8, 16]


def test_what_is_recalled_by_hand(data):
    """Pairs that occur earlier in the same context and are rare in the training text, where "the" is not rare."""
    pairs = heldout.Pairs(data)
    assert pairs.most == 1  # a millionth of some 1,300 training tokens is less than one
    text = b"xq the xq the "
    ids = np.frombuffer(text, np.uint8).astype(np.int64)
    n = len(ids) - 1
    tokens = heldout.Tokens(np.zeros(n), ids[1:], ids[:-1], np.zeros(n, np.int64), np.arange(1, n + 1))
    found = heldout.recalled(tokens, pairs)
    marked = [text[t : t + 2].decode() for t in range(n) if found[t]]
    assert marked == ["xq", "q "]
    again = tokens._replace(context=np.arange(n) // 7)  # each half is a context, with no earlier occurrence
    assert not heldout.recalled(again, pairs).any()


def test_nothing_recalled_is_no_error(model, tmp_path):
    data = packed(tmp_path / "data", ["ab" * 50], ["0123456789"])
    report = heldout.report(model, data, heldout.Pairs(data), length=8)
    assert report["recalled"] == {"tokens": 0, "loss": None}
    assert math.isfinite(report["others"]["loss"])


def test_of_conversations_the_answers_count(model, tmp_path, same):
    said = [{"prompt": "What?" * n, "completion": "Nothing much. " * n} for n in (1, 2, 30)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(each) + "\n" for each in said))
    prepare(tmp_path / "chats.jsonl", tmp_path / "out", chats=True, tokenizer="bytes", valid=tmp_path / "chats.jsonl",
            say=lambda line: None)  # fmt: skip
    data, wanted = Packed(tmp_path / "out"), []
    for batch in data.held_out(length=1):
        with torch.no_grad():
            logits, _ = model.double()(batch.ids)
        losses = F.cross_entropy(logits[0], batch.targets[0], reduction="none", ignore_index=IGNORE)
        wanted += losses[batch.targets[0] != IGNORE].tolist()
    assert len(wanted) == data.meta.splits["valid"].answers
    for carry in (False, True):
        found = heldout.held_out_loss(model, data, length=16, carry=carry)
        assert found.tokens == len(wanted) and abs(found.loss - np.mean(wanted)) < EXACT * 100
        assert found.bytes == sum(len(each["completion"].strip()) + 1 for each in said)


def test_yardsticks_of_a_text_that_is_known(tmp_path):
    """800 bytes of eight kinds, 100 each, and the two bytes of an é."""
    got = heldout.yardsticks(packed(tmp_path / "data", ["text"], ["abcdefgh" * 100, "é"]))
    p = [100 / 802] * 8 + [1 / 802] * 2
    assert got["bytes"] == 802
    assert got["order-0 entropy"] == pytest.approx(-sum(x * math.log2(x) for x in p))
    assert 0 < got["xz -9"] < 1.5, "xz sees the order; its own header is 60 bytes, 0.6 bits a byte here"
