"""Pictures and sound among ids: in chunks, in a batch and after a cache hit they give the tokens of one whole call."""

import random
from itertools import product

import numpy as np
import pytest
import torch

from retentive.data.media import Media, rows_of
from retentive.infer import SamplingParams, batch, generate
from retentive.infer.batch import generate_batch
from retentive.infer.beam import beam_search
from retentive.infer.cache import PrefixCache
from retentive.infer.engine import Engine
from retentive.infer.generate import prefill
from retentive.infer.media import read
from retentive.infer.memory import tensors
from retentive.infer.requests import Returns
from retentive.models import build, retnet, twin
from retentive.models.encoders import AudioConfig, ImageConfig, embedded, encoders_of, with_encoders

TINY = retnet(vocab_size=50, dim=32, layers=2, heads=2)
IMAGE = ImageConfig(token=50, size=8, patch=4, channels=1, dim=16, layers=1)
AUDIO = AudioConfig(token=51, mels=5, stack=2, dim=16)
GREEDY = SamplingParams(temperature=0)


def seeing(config=TINY):
    torch.manual_seed(0)
    model = with_encoders(build(config), {"image": IMAGE, "audio": AUDIO}).double().eval()
    for p in model.parameters():  # far from uniform: another state gives other tokens
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return model


@pytest.fixture(params=[TINY, twin(TINY)], ids=["retnet", "twin"])
def model(request):
    return seeing(request.param)


def media(seed=0):
    random = np.random.default_rng(seed)
    return [
        Media("image", random.integers(0, 256, (4, 16), np.uint8)),
        Media("audio", random.standard_normal((7, 10)).astype(np.float16)),
        Media("image", random.integers(0, 256, (8, 16), np.uint8)),
    ]


IDS = [1, *[50] * 4, 2, *[51] * 7, 3, 4, *[50] * 8, 5, 6]


def rows(seed=0):
    a, b, c = media(seed)
    return rows_of([{"content": ["look", a, "and", b]}, {"content": "no"}, {"content": [c]}])


def encoded(monkeypatch, model) -> list[tuple[str, int]]:
    """(kind, number of rows) of each later call of an encoder."""
    calls = []
    for kind, encoder in encoders_of(model).items():

        def forward(x, kind=kind, own=encoder.forward):
            calls.append((kind, len(x)))
            return own(x)

        monkeypatch.setattr(encoder, "forward", forward)
    return calls


@pytest.mark.parametrize("chunk", [1, 3, 9, 4096])
@torch.no_grad()
def test_chunks_give_the_state_of_all_at_once(model, chunk, same, monkeypatch):
    (a, b, c), given = media(), rows()
    assert np.array_equal(given["image"], np.concatenate([a.rows, c.rows])) and np.array_equal(given["audio"], b.rows)
    x = embedded(model, torch.tensor([IDS]), {kind: torch.from_numpy(each) for kind, each in given.items()})
    want, end = model(None, embeds=x)
    calls = encoded(monkeypatch, model)
    logits, state = prefill(model, torch.tensor([IDS]), rows=given, chunk=chunk)
    same(logits[0], want[0, -1], 1e-10)
    same(tensors(state), tensors(end), 1e-10)
    # pictures whole and once, sound as it comes
    seen, heard = ([n for kind, n in calls if kind == which] for which in ("image", "audio"))
    assert sum(seen) == 12 and all(n % 4 == 0 for n in seen)
    assert sum(heard) == 7 and all(n <= chunk for n in heard)
    # and on from there as from any text
    tokens = [t.id for t in generate(model, IDS, GREEDY, rows=given, max_tokens=5)]
    assert tokens[0] == int(want[0, -1].argmax())
    state = read(model, IDS[:-1], given)
    assert tokens == [t.id for t in generate(model, IDS[-1:], GREEDY, max_tokens=5, state=state)]
    other = prefill(model, torch.tensor([IDS]), rows={**given, "audio": given["audio"] + np.float16(1)}, chunk=chunk)[0]
    assert (other - logits).abs().max() > 1e-3


def requests(count: int) -> list[tuple[list[int], dict[str, np.ndarray]]]:
    """Prompts of text, pictures and sound in any order; several begin with the same picture."""
    rng, made = random.Random(0), []
    for n in range(count):
        ids, parts = [rng.randrange(50) for _ in range(rng.choice([1, 3, 20]))], []
        for _ in range(n % 4):
            part = rng.choice(media(rng.randrange(2)))
            parts.append(part)
            ids += [{"image": 50, "audio": 51}[part.kind]] * len(part.rows)
            ids += [rng.randrange(50) for _ in range(rng.choice([0, 1, 6]))]
        made.append(([*ids, rng.randrange(50)], rows_of([{"content": parts}])))
    return made


def alone(model, ids, given, n=6) -> list[int]:
    return [t.id for t in generate(model, ids, GREEDY, rows=given, max_tokens=n)]


def run(engine) -> None:
    while engine.step():
        pass


