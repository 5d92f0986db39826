"""Embeddings: a text's vector is that of the text alone, from the hidden states of the model."""

import pytest
import torch

import retentive
from retentive.data.tokenizer import ByteTokenizer
from retentive.infer import embed as module
from retentive.models import retnet, transformer
from retentive.native import with_engine
from tests.configs import hybrid
from tests.export.variants import TINY, peaked_model

TEXTS = ["a cat", "a much longer text about dogs and mats", "x", "a cat"]
MODELS = {
    "retnet": retnet(**TINY),
    "twin": transformer(**TINY),
    "hybrid": hybrid(**{**TINY, "layers": 4}, attention=(1,), attention_window=8),
}


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("chunk", [4, 64, 4096])
def test_vectors_are_those_of_hidden_states(kind, pooling, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    model, own = peaked_model(MODELS[kind]), ByteTokenizer()
    found = retentive.embed(model, TEXTS, tokenizer=own, pooling=pooling)
    for vector, text in zip(found, TEXTS, strict=True):
        with torch.no_grad():
            x, _ = model.hidden(torch.tensor([[own.eos_id, *own.encode(text)]]))
        wanted = x[0, 1:].mean(0) if pooling == "mean" else x[0, -1]
        # two forms of retention over chunks, in float32
        torch.testing.assert_close(vector, wanted / wanted.norm(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], found[3])


def test_the_c_engine_gives_the_same():
    model = peaked_model(MODELS["hybrid"])
    wanted = retentive.embed(model, TEXTS, tokenizer=ByteTokenizer())
    model = with_engine(model)
    torch.testing.assert_close(retentive.embed(model, TEXTS, tokenizer=ByteTokenizer()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ([], {}, "`texts` must be a list of texts, one or more"),
        ("a text", {}, "`texts` must be a list of texts"),
        (["a", ""], {}, "a text to embed is empty"),
        (["a", 3], {}, "a text must be a string, got 3"),
        (["a"], {"pooling": "max"}, "`pooling='max'`: expected one of mean, last"),
    ],
)
def test_bad_input(texts, options, words):
    with pytest.raises((TypeError, ValueError)) as raised:
        retentive.embed(peaked_model(MODELS["retnet"]), texts, tokenizer=ByteTokenizer(), **options)
    assert words in str(raised.value)


def test_output_that_is_not_finite():
    model = peaked_model(MODELS["retnet"])
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(ArithmeticError, match="not finite"):
        retentive.embed(model, ["a"], tokenizer=ByteTokenizer())
