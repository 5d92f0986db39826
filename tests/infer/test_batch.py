"""Prompts with a common prefix: it is read once, and each prompt gives the tokens that it gives alone."""

import pytest
import torch

from retentive.infer import SamplingParams, batch, generate
from retentive.infer.batch import generate_batch
from retentive.infer.beam import beam_search
from retentive.models import build, retnet, twin

TINY = retnet(vocab_size=61, dim=32, layers=2, heads=2)


def test_what_is_read_once(monkeypatch):
    monkeypatch.setattr(batch, "SHARED", 3)
    a, b, c = [1, 2, 3], [4, 5, 6], [7]
    prompts = [c, [*a, 1], [*a, 2, 2], [*a, 2, 3], a, [*b, 1], c, [*b, *b], [*b, *b]]
    parts = list(batch.together(prompts))
    # `a` alone would leave no token to read
    assert [(count, len(group)) for count, group in parts] == [(0, 1), (3, 3), (0, 3), (5, 2)]
    assert [prompt for _, group in parts for prompt in group] == prompts
    assert list(batch.together([])) == [] and list(batch.together([a])) == [(0, [a])]


@pytest.mark.parametrize("config", [TINY, twin(TINY)], ids=["retnet", "twin"])
def test_the_tokens_are_those_of_each_by_itself(config, monkeypatch):
    monkeypatch.setattr(batch, "SHARED", 20)
    torch.manual_seed(1)
    model = build(config).double().eval()
    for p in model.parameters():  # far from uniform, so that another state gives other tokens
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    text = torch.randint(61, (30,)).tolist()
    prompts = [[3], [*text, 4], [*text, 5, 6], [*text, 5, 7], [8, 9]]
    read = []
    kept = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *a, **how: read.append(ids.numel()) or kept(ids, *a, **how))
    found = generate_batch(model, prompts, max_tokens=9, stop_ids=[0])
    assert sum(read) < 2 * len(text) + 9 * len(prompts)  # the text once, and not three times
    greedy = SamplingParams(temperature=0)
    assert found == [
        [token.id for token in generate(model, ids, greedy, max_tokens=9, stop_ids=[0])] for ids in prompts
    ]
    drawn = generate_batch(model, prompts, max_tokens=9, sampling=SamplingParams())
    own = [SamplingParams(temperature=1.0, seed=n) for n in range(5)]
    assert drawn == [
        [token.id for token in generate(model, ids, params, max_tokens=9)]
        for ids, params in zip(prompts, own, strict=True)
    ]
    counts = []
    best = generate_batch(model, prompts, max_tokens=9, stop_ids=[0], beams=3, done=counts.append)
    assert best == [beam_search(model, ids, beams=3, max_tokens=9, stop_ids=[0])[0][0] for ids in prompts]
    assert counts == [1, 2, 3, 4, 5]
    assert generate_batch(model, [], max_tokens=9) == []