@pytest.mark.parametrize("count", [12, pytest.param(24, marks=pytest.mark.slow)])
def test_in_a_batch_with_text_each_gets_its_own_tokens(count, model):
    todo = requests(count)
    want = [alone(model, *each) for each in todo]
    for chunk, cached in product([2, 9, 512], [False, True]):
        rng, cache = random.Random(1), PrefixCache(1 << 24, every=5) if cached else None
        engine, streams = Engine(model, slots=5, prefill_chunk=chunk, waiting=100, cache=cache), []
        for ids, given in [*todo, *todo[: count // 2]]:
            streams += engine.submit(ids, GREEDY, rows=given, max_tokens=6)
            for _ in range(rng.randrange(4)):
                engine.step()
        run(engine)
        assert [[t.id for t in s] for s in streams] == [*want, *want[: count // 2]], (chunk, cached)
        assert engine.taken == 0 and (cache is None or cache.hits > count // 3)


def test_encoders_run_once_for_all_prompts_of_a_step_and_for_no_more_than_a_chunk(model, monkeypatch):
    calls, given = encoded(monkeypatch, model), {"image": rows()["image"][:4]}
    ids = [1, *[50] * 4, 5, 6]
    engine = Engine(model, slots=8, prefill_chunk=64)
    streams = [engine.submit(ids, GREEDY, rows=given, max_tokens=6)[0] for _ in range(8)]
    engine.step()
    assert calls == [("image", 32)]
    run(engine)
    assert [[t.id for t in s] for s in streams] == [alone(model, ids, given)] * 8
    # a chunk of 6: the short text is read first; beside it two tokens of each could be, but pictures are encoded whole
    calls.clear()
    engine = Engine(model, slots=8, prefill_chunk=6)
    streams = [engine.submit(ids, GREEDY, rows=given, max_tokens=6)[0] for _ in range(3)]
    (text,) = engine.submit([7, 8, 9], GREEDY, max_tokens=6)
    engine.step()
    assert calls == [("image", 8)] and text.ids not in [p.ids for p in engine.reading]  # the two that came first
    run(engine)
    assert calls == [("image", 8), ("image", 4)]
    assert [[t.id for t in s] for s in streams] == [alone(model, ids, given)] * 3
    assert [t.id for t in text] == alone(model, [7, 8, 9], None)


def test_a_picture_larger_than_a_chunk_is_encoded_once_and_read_between_steps(model, monkeypatch):
    calls, given = encoded(monkeypatch, model), {"image": rows()["image"]}
    ids = [1, *[50] * 12, 5, 6]
    engine = Engine(model, slots=2, prefill_chunk=1)
    (running,) = engine.submit([3], GREEDY, max_tokens=40)
    engine.step()
    (seen,) = engine.submit(ids, GREEDY, rows=given, max_tokens=6)
    for n in range(13):
        engine.step()
        assert running.inbox.qsize() == n + 2  # the text goes on meanwhile
    assert calls == [("image", 4)] * 3  # one picture at a time, each when its first token is read
    run(engine)
    assert [t.id for t in seen] == alone(model, ids, given)


def test_the_same_picture_is_found_in_the_cache_and_another_is_not(model, monkeypatch):
    cache = PrefixCache(1 << 22, every=100)
    engine = Engine(model, slots=2, cache=cache)
    one, other = rows(0), rows(1)
    assert one["image"].shape == other["image"].shape

    def ask(ids, given) -> tuple[list[int], int]:
        (stream,) = engine.submit(ids, GREEDY, rows=given, max_tokens=6)
        run(engine)
        return [t.id for t in stream], stream.cached

    assert ask(IDS, one) == (alone(model, IDS, one), 0)
    calls = encoded(monkeypatch, model)
    assert ask(IDS, one) == (alone(model, IDS, one), len(IDS) - 1)
    assert ask([*IDS[:-2], 7, 8], one) == (alone(model, [*IDS[:-2], 7, 8], one), len(IDS) - 2)  # another question
    reply = alone(model, IDS, one)
    assert ask([*IDS, *reply, 9], one)[1] == len(IDS) + len(reply) - 1  # the talk goes on
    calls.clear()
    assert ask(IDS, other) == (alone(model, IDS, other), 0)  # the same ids
    # one number of the last picture's last row, which all its tokens depend on
    changed = {**one, "image": one["image"].copy()}
    changed["image"][-1, -1] ^= 1
    assert ask(IDS, changed)[1] == 0
    louder = {**one, "audio": one["audio"] + np.float16(1)}
    assert ask(IDS, louder)[1] == 0
    assert ask([i if i < 50 else 9 for i in IDS], None)[1] == 0
    assert calls  # what was not found was encoded


def test_a_cached_state_may_end_within_a_picture(model):
    """The whole picture is encoded, although a part of it is read already."""
    engine = Engine(model, slots=1, cache=PrefixCache(1 << 22, every=3))  # after 3, 6, … tokens: pictures at 1 and 15
    prompts = [(IDS, rows(0)), ([*IDS[:15], *IDS[15:23], 7, 9], rows(0))]
    changed = {**rows(0), "image": rows(0)["image"].copy()}
    changed["image"][8:] = rows(1)["image"][8:]  # the last picture alone
    prompts.append((IDS, changed))
    prompts.append(([*IDS[:19], 4], {"audio": rows(0)["audio"], "image": rows(0)["image"][:8]}))
    for ids, given in prompts:
        (stream,) = engine.submit(ids, GREEDY, rows=given, max_tokens=6)
        run(engine)
        assert [t.id for t in stream] == alone(model, ids, given)
    assert stream.cached == 18  # it reads on in the middle of a picture … of which 4 tokens are known


def test_a_cancelled_prompt_is_read_no_further(model, monkeypatch):
    calls = encoded(monkeypatch, model)
    engine = Engine(model, slots=1, prefill_chunk=2)
    (stream,) = engine.submit(IDS, GREEDY, rows=rows())
    engine.step()
    stream.cancel()
    run(engine)
    assert stream.reason == "cancelled" and calls == [("image", 4)] and engine.taken == 0


def test_an_encoder_that_fails_ends_its_own_request(model, monkeypatch):
    engine = Engine(model, slots=2)
    (text,) = engine.submit([1], GREEDY, max_tokens=9)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(encoders_of(model)["audio"], "forward", lambda x: 1 / 0)
        (stream,) = engine.submit(IDS, GREEDY, rows=rows())
        run(engine)
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert [t.id for t in text] == alone(model, [1], None, 9) and engine.taken == 0


def test_the_state_before_an_answer_goes_on_to_another(model):
    engine = Engine(model, slots=1)
    (stream,) = engine.submit(IDS, GREEDY, rows=rows(), max_tokens=3, returns=Returns(state=True))
    run(engine)
    said = [t.id for t in stream]
    cut = generate(model, [IDS[-1], *said[:1]], GREEDY, max_tokens=5, state=stream.prompt_state.clone())
    assert said[:1] + [t.id for t in cut] == alone(model, IDS, rows())
    later = generate(model, stream.pending, GREEDY, max_tokens=3, state=stream.state)
    assert said + [t.id for t in later] == alone(model, IDS, rows())
    (text,) = engine.submit([1, 2], max_tokens=3, returns=Returns(state=True))
    run(engine)
    assert text.prompt_state is None  # its ids say it all


def test_many_prompts_read_once_what_they_begin_with(model, monkeypatch):
    monkeypatch.setattr(batch, "SHARED", 8)
    calls = encoded(monkeypatch, model)
    prompts = [[*IDS[:-2], 7, 8], [*IDS[:-2], 9], [1, 2], IDS, IDS]
    given = [rows(0), rows(0), {}, rows(1), rows(0)]
    found = generate_batch(model, prompts, max_tokens=6, rows=given)
    assert sum(n for kind, n in calls if kind == "image") == 3 * 12  # the first two are about the same
    assert found == [alone(model, *each) for each in zip(prompts, given, strict=True)]
    best = generate_batch(model, prompts, max_tokens=6, rows=given, beams=2)
    each = zip(prompts, given, strict=True)
    assert best == [beam_search(model, ids, rows=own, beams=2, max_tokens=6)[0][0] for ids, own in each]


def test_words_alone_are_penalised(model):
    """Placeholders are outside the vocabulary, so the repetition penalty does not apply to them."""
    params = SamplingParams(temperature=0, repetition_penalty=1.5)
    want = [t.id for t in generate(model, IDS, params, rows=rows(), max_tokens=6)]
    engine = Engine(model, slots=1)
    (stream,) = engine.submit(IDS, params, rows=rows(), max_tokens=6)
    run(engine)
    assert [t.id for t in stream] == want


def test_what_does_not_fit(refuses):
    model, given = seeing(), rows()
    engine = Engine(model)
    for ids, wrong, why in (
        (IDS[:6], {"image": given["image"]}, "4 placeholders of image and 12 rows: each takes one"),
        (IDS, {"image": given["image"]}, "7 placeholders of audio and 0 rows: each takes one"),
        (IDS, {**given, "video": given["image"]}, "the model has no encoder for video: it was trained without any"),
        (IDS, {**given, "image": given["image"][:, 1:]}, "image rows [12, 15]: the encoder reads rows of 16"),
        ([1, 50, 50, 2], {"image": given["image"][:2]}, "2 rows of image: each has 4; give all of them"),
        ([*IDS, 52], given, "token ids must be from 0 to 49, got 52"),
        (IDS, {}, "token ids must be from 0 to 49, got 5"),
    ):
        with refuses(why):
            engine.submit(ids, rows=wrong)
        with refuses(why):
            generate(model, ids, rows=wrong)
    with refuses("the prompt ends with a picture or sound: put text after it"):
        engine.submit(IDS[:5], rows={"image": given["image"][:4]})
    with refuses("a prompt's own log probabilities are of text alone: leave out pictures and sound"):
        engine.submit(IDS, rows=given, returns=Returns(prompt=True))
    with refuses("the model has no encoder for audio: it was trained without any"):
        Engine(build(TINY)).submit(IDS, rows={"audio": given["audio"]})
    assert rows_of([{"content": "text"}]) == {} and len(encoders_of(model)) == 2 and not engine.queue
