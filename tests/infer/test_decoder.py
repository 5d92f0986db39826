"""The decoder's contract: TorchDecoder against the model's own call, and an engine with another decoder."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch

from retentive.infer import SamplingParams, generate
from retentive.infer.cache import PrefixCache
from retentive.infer.decoder import STATES, TorchDecoder
from retentive.infer.engine import Engine
from retentive.infer.memory import tensors
from retentive.infer.requests import Returns
from retentive.models import build
from retentive.models.encoders import ImageConfig, embedded, encoders_of, with_encoders
from tests.configs import changed
from tests.infer.memories import MODELS, ids

GREEDY = SamplingParams(temperature=0)
PROMPTS = [ids(n, n) for n in (7, 1, 30, 12)]
IMAGE = ImageConfig(token=61, size=8, patch=4, channels=1, dim=16, layers=1)


@pytest.fixture(params=MODELS)
def model(request):
    """A model in float64, in which packed and single sequences differ by little rounding."""
    return build(MODELS[request.param]).double().eval()


def packed(parts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([0, *map(len, parts)])
    return torch.tensor([i for part in parts for i in part]), lengths.cumsum(0)


@torch.inference_mode()
def test_prompts_read_together_are_read_as_each_alone(model, same):
    decoder = TorchDecoder(model)
    fresh = [decoder.init_state() for _ in PROMPTS]
    halves = [part[: len(part) // 2 + 1] for part in PROMPTS], [part[len(part) // 2 + 1 :] for part in PROMPTS]
    states = decoder.read(*packed(halves[0]), fresh)
    going = [n for n, part in enumerate(halves[1]) if part]
    logits, after = decoder.score(*packed([halves[1][n] for n in going]), [states[n] for n in going])
    assert logits.dtype == torch.float32
    logits = iter(logits.split([len(halves[1][n]) for n in going]))
    for n, state in zip(going, after, strict=True):
        want, end = model(torch.tensor([PROMPTS[n]]))
        same(next(logits), want[0, -len(halves[1][n]) :].float(), 1e-6)
        same(tensors(state), tensors(end), 1e-12)


@torch.inference_mode()
def test_pictures_are_read_together_with_text(model, same):
    with_encoders(model, {"image": IMAGE}).double()
    decoder, token = TorchDecoder(model), IMAGE.token
    parts = [[*PROMPTS[0], *[token] * 4, 3], PROMPTS[3], [token] * 4]
    rows = torch.randint(256, (8, 16), dtype=torch.uint8)
    made = decoder.encode("image", rows)
    states = decoder.read(*packed(parts), [decoder.init_state() for _ in parts], {"image": made})
    for part, of_part, state in zip(parts, (rows[:4], rows[:0], rows[4:]), states, strict=True):
        alone = torch.tensor([part])
        same(tensors(state), tensors(model.hidden(alone, embeds=embedded(model, alone, {"image": of_part}))[1]), 1e-12)


@torch.inference_mode()
def test_decoding_moves_the_first_rows_of_the_pool_in_place(model, same):
    decoder = TorchDecoder(model)
    pool = decoder.pool(4).reserve(40)
    for row, part in enumerate(PROMPTS):
        (state,) = decoder.read(*packed([part]), [decoder.init_state()])
        pool.put(row, state)
    before = [x.clone() for x in tensors(pool.select(torch.tensor([2, 3])))]
    for token in (5, 6):
        logits = decoder.decode(torch.tensor([token, token + 1]), pool)
    for row, last in ((0, [5, 6]), (1, [6, 7])):
        same(logits[row], model(torch.tensor([[*PROMPTS[row], *last]]))[0][0, -1].float(), 1e-6)
    assert pool.position.tolist() == [9, 3, 30, 12]
    same(tensors(pool.select(torch.tensor([2, 3]))), before, 0)


@torch.inference_mode()
@pytest.mark.parametrize("bits", ["bf16", "int8"])
def test_a_pool_may_hold_states_of_fewer_bits(model, bits, same):
    """They take fewer bytes, and the logits are near those of float32."""
    narrow, wide = TorchDecoder(model, STATES[bits]), TorchDecoder(model)
    pools = [decoder.pool(4).reserve(40) for decoder in (narrow, wide)]
    for row, part in enumerate(PROMPTS):
        (state,) = wide.read(*packed([part]), [wide.init_state()])
        for pool in pools:
            pool.put(row, state)
    for token in (5, 6, 7):
        logits = [d.decode(torch.tensor([token] * 4), p) for d, p in zip((narrow, wide), pools, strict=True)]
        same(*logits, 0.02)  # 8 bits of each number of a state, or 1/127 of the largest of its row
    retains = any(m.kind == "retention" for m in pools[0].memories)
    assert (pools[0].nbytes < pools[1].nbytes) == retains


@torch.inference_mode()
def test_after_an_error_nothing_holds_on_to_the_pool(model, monkeypatch):
    """If a step runs out of memory, a new pool must be able to use the old pool's memory."""
    decoder = TorchDecoder(model)
    pool = decoder.pool(2).reserve(4)
    decoder.decode(torch.tensor([1]), pool)
    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.decode(torch.tensor([1]), pool)
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    assert gone() is None


