"""Rescoring == decoding, for RetNet and its twin alike: split anywhere, padded, packed, in training, in bf16.

The oracle is the model itself on one whole unpadded row; what that computes is checked by the tests of the layers and
against the other projects' logits (tests/checkpoint).
"""

from dataclasses import replace

import pytest
import torch

from retentive.models import ARCHITECTURES, State, load_state, retnet, transformer
from retentive.ops import Ring
from tests.configs import hybrid, stacked

SMALL = dict(vocab_size=31, dim=24, layers=2, heads=2)
CONFIGS = {
    "retnet": retnet(**SMALL),
    "retnet-paper": retnet(**SMALL, **ARCHITECTURES["retnet-paper"]),
    "retnet-kv-heads": retnet(**SMALL | dict(heads=4), kv_heads=2),
    "retnet-key-dim": retnet(**SMALL, key_dim=12, value_dim=56, ffn_dim=17),
    "fla": retnet(**SMALL, **ARCHITECTURES["fla"]),
    "retnet-no-gate": retnet(**SMALL, gate=False),
    "retnet-head-norm": retnet(**SMALL, head_norm=True),
    "retnet-all-fields": retnet(
        **SMALL, decay_bias=True, decay_scale=4.0, qk_norm=True, qk_bias=True, gate_activation="sigmoid", rotary="none"
    ),
    "retnet-no-final-norm": retnet(**SMALL, final_norm=False),
    "retnet-embed-scale-and-norm": retnet(**SMALL, embed_scale=True, embed_norm=True),
    "retnet-gelu": retnet(**SMALL, activation="gelu"),
    "retnet-plain-ffn": retnet(**SMALL, ffn_gate=False),
    "retnet-tied": retnet(**SMALL, tie_embeddings=True),
    "retnet-no-decay": retnet(**SMALL, decay="none", score_norm=True),
    "retnet-own-decays": retnet(**SMALL, decay=(-0.3, 0.0), score_norm=True),
    "hybrid": hybrid(**SMALL | dict(layers=3), attention_every=2),
    "transformer": transformer(**SMALL),
    "transformer-kv-heads": transformer(**SMALL | dict(heads=4), kv_heads=2),
    "transformer-tied": transformer(**SMALL, tie_embeddings=True),
    "hybrid-window": hybrid(**SMALL | dict(layers=4), attention_every=2, attention_window=4),
    "hybrid-four-window": hybrid(
        **SMALL | dict(layers=4), attention_every=4, attention_window=3, attention_rotary="none"
    ),
    "transformer-window": transformer(**SMALL, attention_window=4),
    "retnet-convolution": retnet(**SMALL, convolution=4),
    "hybrid-window-convolution": hybrid(**SMALL, attention=(1,), attention_window=4, convolution=2),
    "transformer-gate": transformer(**SMALL, forget_gate=True),
    "transformer-window-gate": transformer(**SMALL, attention_window=5, forget_gate=True, qk_norm=True, rotary="none"),
}
CONFIGS["stacked"] = stacked(CONFIGS["hybrid-window"])
BOTH = {name: CONFIGS[name] for name in ("retnet", "hybrid", "transformer", "hybrid-window", "transformer-window-gate")}
# float64 has 53 bits, 1e-16; two layers of sums in another order, and norms that divide by small numbers, cost up to
# thousands of that. In float32 (24 bits, 6e-8) they cost tens
EXACT, CLOSE = 1e-12, 1e-5

configs = pytest.mark.parametrize("name", CONFIGS)
both = pytest.mark.parametrize("name", BOTH)


def ids_of(B: int, T: int) -> torch.Tensor:
    return torch.randint(31, (B, T))


def tensors(state) -> list[torch.Tensor]:
    """All that a state holds, a cache's up to what has been written."""
    return [*state.named().values(), state.position]


@configs
@torch.no_grad()
def test_decoding_gives_the_logits_of_rescoring(name, make, decode, same):
    model, ids = make(CONFIGS[name]), ids_of(2, 13)
    want, end = model(ids)
    got, state = decode(model, ids)
    same(got, want, EXACT)
    same(tensors(state), tensors(end), EXACT)
    assert state.position.tolist() == [13, 13]


