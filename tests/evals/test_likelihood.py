"""Scores against the plain way (each row read whole and alone, all logits computed), and known probabilities."""

import math

import pytest
import torch

from retentive.evals import likelihood
from retentive.evals.likelihood import Request, common_prefix, encode, score
from retentive.evals.likelihood_tasks import windows
from retentive.models import build, peer, retnet


def plain(model, request: Request) -> tuple[float, bool]:
    """Scores by the definition: one row, no state passed on."""
    ids = torch.tensor([request.context + request.continuation])
    with torch.no_grad():
        logits = model(ids)[0][0, len(request.context) - 1 : -1]
    target = ids[0, len(request.context) :]
    return float(logits.log_softmax(-1).gather(1, target[:, None]).sum()), bool((logits.argmax(-1) == target).all())


def some(*lengths: int, start: int = 0) -> list[int]:
    return torch.randint(start, 257, (sum(lengths),)).tolist()


def groups() -> list[list[Request]]:
    """Returns one context for several choices, contexts that differ late or at once, one choice, short contexts."""
    a, b = some(9), some(30)
    return [
        [Request(a, some(n)) for n in (1, 7, 4, 2)],
        [Request(b, some(3)), Request([*b[:20], *some(5)], some(3))],
        [Request([1, 2, 3], some(2)), Request([2, 2, 3], some(2))],
        [Request(some(40), some(12))],
        [Request([256], some(5)), Request([256], some(6))],
        [Request([7], some(25))],
    ]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget, chunk", [(8192, 4096), (64, 4096), (8192, 7), (1, 3)])
def test_batches_states_and_chunks_change_nothing(model, monkeypatch, budget, chunk, share):
    monkeypatch.setattr(likelihood, "BUDGET", budget)
    monkeypatch.setattr(likelihood, "CHUNK", chunk)
    monkeypatch.setattr(likelihood, "HEAD", 5)
    asked, told = groups(), []
    found = score(model, asked, share=share, progress=told.append)
    assert told[-1] == len(asked)
    for requests, scores in zip(asked, found, strict=True):
        for request, got in zip(requests, scores, strict=True):
            expected, greedy = plain(model, request)
            assert math.isclose(got.logprob, expected, rel_tol=1e-10)  # float64, another order of sums
            assert got.greedy == greedy and got.tokens == len(request.continuation)


def test_where_states_are_large_each_question_is_a_batch(model, monkeypatch):
    asked, told = groups(), []
    expected = score(model, asked)
    monkeypatch.setattr(likelihood, "STATES", 1)
    for one, other in zip(score(model, asked, progress=told.append), expected, strict=True):
        assert [x.logprob for x in one] == pytest.approx([x.logprob for x in other], rel=1e-10)
    assert told == list(range(1, len(asked) + 1))


def test_what_is_greedy_is_found_to_be(model):
    context, ids = [256, 1, 2], []
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(torch.tensor([[*context, *ids]]))[0][0, -1].argmax()))
    other = [*ids[:3], (ids[3] + 1) % 257]
    ((first, second),) = score(model, [[Request(context, ids), Request(context, other)]])
    assert first.greedy and not second.greedy and first.logprob > second.logprob


def test_known_probabilities(bigram):
    table = torch.randn(257, 257, dtype=torch.float64)
    logp = table.log_softmax(-1)
    context, continuation = some(6), some(9)
    ((got,),) = score(bigram(table), [[Request(context, continuation)]])
    pairs = zip([context[-1], *continuation], continuation, strict=False)
    assert math.isclose(got.logprob, sum(float(logp[a, b]) for a, b in pairs), rel_tol=1e-9)


def test_the_model_is_left_in_training_mode(model):
    model.train()
    score(model, groups())
    assert model.training


def test_common_prefix():
    a = [1, 2, 3, 4]
    assert common_prefix([Request(a, [5]), Request(a, [6])]) == 3  # the last token predicts the choice
    assert common_prefix([Request(a, [5]), Request([1, 2, 9, 4], [6])]) == 2
    assert common_prefix([Request(a, [5]), Request([1, 2], [6])]) == 1
    assert common_prefix([Request(a, [5]), Request([9], [6])]) == 0
    assert common_prefix([Request(a, [5])]) == 0


def test_spaces_at_the_end_of_a_prompt_belong_to_what_follows(tokenizer):
    assert encode(tokenizer, "a b ", "c") == encode(tokenizer, "a b", " c") == Request([256, *b"a b"], [*b" c"])
    assert encode(tokenizer, "", " c") == Request([256], [*b" c"])


def test_a_continuation_without_a_token_of_its_own(tokenizer, refuses):
    with refuses("the continuation '' has no token of its own after 'a b'"):
        encode(tokenizer, "a b", "")


@pytest.mark.parametrize("length", [2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 9, 16, 17])
def test_windows_predict_each_token_once_from_as_much_as_they_may_see(length, count):
    ids = list(range(100, 100 + count))
    cuts = windows(ids, 0, length)
    assert [i for cut in cuts for i in cut.continuation] == ids
    seen = [len(cut.context) + len(cut.continuation) - 1 for cut in cuts]
    assert all(n == length for n in seen[1:]) and seen[0] == min(length, count)
    text = [0, *ids]
    for cut in cuts:
        whole = [*cut.context, *cut.continuation]
        at = text.index(whole[0])
        assert text[at : at + len(whole)] == whole


@pytest.mark.parametrize("count", [1, 5, 6, 23])
def test_a_window_as_long_as_the_text_is_the_text_uncut(model, tokenizer, count):
    ids = some(count)
    uncut, *cuts = score(model, [[Request([256], ids)], *([cut] for cut in windows(ids, 256, 23))])
    assert len(cuts) == 1 and math.isclose(uncut[0].logprob, cuts[0][0].logprob, rel_tol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "mamba2"])
def test_a_model_without_a_state_is_scored_all_the_same(kind):
    """Each request is read whole."""
    pytest.importorskip("transformers")
    model = build(peer(retnet(vocab_size=31, dim=32, layers=2, heads=2), kind)).eval()
    groups = [[Request([3, 4, 5], [6, 7]), Request([3, 4, 5], [8])], [Request([9], [1, 2, 3, 4])]]
    for scores, group in zip(score(model, groups), groups, strict=True):
        for found, request in zip(scores, group, strict=True):
            logprob, greedy = plain(model, request)
            assert found.logprob == pytest.approx(logprob, abs=1e-4) and found.greedy == greedy  # float32
