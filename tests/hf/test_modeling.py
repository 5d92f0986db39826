"""Logits of transformers' classes are ours: whole, in parts, padded, packed, cropped, for every block kind."""

import pytest
import torch
import torch.nn.functional as F

from retentive.hf import RetentiveCache
from retentive.hf.modeling_retentive import CACHE
from retentive.models import transformer
from retentive.models.students import student
from tests.export.variants import ATTENDING, TINY, VARIANTS, peaked, peaked_model

MODELS = {
    **{name: (peaked, changes) for name, changes in VARIANTS.items()},
    **{name: (lambda config: peaked_model(config), {"config": config}) for name, config in ATTENDING.items()},
    "student": (peaked_model, {"config": student(ATTENDING["twin"], window=8, sinks=3)}),
    "moving sinks": (peaked_model, {"config": ATTENDING["twin"].with_window(6, 2)}),
    "joint norm": (peaked, {"head_norm": True, "head_norm_affine": True, "head_norm_joint": True}),
    "gated, longer": (peaked_model, {"config": transformer(**TINY, output_gate=True, position_scale=20.0)}),
    "gated, moving sinks": (
        peaked_model,
        {"config": transformer(**TINY, output_gate=True, position_scale=20.0).with_window(6, 2)},
    ),
}
CLOSE = 1e-5
"""float32 sums in another order, through two blocks."""


@pytest.fixture(params=MODELS)
def model(request):
    make, how = MODELS[request.param]
    return make(**how)


@pytest.fixture
def ids():
    return torch.randint(257, (2, 90), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_whole_and_in_parts(model, ids, computed, as_theirs, same):
    theirs, want = as_theirs(model), model(ids)[0]
    same(theirs(ids, use_cache=False).logits, want, CLOSE)
    cache, got = None, []
    for part in (ids[:, :33], ids[:, 33:34], ids[:, 34:50], *ids[:, 50:70].split(1, 1), ids[:, 70:]):
        out = theirs(part, **{CACHE: cache})
        cache = getattr(out, CACHE)
        got.append(out.logits)
    same(torch.cat(got, 1), want, CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_then_more_tokens(model, ids, side, computed, as_theirs, same):
    theirs, mask = as_theirs(model), torch.ones(2, 60)
    begin, end = (12, 60) if side == "left" else (0, 48)
    mask[1, :begin] = mask[1, end:] = 0
    out = theirs(ids[:, :60] * mask.long(), attention_mask=mask)
    same(out.logits[1, begin:end], model(ids[1:, begin:end])[0][0], CLOSE)
    cache, got = getattr(out, CACHE), [out.logits[:, -1:]]
    for t in range(60, 80):
        mask = torch.cat((mask, torch.ones(2, 1)), 1)
        got.append(theirs(ids[:, t : t + 1], attention_mask=mask, **{CACHE: cache}).logits)
    real = torch.cat((ids[1:, begin:end], ids[1:, 60:80]), 1)
    same(torch.cat(got[1:], 1)[1], model(real)[0][0, -20:], CLOSE)
    same(torch.cat(got[1:], 1)[0], model(ids[:1, :80])[0][0, -20:], CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens_q", "seq_idx"])
def test_packed_texts_do_not_see_each_other(model, ids, by, computed, as_theirs, same):
    packed, lengths = torch.cat((ids[0, :40], ids[1, :1], ids[1, :49]))[None], (40, 1, 49)
    how = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, 40, 41, 90]),
        "seq_idx": torch.arange(3).repeat_interleave(torch.tensor(lengths))[None],
    }
    got = as_theirs(model)(packed, use_cache=False, **{by: how[by]}).logits
    want = torch.cat([model(part)[0] for part in packed.split(lengths, 1)], 1)
    same(got, want, CLOSE)
    padded, mask = F.pad(packed, (0, 6)), torch.arange(96)[None] < 90
    got = as_theirs(model)(padded, attention_mask=mask.long(), seq_idx=F.pad(how["seq_idx"], (0, 6), value=3)).logits
    same(got[:, :90], want, CLOSE)