@configs
@torch.no_grad()
def test_a_text_can_be_split_at_every_position(name, make, same):
    model, ids = make(CONFIGS[name]), ids_of(2, 13)
    want, end = model(ids)
    for split in range(1, 13):
        first, state = model(ids[:, :split])
        second, state = model(ids[:, split:], state)
        same(torch.cat((first, second), 1), want, EXACT, f"split at {split}")
        same(tensors(state), tensors(end), EXACT, f"split at {split}")


@both
@torch.no_grad()
def test_the_initial_state_is_that_of_no_tokens(name, make, same):
    model, ids = make(BOTH[name]), ids_of(3, 5)
    got, state = model(ids, model.init_state(3))
    want, end = model(ids)
    same([got, *tensors(state)], [want, *tensors(end)], EXACT)
    assert model.init_state(3).position.tolist() == [0, 0, 0]


@configs
@torch.no_grad()
def test_in_float32_rescoring_and_decoding_agree(name, make, decode, same):
    model, ids = make(CONFIGS[name], torch.float32), ids_of(2, 40)
    want, _ = model(ids)
    same(decode(model, ids)[0], want, CLOSE)


# a fresh ring, one about to fold, one that has folded: of heads of 12 it has 4 slots
@pytest.mark.parametrize("T", [1, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", ["retnet", "retnet-paper", "retnet-key-dim"])
@torch.no_grad()
def test_a_state_amid_decoding_goes_on_whatever_is_done_to_it(name, dtype, T, make, decode, same, tmp_path):
    """Selected, copied, saved or joined with others: each row as on its whole text, by single tokens and by several."""
    model, ids, other = make(CONFIGS[name], dtype), ids_of(3, T), ids_of(1, 7)
    state, joined = decode(model, ids)[1], decode(model, other)[1]
    assert all(isinstance(x, Ring) for x in (m.value for m in (*state.memories, *joined.memories)))
    before = [x.clone() for x in tensors(state)]
    state.save(tmp_path / "state")
    plain = model(other)[1]
    branches = {
        "select": (state.select(torch.tensor([2, 0, 0])), ids[[2, 0, 0]]),
        "clone": (state.clone(), ids),
        "detach": (state.clone().detach(), ids),
        "to": (state.clone().to("cpu"), ids),
        "load": (load_state(tmp_path / "state"), ids),
        "cat": (State.cat([plain, state, joined]), [other[0], *ids, other[0]]),
        "itself": (state, ids),
    }
    for what, (branch, texts) in branches.items():
        if what != "itself":
            same(tensors(state), before, 0, what)
        more = ids_of(len(texts), 12)
        one, branch = decode(model, more[:, :7], branch)
        two, branch = model(more[:, 7:], branch)
        assert branch.position.tolist() == [len(text) + 12 for text in texts]
        for n, text in enumerate(texts):
            want = model(torch.cat((text, more[n]))[None])[0][0, len(text) :]
            got = torch.cat((one[n], two[n]))
            same(got, want, EXACT if dtype == torch.float64 else CLOSE, f"{what}, row {n}")


# spans of valid tokens: [B] pads right, [B,2] pads on any side
PADDED = {"right": torch.tensor([9, 4, 1]), "left": torch.tensor([[0, 9], [5, 9], [8, 9]]),
          "both": torch.tensor([[0, 9], [2, 6], [3, 3]])}  # fmt: skip


@pytest.mark.parametrize("side", PADDED)
@configs
@torch.no_grad()
def test_padding_is_exact_and_rows_go_on_from_where_each_stands(name, side, make, same):
    model, lengths = make(CONFIGS[name]), PADDED[side]
    ids, more = ids_of(3, 9), ids_of(3, 4)
    spans = [(a, b) for a, b in (lengths.tolist() if lengths.ndim == 2 else ((0, n) for n in lengths.tolist()))]
    padded, state = model(ids, lengths=lengths)
    assert state.position.tolist() == [b - a for a, b in spans] and padded.isfinite().all()
    next_, state = model(more, state, lengths=torch.tensor([[0, 4], [1, 4], [0, 2]]))
    last, state = model(more, state)
    assert state.position.tolist() == [b - a + n for (a, b), n in zip(spans, (8, 7, 6), strict=True)]
    for row, (a, b) in enumerate(spans):
        c, d = [(0, 4), (1, 4), (0, 2)][row]
        alone = torch.cat((ids[row, a:b], more[row, c:d], more[row]))[None]
        want, _ = model(alone)
        got = torch.cat((padded[row, a:b], next_[row, c:d], last[row]))[None]
        same(got, want, EXACT, f"row {row}")


@configs
@torch.no_grad()
def test_what_stands_on_padding_changes_nothing(name, make, same):
    """Bit for bit: other ids on the pads, the same logits and states."""
    model, ids, lengths = make(CONFIGS[name]), ids_of(2, 6), torch.tensor([[2, 6], [0, 3]])
    other = ids.clone()
    other[0, :2], other[1, 3:] = (ids[0, :2] + 1) % 31, (ids[1, 3:] + 1) % 31
    (a, state_a), (b, state_b) = model(ids, lengths=lengths), model(other, lengths=lengths)
    same([a[0, 2:], a[1, :3]], [b[0, 2:], b[1, :3]], 0)
    after = ids_of(2, 2)
    same(model(after, state_a)[0], model(after, state_b)[0], 0)


@configs
@torch.no_grad()
def test_packed_sequences_are_sequences_alone_and_go_on(name, make, same):
    model = make(CONFIGS[name])
    texts = [ids_of(1, n) for n in (5, 1, 8)]
    more = [ids_of(1, n) for n in (1, 4, 2)]
    end = [ids_of(1, n) for n in (3, 3, 3)]

    def packed(parts, state=None):
        cu = torch.tensor([0, *(x.shape[1] for x in parts)]).cumsum(0)
        logits, state = model(torch.cat(parts, 1), state, cu_seqlens=cu)
        return logits.split([x.shape[1] for x in parts], 1), state

    one, state = packed(texts)
    assert state.position.tolist() == [5, 1, 8]
    two, state = packed(more, state)
    three, state = model(torch.cat(end), state)  # from packed to rows
    assert state.position.tolist() == [9, 8, 13]
    for n in range(3):
        want, _ = model(torch.cat((texts[n], more[n], end[n]), 1))
        same(torch.cat((one[n], two[n], three[n : n + 1]), 1), want, EXACT, f"sequence {n}")


@both
def test_packed_in_training_the_logits_are_the_same_and_no_cache_is_kept(name, make, same):
    model, ids, cu = make(BOTH[name]), ids_of(1, 9), torch.tensor([0, 4, 5, 9])
    want, _ = model(ids, cu_seqlens=cu)
    got, state = model.train()(ids, cu_seqlens=cu)
    same(got, want, EXACT)
    assert state.position.tolist() == [4, 1, 4]
    assert not any(name.startswith(("keys", "values")) for name in state.named())


@both
@torch.no_grad()
def test_embeds_are_a_door_beside_ids(name, make, same):
    model, ids = make(BOTH[name]), ids_of(2, 7)
    want, _ = model(ids)
    first, state = model(None, embeds=model.embed(ids[:, :4]))
    second, _ = model(ids[:, 4:], state)
    same(torch.cat((first, second), 1), want, EXACT)


@both
def test_gradients_flow_through_the_state(name, make, same):
    model, ids = make(BOTH[name]), ids_of(2, 11)
    weight = torch.randn(2, 6, 31, dtype=torch.float64)

    def gradients(logits):
        return torch.autograd.grad((logits * weight).sum(), list(model.parameters()))

    want = gradients(model(ids)[0][:, 5:])
    _, state = model(ids[:, :5])
    same(gradients(model(ids[:, 5:], state)[0]), want, EXACT)
    _, state = model(ids[:, :5])
    cut = gradients(model(ids[:, 5:], state.detach())[0])
    # the past's share is there: without it the embedding's gradient is another
    assert (cut[0] - want[0]).norm() > 1e-3 * want[0].norm()


@both
def test_dropout_acts_in_training_only(name, make, same):
    model, ids = make(replace(BOTH[name], dropout=0.5)), ids_of(1, 6)
    same(model(ids)[0], model(ids)[0], 0)
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])


