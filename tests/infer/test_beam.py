"""Beam search against all possible continuations, and against greedy decoding."""

import math
from itertools import product

import pytest
import torch

from retentive.infer import SamplingParams, generate
from retentive.infer.beam import beam_search
from retentive.models import build, retnet
from tests.infer.kinds import kinds

V, DEPTH, STOP = 4, 4, 3
CONFIG = retnet(vocab_size=V, dim=16, layers=2, heads=2)
MODELS = kinds(CONFIG)
PROMPT = [0, 1, 2, 2, 1]


@pytest.fixture(params=MODELS)
def model(request):
    out = build(MODELS[request.param]).double().eval()
    for p in out.parameters():
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return out


@torch.no_grad()
def everything(model, length_penalty: float) -> list[tuple[list[int], float]]:
    """All continuations of the prompt, each with its score, read by the model in one batch; the best first."""
    found = {}
    every = list(product(range(V), repeat=DEPTH))
    logits = model(torch.tensor([[*PROMPT, *tokens] for tokens in every]))[0][:, len(PROMPT) - 1 : -1].log_softmax(-1)
    for tokens, row in zip(map(list, every), logits, strict=True):
        if STOP in tokens:
            tokens = tokens[: tokens.index(STOP) + 1]
        total = float(row[: len(tokens)].gather(1, torch.tensor(tokens)[:, None]).sum())
        found[tuple(t for t in tokens if t != STOP), len(tokens)] = total / len(tokens) ** length_penalty
    return sorted(((list(tokens), score) for (tokens, _), score in found.items()), key=lambda pair: -pair[1])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.7])
def test_enough_beams_find_everything_in_order(model, length_penalty):
    got = beam_search(model, PROMPT, beams=V**DEPTH, max_tokens=DEPTH, stop_ids=[STOP], length_penalty=length_penalty)
    want = everything(model, length_penalty)
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]
    torch.testing.assert_close([score for _, score in got], [score for _, score in want], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stop_ids", [[], [STOP]], ids=["no-stop", "stop"])
def test_one_beam_is_greedy(model, stop_ids):
    want = [t.id for t in generate(model, PROMPT, SamplingParams(temperature=0), max_tokens=30, stop_ids=stop_ids)]
    ((tokens, _),) = beam_search(model, PROMPT, beams=1, max_tokens=30, stop_ids=stop_ids)
    assert tokens == want


@pytest.fixture
def garden_path(model):
    """A model of token pairs whose likeliest first token leads nowhere: p(next | last) is a table.

    After 1 the token 0 is the likeliest (0.6), but what follows it is not sure; 2 has 0.4, and is followed by 2
    for ever.
    Embeddings are unit vectors and blocks add nothing, so the output matrix is the table.
    """
    table = torch.tensor([0.4, 0.2, 0.2, 0.2], dtype=torch.float64).repeat(V, 1)
    table[1] = torch.tensor([0.6, 1e-9, 0.4, 1e-9])
    table[2] = torch.tensor([1e-9, 1e-9, 1.0, 1e-9])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("out_proj.weight", "down_proj.weight", "convolution.weight")):
                p.zero_()
        units = torch.eye(V, CONFIG.dim, dtype=torch.float64)
        model.embed.weight.copy_(units)
        model.head.weight.zero_()[:, :V] = table.log().T / model.norm(units).diagonal()
    return model


@torch.no_grad()
def test_beams_find_what_greedy_decoding_misses(garden_path):
    (greedy,) = beam_search(garden_path, PROMPT, beams=1, max_tokens=3, length_penalty=0)
    found = beam_search(garden_path, PROMPT, beams=3, max_tokens=3, length_penalty=0)
    assert greedy == ([0, 0, 0], pytest.approx(math.log(0.6 * 0.4 * 0.4), abs=1e-6))
    assert found[0] == ([2, 2, 2], pytest.approx(math.log(0.4), abs=1e-6)) and len(found) == 3
    assert found[0][1] > greedy[1]


@torch.no_grad()
def test_scores_are_those_that_the_model_itself_gives(model):
    found = beam_search(model, PROMPT, beams=3, max_tokens=8, length_penalty=0)
    for tokens, score in found:
        logits = model(torch.tensor([PROMPT + tokens]))[0][0, len(PROMPT) - 1 : -1].log_softmax(-1)
        assert float(logits.gather(1, torch.tensor(tokens)[:, None]).sum()) == pytest.approx(score, abs=1e-9)
    assert len(found) == 3 and [score for _, score in found] == sorted((s for _, s in found), reverse=True)


def test_logits_of_nan_are_refused(model, refuses):
    with torch.no_grad():
        model.head.weight[1] = float("nan")
    with refuses("the model's logits are not finite", ArithmeticError):
        beam_search(model, PROMPT, beams=2, max_tokens=3)


def test_a_past_and_first_tokens(model):
    whole = beam_search(model, PROMPT, beams=3, max_tokens=5)
    with torch.no_grad():
        state = model.hidden(torch.tensor([PROMPT[:3]]))[1]
    assert [t for t, _ in beam_search(model, PROMPT[3:], beams=3, max_tokens=5, state=state)] == [t for t, _ in whole]
    assert all(tokens[0] == 2 for tokens, _ in beam_search(model, PROMPT, beams=3, max_tokens=2, first_ids=[2]))


@pytest.mark.parametrize("bad", [dict(beams=0, max_tokens=1), dict(beams=1, max_tokens=0)])
def test_bad_arguments(model, bad, refuses):
    with refuses("`beams` and `max_tokens` must be at least 1"):
        beam_search(model, PROMPT, **bad)


def test_more_beams_than_there_is_memory_for_are_refused(model, monkeypatch, refuses):
    monkeypatch.setattr("retentive.infer.beam.machine.free_memory", lambda device: 10_000)
    with refuses("`beams=1000000`: the states take "):
        beam_search(model, PROMPT, beams=1_000_000, max_tokens=DEPTH)
