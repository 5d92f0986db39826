"""Structured output of untrained models against an independent validator: the text always fits the constraint."""

import base64
import functools
import json
import re
import sys

import jsonschema
import pytest
import torch

from retentive.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from retentive.infer import SamplingParams, generate
from retentive.infer.engine import Engine
from retentive.infer.structured import json_schema, regex
from retentive.models import build, retnet, twin

TEXT = (
    'The café {"name": "Zoë", "size": 12, "tags": ["a", "b"]} has 17 chairs, 3.5 tables and a view of the river. ' * 9
)


def tiktoken_of(tmp_path):
    pytest.importorskip("tiktoken")
    path = tmp_path / "v.tiktoken"
    pieces = [bytes([i]) for i in range(256)] + [b'{"', b'": ', b', "', b"the"]

    path.write_text("".join(f"{base64.b64encode(p).decode()} {n}\n" for n, p in enumerate(pieces)))
    return load_tokenizer(path)


TOKENIZERS = {
    "bytes": lambda tmp_path: ByteTokenizer(),
    "bpe": lambda tmp_path: train_bpe([TEXT], 330),
    "tiktoken": tiktoken_of,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request, tmp_path):
    return TOKENIZERS[request.param](tmp_path)


@pytest.fixture(params=["retnet", "transformer"])
def model(request, tokenizer):
    """A model with ten tokens more than the tokenizer, as with a padded vocabulary."""
    config = retnet(vocab_size=tokenizer.vocab_size + 10, dim=16, layers=1, heads=1)
    out = build(config if request.param == "retnet" else twin(config)).eval()
    for p in out.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return out


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "size": {"type": "integer", "minimum": -20, "maximum": 300},
        "kind": {"enum": ["a", "bb", None, 3]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "minItems": 1, "maxItems": 3},
        "inner": {
            "anyOf": [
                {"type": "boolean"},
                {"type": "object", "properties": {"x": {"const": "y"}}, "additionalProperties": False},
            ]
        },
    },
    "required": ["name", "size", "kind", "tags"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": {"type": "string", "format": "date"}, "minItems": 2, "maxItems": 2}


def run(engine) -> None:
    while engine.step():
        pass


@pytest.mark.parametrize("schema", [PERSON, LIST], ids=["person", "list"])
def test_json_is_always_valid_under_its_schema(model, tokenizer, schema):
    engine, made = Engine(model, slots=6), json_schema(schema, tokenizer)
    streams = []
    for seed in range(12):
        params = SamplingParams(temperature=[0, 1, 3][seed % 3], top_p=[1, 0.9][seed % 2], seed=seed)
        streams += engine.submit([seed], params, constraint=made, max_tokens=400)
    run(engine)
    texts = [tokenizer.decode(t.id for t in s) for s in streams]
    assert {s.reason for s in streams} == {"stop"}
    for text in texts:
        jsonschema.validate(json.loads(text), schema)
        assert json.dumps(json.loads(text), ensure_ascii=False).count(" ") <= text.count(" ")  # one blank each
    assert len(set(texts)) > 5, "they differ"


def test_any_object(model, tokenizer):
    """Text is unbounded, so max_tokens may cut it off; texts that end are objects."""
    engine, made = Engine(model), json_schema({"type": "object"}, tokenizer)
    streams = [s for n in range(16) for s in engine.submit([n], SamplingParams(seed=n), constraint=made, max_tokens=60)]
    run(engine)
    ended = [tokenizer.decode(t.id for t in s) for s in streams if s.reason == "stop"]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)


PATTERNS = [r"(yes|no|maybe)!?", r"[0-9]{2}-[a-f]{1,3}", r"(caf\u00e9|na\u00efve|\u65e5\u672c)+"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_text_matches_its_pattern_from_beginning_to_end(model, tokenizer, pattern):
    engine, made = Engine(model), regex(pattern, tokenizer)
    streams = [s for n in range(12) for s in engine.submit([n], SamplingParams(seed=n), constraint=made, max_tokens=90)]
    run(engine)
    ended = [tokenizer.decode(t.id for t in s) for s in streams if s.reason == "stop"]
    assert len(ended) > 3 and all(re.fullmatch(pattern, text) for text in ended), ended


def test_the_end_of_text_ends_it_though_nobody_named_it(tokenizer):
    """`a+` is never complete: only the end of text, allowed once there is an a, ends it; it is not given out."""
    model = build(retnet(vocab_size=tokenizer.vocab_size, dim=16, layers=1, heads=1)).eval()
    engine, bias = Engine(model), {tokenizer.eos_id: 50.0}
    (stream,) = engine.submit([1], SamplingParams(bias=bias), constraint=regex("a+", tokenizer), max_tokens=99)
    run(engine)
    assert stream.reason == "stop" and set(tokenizer.decode(t.id for t in stream)) == {"a"}


def test_free_requests_beside_constrained_ones_keep_their_tokens(model, tokenizer):
    engine, made = Engine(model, slots=5), json_schema(PERSON, tokenizer)
    free, bound = [], []
    for n in range(6):
        free += engine.submit([n, 1], SamplingParams(seed=n), max_tokens=20)
        bound += engine.submit([n, 2], SamplingParams(seed=n), max_tokens=300, constraint=made)
        engine.step()
    run(engine)
    for n, stream in enumerate(free):
        want = [t.id for t in generate(model, [n, 1], SamplingParams(seed=n), max_tokens=20)]
        assert [t.id for t in stream] == want
    assert all(s.reason == "stop" for s in bound)


def test_streams_of_one_request_are_constrained_each_by_itself(model, tokenizer):
    engine, made = Engine(model), json_schema(PERSON, tokenizer)
    streams = engine.submit([3], SamplingParams(seed=0), n=5, constraint=made, max_tokens=400)
    run(engine)
    texts = [tokenizer.decode(t.id for t in s) for s in streams]
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(texts)) == 5


BAD = {
    "type": (json_schema, {"type": "nope"}, "the JSON schema cannot be used: Invalid type: nope"),
    "pattern": (json_schema, {"type": "string", "pattern": "("}, "error: unclosed group"),
    "keyword": (json_schema, {"not": {}}, "Unimplemented keys"),
    "impossible": (json_schema, {"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable schema"),
    "reference": (json_schema, {"$ref": "http://example.com/x"}, "cannot be used"),
    "endless": (json_schema, {"$ref": "#"}, "the JSON schema cannot be used"),
    "deep": (json_schema, functools.reduce(lambda x, _: {"items": x, "type": "array"}, range(3000), {}), "schema"),
    "no-object": (json_schema, ["a"], "a JSON schema must be an object, got list"),
    "no-json": (json_schema, {"enum": [{1, 2}]}, "the JSON schema is no JSON"),
    "group": (regex, "a(b", "the regular expression cannot be used: error: unclosed group"),
    "no-string": (regex, 5, "must be a string, got int"),
    "look-around": (regex, "(?=x)a", "look-around"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_ones_are_refused_in_a_line(case, refuses):
    make, what, words = BAD[case]
    with refuses(words):
        make(what, ByteTokenizer())


def test_the_extra_is_named_where_it_is_missing(monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with refuses("pip install 'retentive[structured]'", ImportError):
        regex("a", ByteTokenizer())


def test_a_token_that_is_not_allowed_ends_the_stream_with_an_error(refuses):
    constraint = regex("ab", ByteTokenizer())()
    with refuses("structured output failed"):
        constraint.accept(ord("z"))
