"""`/v1/embeddings` by the official client: the vectors of `retentive.embed`."""

import base64

import numpy as np
import openai
import pytest
import torch

from retentive.data.tokenizer import ByteTokenizer
from retentive.infer.embed import embed

TEXTS = ["a cat", "a much longer text about dogs"]


@pytest.mark.parametrize("form", ["base64", "float"])
@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_vectors_are_those_of_embed(form, pooling, server):
    more = {} if pooling is None else {"extra_body": {"pooling": pooling}}
    found = server.client().embeddings.create(model=server.service.name, input=TEXTS, encoding_format=form, **more)
    vectors = [x.embedding for x in found.data]
    if form == "base64":  # the client decodes only what it asked for by itself, as in the next test
        vectors = [np.frombuffer(base64.b64decode(x), "<f4").tolist() for x in vectors]
    wanted = embed(server.service.model, ByteTokenizer(), TEXTS, pooling=pooling or "mean")
    # another batch in the same engine; what is sent is float32, exactly
    torch.testing.assert_close(torch.tensor(vectors), wanted, rtol=1e-5, atol=1e-6)
    assert [x.index for x in found.data] == [0, 1] and found.usage.prompt_tokens == sum(len(t) + 1 for t in TEXTS)


def test_one_text_and_ids(server):
    client, name = server.client(), server.service.name
    one = client.embeddings.create(model=name, input="a cat").data
    same = client.embeddings.create(model=name, input=[list(b"a cat")]).data
    assert len(one) == 1 and one[0].embedding == same[0].embedding
    assert server.idle()


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        ({"input": []}, "expected a string, a list of token ids, or a list of either", "input"),
        ({"input": [""]}, "a text to embed is empty", "input[0]"),
        ({"input": ["a", ""]}, "a text to embed is empty", "input[1]"),
        ({"input": [[999]]}, "token ids must be from 0 to 256, got 999", "input"),
        ({"input": "a", "dimensions": 7}, "this model has 32 dimensions, got 7", "dimensions"),
        ({"input": "a", "pooling": "max"}, "Input should be 'mean' or 'last'", "pooling"),
        ({"input": "a", "encoding_format": "hex"}, "Input should be 'float' or 'base64'", "encoding_format"),
        ({"input": "a", "model": "other"}, "the model 'other' is not here", "model"),
    ],
    ids=str,
)
def test_bad_input(body, words, param, server):
    reply = server.http().post("/v1/embeddings", json=body)
    error = reply.json()["error"]
    assert reply.status_code in (400, 404) and words in error["message"] and error["param"] == param
    assert server.idle()


def test_a_text_that_is_too_long(server):
    before = server.service.options.max_prompt
    object.__setattr__(server.service.options, "max_prompt", 3)
    try:
        with pytest.raises(openai.BadRequestError, match="the texts have 6 tokens together, this server takes 3"):
            server.client().embeddings.create(model=server.service.name, input=["abc", "def"])
    finally:
        object.__setattr__(server.service.options, "max_prompt", before)


def test_a_model_that_fails(server, monkeypatch):
    def broken(*_):
        raise ArithmeticError("not finite")

    monkeypatch.setattr("retentive.serve.embeddings.embed_ids", broken)
    with pytest.raises(openai.InternalServerError, match="the model failed on this request: not finite"):
        server.client().embeddings.create(model=server.service.name, input="a cat")
    assert server.idle()
