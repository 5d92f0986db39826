"""The native model against torch: the same logits and states, token by token, wherever the other left off."""

import pytest
import torch

from retentive.models import ARCHITECTURES, RetNetConfig, TransformerConfig, build
from retentive.native import NativeModel, refused
from retentive.native.library import library
from retentive.ops.compiler import NotBuilt

pytestmark = pytest.mark.skipif(isinstance(library(), NotBuilt), reason=str(library()))

VOCAB, TOKENS = 53, 40
SMALL = dict(vocab_size=VOCAB, dim=48, layers=2, heads=2)
CONFIGS = {
    "retnet": {},
    **{name: fields for name, fields in ARCHITECTURES.items() if fields},
    "kv-heads": dict(heads=4, kv_heads=2, head_norm=True, head_norm_affine=True),
    "biases": dict(decay_bias=True, qk_bias=True, decay_scale=4.0, rotary="none", gate_activation="sigmoid"),
    "plain": dict(gate=False, ffn_gate=False, activation="gelu", final_norm=False, ffn_dim=50, qk_norm=False),
    "odd-widths": dict(ffn_dim=50, heads=6, value_dim=54),
    "own-decays": dict(decay=(-0.3, 0.0), tie_embeddings=True, embed_norm=True, embed_scale=True, rotary="half"),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    """One whose every weight matters: matrices N(0, 1/width), vectors around 1."""
    made = build(RetNetConfig(**{**SMALL, **CONFIGS[request.param]})).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return made


def decoded(native, ids, pool):
    return torch.stack([native.decode(ids[:, t].clone(), pool) for t in range(ids.shape[1])], 1)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3])
def test_logits_are_torchs_in_float32(model, threads, same):
    ids = torch.randint(VOCAB, (3, TOKENS))
    pool = model.init_state(3).for_decoding(torch.float32)
    got = decoded(NativeModel(model, weights="float32", threads=threads), ids, pool)
    plain, state = model(ids)
    exact, _ = build(model.config).double().eval().requires_grad_(False), None
    exact.load_state_dict(model.state_dict())
    want = exact(ids)[0]
    allowed = float((plain.double() - want).norm())  # what torch's own float32 is off by
    assert float((got.double() - want).norm()) <= 2 * allowed
    assert pool.position.tolist() == [TOKENS] * 3
    same(pool.settled().tensors(), state.tensors(), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("ring", [torch.float32, torch.bfloat16])
def test_in_bfloat16_it_is_as_close_as_torch(model, ring):
    ids = torch.randint(VOCAB, (2, TOKENS))
    low = build(model.config).eval().bfloat16()
    low.load_state_dict(model.state_dict())
    exact = build(model.config).eval().double()
    exact.load_state_dict(low.state_dict())
    pool = low.init_state(2).for_decoding(ring)
    got = decoded(NativeModel(low), ids, pool)
    want, plain = exact(ids)[0], low(ids)[0]
    assert float((got.double() - want).norm()) <= float((plain.double() - want).norm())


@torch.no_grad()
def test_either_goes_on_where_the_other_stopped(model, same):
    ids = torch.randint(VOCAB, (2, TOKENS))
    want = model(ids)[0]
    native = NativeModel(model, weights="float32")
    _, state = model(ids[:, :13])
    pool, got = state.for_decoding(torch.float32), []
    for t in range(13, TOKENS):
        if t % 3:
            got.append(native.decode(ids[:, t].clone(), pool))
        else:
            logits, pool = model(ids[:, t : t + 1], pool)
            got.append(logits[:, 0])
    same(torch.stack(got, 1), want[:, 13:], 1e-4)


@torch.no_grad()
def test_a_sequence_in_a_batch_gets_the_bits_that_it_gets_alone(model, same):
    native = NativeModel(model, threads=2)
    ids = torch.randint(VOCAB, (9, 12))
    together = decoded(native, ids, model.init_state(9).for_decoding(torch.float32))
    for row in (0, 4, 8):
        alone = decoded(native, ids[row : row + 1], model.init_state(1).for_decoding(torch.float32))
        same(alone[0], together[row], 0)


@torch.no_grad()
def test_tokens_taken_back_are_read_again(model, same):
    native, ids = NativeModel(model, weights="float32"), torch.randint(VOCAB, (2, 20))
    pool = model.init_state(2).for_decoding(torch.float32, rollback=5)
    want = decoded(native, ids, pool)
    pool.rollback(5)
    same(decoded(native, ids[:, 15:], pool), want[:, 15:], 1e-5)


@torch.no_grad()
def test_the_first_of_a_larger_pool(model, same):
    native, ids = NativeModel(model, weights="float32"), torch.randint(VOCAB, (2, 9))
    pool = model.init_state(5).for_decoding(torch.float32)
    before = [x.clone() for x in pool.tensors()]
    same(decoded(native, ids, pool), model(ids)[0], 1e-4)
    assert pool.position.tolist() == [9, 9, 0, 0, 0]
    same([x[2:] for x in pool.tensors()], [x[2:] for x in before], 0)


def test_what_it_cannot_do_is_refused(refuses):
    assert refused(RetNetConfig(**SMALL)) is None
    twin = build(TransformerConfig(**SMALL))
    with refuses("the native engine cannot run this model: it runs RetNets, this is a Transformer", RuntimeError):
        NativeModel(twin)
    model = build(RetNetConfig(**SMALL))
    native, pool = NativeModel(model), model.init_state(2).for_decoding(torch.float32)
    with refuses("3 ids do not go with this pool, of 2 sequences"):
        native.decode(torch.zeros(3, dtype=torch.int64), pool)
    with refuses("token ids must be from 0 to 52, got [53]", IndexError):
        native.decode(torch.tensor([VOCAB]), pool)
    other = build(RetNetConfig(**{**SMALL, "heads": 4})).init_state(2).for_decoding(torch.float32)
    with refuses("do not go with this pool"):
        native.decode(torch.zeros(2, dtype=torch.int64), other)