@both
@torch.no_grad()
def test_in_bf16_all_ways_are_as_close_to_the_truth_as_plain_torch(
    name, make, decode, gold_rule, plain_retention, monkeypatch
):
    """The truth: its weights in float64. The measure: plain torch in place of the operator; for the twin, SDPA."""
    model, ids = make(BOTH[name], torch.bfloat16), ids_of(4, 100)
    got, state = decode(model, ids)
    rescored, end = model(ids)
    if not model.config.attends:
        assert {x.dtype for x in (*state.settled().tensors()[:-1], *end.tensors()[:-1])} == {torch.float32}

    def plain(q, k, v, log_decay, *, scale, state, **how):
        zeros = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        return plain_retention(q, k, v, log_decay, scale=scale, state=zeros)

    with monkeypatch.context() as patch:
        patch.setattr("retentive.layers.retention.retention", plain)
        measure, _ = model(ids)
    gold, _ = model.double()(ids)
    # most roundings, those of projections and norms, are common to all; norms of 12400 logits differ by a few per cent
    gold_rule(gold, got, measure, 0.15, "decoding")
    if not model.config.attends:  # rescoring with SDPA is the twin's measure itself
        gold_rule(gold, rescored, measure, 0.15, "rescoring")


@both
@torch.no_grad()
def test_under_autocast_no_warning_and_a_close_result(name, make, same):
    """Mixed precision, as in training: float32 weights, bf16 products. A warning would be an error here."""
    model, ids = make(BOTH[name], torch.float32), ids_of(2, 20)
    want, _ = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        got, state = model(ids)
    assert got.dtype == torch.bfloat16
    assert model.config.attends or state.memories[0].value.dtype == torch.float32
    # bf16 keeps 8 bits, 0.2 % off on average; some 40 roundings in a row, two layers deep, add up as roots of squares
    same(got.float(), want, 0.03)