@torch.no_grad()
def test_padding_between_tokens_and_tokens_taken_back_among_it(model, ids, computed, as_theirs, same):
    theirs = as_theirs(model)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[1, :3], mask[:, 68:] = False, True
    real = [row[keep][None] for row, keep in zip(ids[:, :70], mask, strict=True)]
    want = [model(row)[0][0] for row in real]

    def parts(end, begin, **how):
        out = theirs(ids[:, begin:end], attention_mask=mask[:, :end].long(), **how)
        for n in range(2):
            before, more = (int(x.sum()) for x in (mask[n, :begin], mask[n, begin:end]))
            same(out.logits[n][mask[n, begin:end]], want[n][before : before + more], CLOSE)
        return getattr(out, CACHE)

    parts(70, 0, use_cache=False)
    cache = parts(21, 0)
    cache.activate_past_recording()
    parts(32, 21, **{CACHE: cache})
    parts(44, 32, **{CACHE: cache})
    cache.crop(30)
    parts(70, 30, **{CACHE: cache})


@torch.no_grad()
def test_tokens_are_taken_back(model, ids, computed, as_theirs, same):
    theirs, want = as_theirs(model), model(ids)[0]
    cache = RetentiveCache(theirs.config)
    theirs(ids[:, :40], **{CACHE: cache})
    cache.activate_past_recording()
    theirs(ids[:, 40:60], **{CACHE: cache})
    theirs(ids[:, :1], **{CACHE: cache})
    cache.crop(-14)  # from both calls
    assert cache.get_seq_length() == 47
    theirs(ids[:, :3], **{CACHE: cache})
    cache.crop(47)  # down to so many
    theirs(ids[:, 47:50], **{CACHE: cache})
    cache.crop(0)  # none
    same(theirs(ids[:, 50:], **{CACHE: cache}).logits, want[:, 50:], CLOSE)
    with pytest.raises(RuntimeError, match="cannot take back 50 tokens, 40 are recorded"):
        cache.crop(-50)


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [student(ATTENDING["twin"], window=8, sinks=3), ATTENDING["hybrid, window, convolution"]]
)
def test_memory_of_all_but_whole_attention_stays_constant(config, as_theirs):
    model = peaked_model(config)
    theirs, cache, sizes = as_theirs(model), None, []
    for _ in range(200):
        cache = getattr(theirs(torch.tensor([[5]]), **{CACHE: cache}), CACHE)
        sizes.append(cache.nbytes)
    assert max(sizes[:100]) == max(sizes)


@pytest.mark.parametrize("changes", [{}, {"convolution": 4}])
def test_gradients_are_ours_with_and_without_checkpointing(changes, ids, computed, as_theirs, same):
    model = peaked(**changes)
    theirs = as_theirs(model).train()
    logits, _ = model(ids)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    want = [p.grad for p in model.parameters()]
    for checkpointing in (False, True):
        theirs.zero_grad()
        if checkpointing:
            enable = getattr(theirs, "activation_checkpointing_enable", theirs.gradient_checkpointing_enable)
            enable()  # its name since 5.24
        theirs(ids, labels=ids).loss.backward()
        found = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
        found["head.weight"] = found.pop("lm_head.weight")
        same([found[name] for name, _ in model.named_parameters()], want, 1e-4)


@torch.no_grad()
def test_in_bfloat16_decays_stay_float32(ids, computed, as_theirs):
    """A head with gamma near 1 forgets as it should: bfloat16 would round its decay to 1."""
    model = peaked(decay=(-0.0009, -0.1))
    exact, low = model(ids)[0], as_theirs(model).bfloat16()
    ours = model.bfloat16()(ids)[0].float()
    got = low(ids).logits.float()
    assert (got - exact).norm() < 1.1 * (ours - exact).norm()
    assert getattr(low(ids), CACHE).layers[0].state.dtype == torch.float32


def test_bad_calls_are_one_line(ids, as_theirs, refuses):
    theirs = as_theirs(peaked())
    with refuses("give either input_ids or inputs_embeds"):
        theirs()
    with refuses("the attention mask must be [2, 90], 0 for padding, got [2, 80]"):
        theirs(ids, attention_mask=torch.ones(2, 80))
    with refuses("the cache must be a RetentiveCache, got a list", TypeError):
        theirs(ids, **{CACHE: [1]})
    other = as_theirs(peaked_model(ATTENDING["twin"]))
    with refuses("the cache is of another model, with 2 blocks, expected the 2 blocks of this one"):
        theirs(ids, **{CACHE: RetentiveCache(other.config)})
    cache = getattr(theirs(ids[:1]), CACHE)
    with refuses("packed texts cannot go on from a cache"):
        theirs(ids[:1], seq_idx=torch.zeros(1, 90), **{CACHE: cache})