class Recomputing:
    """Another decoder: its state is the list of ids read so far, or embeddings of pictures."""

    def __init__(self, model):
        self.model, self.vocab_size, self.calls = model, model.config.vocab_size, set()
        self.encoders = {kind: encoder.config for kind, encoder in encoders_of(model).items()}

    def init_state(self):
        return Past([])

    def adopt(self, state):
        return state

    def pool(self, slots):
        return Pool(slots)

    def encode(self, kind, rows):
        self.calls.add("encode")
        return self.model.encoders[kind](rows)

    def read(self, ids, cu_seqlens, states, encoded=None):
        self.calls.add("read")
        seen = iter([] if not encoded else encoded["image"])
        items = [next(seen) if id == IMAGE.token else id for id in ids.tolist()]
        parts = [items[a:b] for a, b in pairwise(cu_seqlens)]
        return [Past([*state.ids, *part]) for state, part in zip(states, parts, strict=True)]

    def score(self, ids, cu_seqlens, states):
        self.calls.add("score")
        ends = self.read(ids, cu_seqlens, states)
        rows = [self._logits(end.ids)[len(start.ids) :] for start, end in zip(states, ends, strict=True)]
        return torch.cat(rows), ends

    def decode(self, ids, pool):
        self.calls.add("decode")
        for row, token in enumerate(ids.tolist()):
            pool.rows[row].append(token)
        return torch.stack([self._logits(pool.rows[row])[-1] for row in range(len(ids))])

    def _logits(self, items):
        rows = [self.model.embed(torch.tensor(item)) if isinstance(item, int) else item for item in items]
        return self.model(None, embeds=torch.stack(rows)[None])[0][0].float()


class Past:
    """State of one sequence: all that it has read."""

    nbytes = 8

    def __init__(self, ids):
        self.ids = ids

    @property
    def position(self):
        return torch.tensor([len(self.ids)])

    def reserve(self, slots):
        return self

    def clone(self):
        return Past(list(self.ids))

    def put(self, row, other, source=0):
        self.ids = list(other.rows[source])


class Pool:
    def __init__(self, slots):
        self.rows = [[] for _ in range(slots)]

    @property
    def position(self):
        return torch.tensor([len(row) for row in self.rows])

    def reserve(self, slots):
        return self

    def put(self, row, other, source=0):
        self.rows[row] = list(other.rows[source] if isinstance(other, Pool) else other.ids)


def test_the_engine_asks_no_more_than_the_contract():
    model = with_encoders(build(MODELS["retnet"]), {"image": IMAGE}).double().eval()
    decoder = Recomputing(model)
    engine = Engine(decoder, slots=3, prefill_chunk=8, cache=PrefixCache(1 << 20, every=4))
    streams = [engine.submit(part, GREEDY, max_tokens=6)[0] for part in [*PROMPTS, PROMPTS[2]]]
    seen, rows = [*PROMPTS[0], *[IMAGE.token] * 4, 5], {"image": torch.arange(64).reshape(4, 16).numpy()}
    (looking,) = engine.submit(seen, GREEDY, rows=rows, max_tokens=6)
    (scored,) = engine.submit(PROMPTS[0], GREEDY, max_tokens=2, returns=Returns(top=2, prompt=True, state=True))
    while engine.step():
        pass
    for stream, part in zip(streams, [*PROMPTS, PROMPTS[2]], strict=True):
        assert [t.id for t in stream] == [t.id for t in generate(model, part, GREEDY, max_tokens=6)]
    assert len(scored.prompt_logprobs) == len(PROMPTS[0]) - 1 and len(scored.prompt_tops[0]) == 2
    assert scored.state.ids == [*PROMPTS[0], next(iter(scored)).id] and decoder.calls == {
        "read",
        "score",
        "decode",
        "encode",
    }
    assert [t.id for t in looking] == [t.id for t in generate(model, seen, GREEDY, rows=rows, max_tokens=6)]
    assert streams[-1].cached > 0


def test_shapes_tell_states_of_other_models_apart(model):
    grown = model.hidden(torch.tensor([ids(9)]))[1]
    assert grown.shapes == model.init_state(1).shapes != model.init_state(2).shapes
    assert model.init_state(1).for_decoding(torch.float64).shapes == model.init_state(1).shapes
    if window := max(model.config.windows):
        other = build(changed(model.config, attention_window=window + 1))
        assert other.init_state(1).shapes != model.init_state(1).shapes