@both
def test_calls_that_do_not_fit(name, make, refuses):
    model, ids = make(BOTH[name]), ids_of(3, 5)
    for empty in (ids[:, :0], ids[:0]):
        with refuses("ids [B,T] with at least one token"):
            model(empty)
    with refuses("lengths must lie within the 5 tokens of a row, got [1, 2, 6]"):
        model(ids, lengths=torch.tensor([1, 2, 6]))
    with refuses("lengths must be [3] or [3, 2]"):
        model(ids, lengths=torch.tensor([1, 2]))
    with refuses("cu_seqlens and lengths exclude each other"):
        model(ids[:1], lengths=torch.tensor([5]), cu_seqlens=torch.tensor([0, 5]))
    with refuses("cu_seqlens packs all sequences into one row, got 3 rows"):
        model(ids, cu_seqlens=torch.tensor([0, 5]))


@pytest.mark.parametrize("T", [1, 5], ids=["T1", "T5"])
@pytest.mark.parametrize(("rows", "held"), [(3, 2), (3, 1), (1, 3)], ids=["2-for-3", "1-for-3", "3-for-1"])
@both
def test_a_state_of_other_sequences_is_refused(name, rows, held, T, make, refuses):
    model = make(BOTH[name])
    _, state = model(ids_of(held, 5))
    for how in ({}, dict(lengths=torch.ones(rows, dtype=torch.int64))):
        with refuses(f"the state holds {held} sequences, the call has {rows}"):
            model(ids_of(rows, T), state.clone(), **how)


@pytest.mark.parametrize("cu", [[0, 3], [0, 4, 3, 5], [1, 5], [0, 2, 2, 5], [0, 7]], ids=str)
@both
def test_bad_cu_seqlens_are_refused(name, cu, make, refuses):
    with refuses("cu_seqlens must ascend from 0 to T = 5"):
        make(BOTH[name])(ids_of(1, 5), cu_seqlens=torch.tensor(cu))
