"""`generate` of transformers writes what this package writes: greedy, padded, beams, assisted, from a cache."""

import pytest
import torch
from transformers import pipeline

from retentive.data.tokenizer import ByteTokenizer
from retentive.hf.modeling_retentive import CACHE
from retentive.infer.batch import generate_batch
from retentive.models.students import student
from tests.export.variants import ATTENDING, peaked, peaked_model

GREEDY = {"do_sample": False, "pad_token_id": 256, "eos_token_id": 256}
MODELS = {
    "retnet": lambda: peaked(),
    "convolution": lambda: peaked_model(ATTENDING["hybrid, window, convolution"]),
    "hybrid": lambda: peaked_model(ATTENDING["hybrid, window"]),
    "student": lambda: peaked_model(student(ATTENDING["twin"], window=8, sinks=3)),
    "twin": lambda: peaked_model(ATTENDING["twin"]),
}
NEW = 24


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def theirs(model, as_theirs):
    return as_theirs(model)


def prompts(count: int) -> list[list[int]]:
    made = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 40, (count,), generator=made).tolist()
    return [torch.randint(256, (n,), generator=made).tolist() for n in lengths]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    most = max(map(len, rows))
    ids = torch.tensor([[256] * (most - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (most - len(r)) + [1] * len(r) for r in rows])}


def written(out: torch.Tensor, after: int) -> list[int]:
    """Ids after the prompt, up to the end of the text."""
    ids = out[after:].tolist()
    return ids[: ids.index(256)] if 256 in ids else ids


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_greedy_is_ours_one_by_one_and_padded(count, model, theirs):
    rows = prompts(count)
    ours = generate_batch(model, rows, max_tokens=NEW, stop_ids=[256])
    batch = padded(rows)
    out = theirs.generate(**batch, max_new_tokens=NEW, **GREEDY)
    assert [written(row, batch["input_ids"].shape[1]) for row in out] == ours
    for row, want in zip(rows[: count // 5], ours, strict=False):
        out = theirs.generate(torch.tensor([row]), max_new_tokens=NEW, **GREEDY)
        assert written(out[0], len(row)) == want


@pytest.mark.parametrize("count", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_assisted_decoding_is_plain_decoding(count, theirs):
    other = type(theirs)(theirs.config).eval()  # drafts that are mostly wrong, so that tokens are taken back
    for row in prompts(count):
        ids = torch.tensor([row])
        plain = theirs.generate(ids, max_new_tokens=NEW, **GREEDY)
        for how in ({"assistant_model": theirs}, {"assistant_model": other}, {"prompt_lookup_num_tokens": 3}):
            assert torch.equal(theirs.generate(ids, max_new_tokens=NEW, **GREEDY, **how), plain)


def test_beams_and_parts_with_a_cache_are_those_without(theirs):
    batch = padded(prompts(4))
    for how in ({"num_beams": 4}, {}):
        want = theirs.generate(**batch, max_new_tokens=NEW, use_cache=False, **GREEDY, **how)
        assert torch.equal(theirs.generate(**batch, max_new_tokens=NEW, **GREEDY, **how), want)
    assert torch.equal(theirs.generate(**batch, max_new_tokens=NEW, prefill_chunk_size=5, **GREEDY), want)


def test_a_returned_cache_goes_on_and_may_be_copied_for_samples(theirs):
    batch = padded(prompts(2))
    out = theirs.generate(**batch, max_new_tokens=6, return_dict_in_generate=True, **GREEDY)
    more = torch.cat((out.sequences, torch.tensor([[1, 2, 3]] * 2)), 1)
    mask = torch.cat(
        (batch["attention_mask"], torch.ones(2, more.shape[1] - batch["attention_mask"].shape[1])), 1
    ).long()
    want = theirs.generate(more, attention_mask=mask, max_new_tokens=5, **GREEDY)
    got = theirs.generate(more, attention_mask=mask, max_new_tokens=5, **GREEDY, **{CACHE: getattr(out, CACHE)})
    assert torch.equal(got, want)
    torch.manual_seed(0)
    several = theirs.generate(**batch, max_new_tokens=6, do_sample=True, num_return_sequences=3, pad_token_id=256)
    assert several.shape[0] == 6 and len(set(map(tuple, several.tolist()))) > 2


def test_pipeline(exported):
    folder = exported(peaked(), tokenizer=ByteTokenizer())
    write = pipeline("text-generation", str(folder), trust_remote_code=True)
    found = write("The old house", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert found.startswith("The old house") and len(found) > len("The old house")
