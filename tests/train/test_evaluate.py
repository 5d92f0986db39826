"""Bits per byte against log_softmax over each document by itself, and against what is known without computing."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from retentive.data.tokenizer import ByteTokenizer, train_bpe
from retentive.models import RetNetConfig, build, twin
from retentive.train.evaluate import evaluate

TINY = RetNetConfig(dim=32, layers=2, heads=2)
EOS = 256
# float64 has 53 bits, 1e-16: a thousand losses of two layers each, summed in another order, cost thousands of that
EXACT = 1e-12


@pytest.fixture
def held_out(packed) -> list[int]:
    """The ids of the held-out stories, an end of text after each."""
    return np.fromfile(packed / "valid-00000.bin", "<u2").tolist()


def nats(model, ids: list[int]) -> float:
    """Minus the log probabilities of all tokens but the first, read as one sequence."""
    logprobs = model(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
    return -float(logprobs[range(len(ids) - 1), ids[1:]].sum())


def pieces(ids: list[int], starts: list[int]) -> list[list[int]]:
    """The ids from each start to one past the next: what is read, and the token that its last one predicts."""
    return [ids[a : b + 1] for a, b in pairwise([*starts, len(ids) - 1])]


@pytest.mark.parametrize("tokens", [None, 333], ids=["all", "some"])
@pytest.mark.parametrize(
    ("config", "carry"), [(TINY, False), (TINY, True), (twin(TINY), False)], ids=["retnet", "retnet-carry", "twin"]
)
@torch.no_grad()
def test_bits_per_byte_by_hand(config, carry, tokens, packed, held_out):
    """A sequence begins with the end of the story before and, but for carry, with every window."""
    length, model = 48, build(config).double()
    ids = held_out[:tokens]
    starts = {0} | {n for n, id in enumerate(ids[:-1]) if id == EOS}
    starts |= set() if carry else set(range(0, len(ids) - 1, length))
    want = sum(nats(model.eval(), piece) for piece in pieces(ids, sorted(starts)))
    text = bytes(id for id in ids if id != EOS).decode(errors="ignore")
    got = evaluate(model, packed, ByteTokenizer(), length=length, tokens=tokens, carry=carry)
    assert (got.tokens, got.bytes) == (len(ids) - 1, len(text.encode()))
    assert got.loss == pytest.approx(want / (len(ids) - 1), rel=EXACT)
    assert got.bits_per_byte == pytest.approx(want / math.log(2) / len(text.encode()), rel=EXACT)


@pytest.mark.parametrize("length", [1, 7, 10**6], ids=lambda n: f"length{n}")
def test_a_uniform_model_spends_the_logarithm_of_the_vocabulary(length, packed, held_out):
    model = build(TINY).double()
    torch.nn.init.zeros_(model.head.weight)
    got = evaluate(model, packed, ByteTokenizer(), length=length)
    assert got.loss / math.log(2) == pytest.approx(math.log2(257), rel=EXACT)
    assert got.bits_per_byte == pytest.approx(math.log2(257) * (len(held_out) - 1) / got.bytes, rel=EXACT)


def test_bytes_are_those_of_whole_characters(packed, held_out):
    """A count that ends within é covers what is before it only."""
    second = next(n for n, id in enumerate(held_out) if 0x80 <= id < 0xC0)
    sizes = {
        tokens: evaluate(build(TINY), packed, ByteTokenizer(), length=64, tokens=tokens).bytes
        for tokens in (second - 1, second, second + 1)
    }
    ends = held_out[: second + 1].count(EOS)
    assert list(sizes.values()) == [second - 1 - ends, second - 1 - ends, second + 1 - ends]


def test_it_disturbs_nothing(packed):
    """Neither dropout nor the random numbers, the gradients or the mode of a model that is being trained."""
    model = build(RetNetConfig(dim=32, layers=1, heads=2, dropout=0.5)).train()
    model.eval()
    want = evaluate(model, packed, ByteTokenizer(), length=64)
    assert not model.training
    model.train()
    before, weights = torch.get_rng_state(), [p.detach().clone() for p in model.parameters()]
    assert evaluate(model, packed, ByteTokenizer(), length=64) == want
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_another_tokenizer_is_refused(packed, refuses):
    with refuses("the data were packed with tokenizer"):
        evaluate(build(TINY), packed, train_bpe(["some other text, some text"] * 9, 260), length=64)
