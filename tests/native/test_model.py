"""The native model against torch: the same logits and states, and each continues from the other's states."""

import copy
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

from retentive import ops
from retentive.checkpoint.quantize import quantize
from retentive.infer import SamplingParams
from retentive.infer.engine import Engine
from retentive.infer.generate import generate
from retentive.models import ARCHITECTURES, ModelConfig, State, build, retnet, transformer
from retentive.native import NativeModel, refused, with_engine
from retentive.native.library import library
from retentive.native.threads import Pace
from retentive.ops.compiler import NotBuilt
from retentive.ops.rotary import Scaling
from tests.configs import changed as config_with
from tests.configs import hybrid, on_levels, stacked

pytestmark = pytest.mark.skipif(isinstance(library(), NotBuilt), reason=str(library()))

VOCAB, TOKENS = 53, 40
SMALL = dict(vocab_size=VOCAB, dim=48, layers=2, heads=2)
RETNETS = {
    "retnet": {},
    **{name: fields for name, fields in ARCHITECTURES.items() if fields},
    "kv-heads": dict(heads=4, kv_heads=2, head_norm=True, head_norm_affine=True),
    "biases": dict(decay_bias=True, qk_bias=True, decay_scale=4.0, rotary="none", gate_activation="sigmoid"),
    "sigmoid-decay": dict(decay="sigmoid", decay_bias=True, rotary="none", qk_norm=False, heads=4),
    "plain": dict(gate=False, ffn_gate=False, activation="gelu", final_norm=False, ffn_dim=50, qk_norm=False),
    "joint-norm": dict(head_norm=True, head_norm_affine=True, head_norm_joint=True, gate_activation="sigmoid"),
    "odd-widths": dict(ffn_dim=50, heads=6, value_dim=54),
    "own-decays": dict(decay=(-0.3, 0.0), tie_embeddings=True, embed_norm=True, embed_scale=True, rotary="half"),
    "retnet-convolution": dict(convolution=3),
}
TRANSFORMERS = {
    "transformer": {},
    "whole-vectors": dict(dim=128, rotary_base=500_000.0),
    "grouped": dict(heads=4, kv_heads=2, qk_norm=True, head_dim=20),
    "one-kv-head": dict(dim=96, heads=12, kv_heads=1, rotary="interleaved"),
    "forget-gate": dict(forget_gate=True),
    "qkv-bias": dict(qkv_bias=True, heads=6, kv_heads=3, head_dim=10),
    "qkv-bias-gate": dict(qkv_bias=True, qk_norm=True, forget_gate=True, attention_window=7),
    "window": dict(attention_window=7),
    "wide-window": dict(attention_window=150, kv_heads=1, rotary="none"),
    "window-gate": dict(dim=64, attention_window=20, forget_gate=True),
    "sinks": dict(attention_window=7, attention_sinks=2),
    "output-gate": dict(output_gate=True, heads=4, kv_heads=2, qk_norm=True, rotary="none"),
    "position-scale": dict(position_scale=9.0, attention_window=7, attention_sinks=2, output_gate=True),
    "many-sinks": dict(attention_window=140, attention_sinks=135, heads=4, kv_heads=2),
    "transformer-convolution": dict(convolution=2, attention_window=9, dim=40),
}
HYBRIDS = {
    "hybrid": dict(layers=4, attention_every=2),
    "hybrid-window-gate": dict(layers=4, attention_every=2, attention_window=9, attention_forget=True),
    "hybrid-window-convolution": dict(
        layers=4, attention_every=2, attention_window=9, attention_forget=True, convolution=4
    ),
    "hybrid-window": dict(
        layers=3, attention=(0,), attention_window=9, attention_sinks=1, decay="lm", score_norm=True, value_dim=32
    ),
}
FAMILIES = ((retnet, RETNETS), (transformer, TRANSFORMERS), (hybrid, HYBRIDS))
CONFIGS = {name: make(**SMALL | fields) for make, models in FAMILIES for name, fields in models.items()}
CONFIGS["stacked"] = stacked(CONFIGS["hybrid-window"])
convolution, retention, wide, _, attention = CONFIGS["hybrid-window-convolution"].blocks[:5]
CONFIGS["convolutions-anywhere"] = replace(
    CONFIGS["hybrid-window-convolution"],
    blocks=(convolution, wide, replace(retention, ffn=wide.ffn), attention, convolution),
)
CONFIGS["slower-angles"] = config_with(transformer(**SMALL, kv_heads=1), rotary_scaling=Scaling(8.0, 1.0, 4.0, 16))
CONFIGS["slower-angles-in-pairs"] = config_with(transformer(**SMALL, rotary="interleaved"), rotary_scaling=Scaling(4.0))
for name in ("sinks", "many-sinks"):
    CONFIGS[f"{name}-that-move"] = config_with(CONFIGS[name], moving_sinks=True)
"""Every kind of block; some of these models have several, of different shapes."""
LONG = 300
"""Tokens of a long prompt: several chunks of positions, and more than pass through the layers together."""


def mattering(config: ModelConfig) -> torch.nn.Module:
    """A model whose every weight matters: matrices N(0, 1/width), vectors around 1."""
    made = build(config).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return made


@pytest.fixture(params=CONFIGS)
def model(request):
    return mattering(CONFIGS[request.param])


@pytest.fixture
def one():
    return mattering(CONFIGS["retnet"])


@pytest.fixture(params=["retnet", "transformer", "hybrid-window", "hybrid-window-convolution"])
def each(request):
    """A model of each family."""
    return mattering(CONFIGS[request.param])


@pytest.fixture(params=[1, 3])
def threads(request):
    """Number of threads that torch is set to."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def named(state):
    """Tensors of a state as in its file, without rings and free slots."""
    return list(state.named().values())


def decoded(model, ids, state):
    logits = []
    for t in range(ids.shape[1]):
        one, state = model(ids[:, t : t + 1], state)
        logits.append(one[:, 0])
    return torch.stack(logits, 1), state


def as_close(got, plain, exact, times):
    """True if the error of `got` is at most `times` the error of torch in the model's own dtype, both to float64."""
    return float((got.double() - exact).norm()) <= times * float((plain.double() - exact).norm())


def in_float64(model, ids):
    exact = build(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    return exact(ids)


@torch.no_grad()
@pytest.mark.parametrize("how", ["decode", "read", "few"])
def test_logits_and_states_are_torchs_in_float32(model, how, threads, same):
    ids, native = torch.randint(VOCAB, (3, TOKENS)), NativeModel(model)
    if how == "decode":
        got, state = decoded(native, ids, None)
    elif how == "read":
        got, state = native(ids)
    else:
        state, parts = native.init_state(3).for_decoding(torch.float32), []
        for part in ids.split(3, 1):
            logits, state = native(part, state)
            parts.append(logits)
        got = torch.cat(parts, 1)
    plain, theirs = model(ids)
    exact, _ = in_float64(model, ids)
    # sums in another order: some of the errors are larger, none by much
    assert as_close(got, plain, exact, 2)
    assert state.position.tolist() == [TOKENS] * 3
    same(named(state), named(theirs), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", [*TRANSFORMERS, *HYBRIDS])
def test_long_texts_in_parts_of_any_size(name, threads, same):
    model, ids = mattering(CONFIGS[name]), torch.randint(VOCAB, (2, LONG))
    native, state, got = NativeModel(model), None, []
    for part in ids.split([100, 1, 3, 60, 2, 1, 1, LONG - 168], 1):
        logits, state = native(part, state)
        got.append(logits)
    assert as_close(torch.cat(got, 1), model(ids)[0], in_float64(model, ids)[0], 2)
    same(named(state), named(model(ids)[1]), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("how", ["decode", "read"])
def test_in_bfloat16_it_is_as_close_as_torch(model, how):
    ids, low = torch.randint(VOCAB, (2, TOKENS)), model.bfloat16()
    native = NativeModel(low)
    got = decoded(native, ids, None)[0] if how == "decode" else native(ids)[0]
    exact, _ = in_float64(low, ids)
    assert as_close(got, low(ids)[0], exact, 1)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("how", ["decode", "read"])
def test_integers_give_what_the_floats_that_they_stand_for_give(model, bits, how, same):
    ids, made = torch.randint(VOCAB, (3, TOKENS)), quantize(on_levels(model), bits, 32, dtype=torch.float32)
    native = NativeModel(made)
    got = decoded(native, ids, None)[0] if how == "decode" else native(ids)[0]
    same(got, made(ids)[0], 1e-3)  # what they multiply has 16 bits, 2e-5 of the largest number of 32, layer after layer
    assert [name for name, _ in native.named_parameters()] == [name for name, _ in made.named_parameters()]
    low = NativeModel(made.bfloat16())
    assert low.dtype == torch.bfloat16  # of keys and values; what leaves a layer stays float32
    same(low(ids)[0], made.float()(ids)[0], 0.05)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_activations_of_8_bits_stay_near_those_of_16(model, bits, threads, same):
    """In prompts and in single tokens, alone and in a batch: the same integers."""
    ids, made = torch.randint(VOCAB, (11, TOKENS)), quantize(on_levels(model), bits, 32, dtype=torch.float32)
    native = NativeModel(made, activations="int8")
    got, want = native(ids)[0], NativeModel(made)(ids)[0]
    assert not torch.equal(got, want)
    assert float((got - want).norm() / want.norm()) < 0.1  # 1/127 of the largest of 32 numbers, layer after layer
    steps, _ = decoded(native, ids[:, :8], None)
    same(decoded(native, ids[4:5, :8], None)[0][0], steps[4], 0)


@torch.no_grad()
def test_either_goes_on_where_the_other_stopped(model, same):
    ids, native, state, got = torch.randint(VOCAB, (2, TOKENS)), NativeModel(model), None, []
    for n, part in enumerate(ids.split([9, 1, 1, 5, 1, 1, 12, 1, 1, 8], 1)):
        logits, state = (native if n % 3 else model)(part, state)
        got.append(logits)
    same(torch.cat(got, 1), model(ids)[0], 1e-4)


@torch.no_grad()
def test_sequences_of_any_length_packed_into_a_row(each, threads, same):
    """Blocks of tokens end within sequences; one sequence has none of its own in this call."""
    lengths = [300, 1, 0, 250, 7, 256]
    ids, begin = torch.randint(VOCAB, (1, sum(lengths))), torch.tensor([0, *lengths]).cumsum(0)
    native, one = NativeModel(each), each
    before = native(torch.randint(VOCAB, (len(lengths), 3)))[1]
    x, state = native.hidden(ids, before.clone(), cu_seqlens=begin)
    assert state.position.tolist() == [n + 3 for n in lengths]
    for n, part in enumerate(ids[0].split(lengths)):
        own = before.select(torch.tensor([n]))
        if len(part):
            want, own = one.hidden(part[None], own)
            same(x[0, begin[n] : begin[n + 1]], want[0], 1e-4)
        same(named(state.select(torch.tensor([n]))), named(own), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_in_a_batch_gets_the_bits_that_it_gets_alone(model, dtype, threads, same):
    native, ids = NativeModel(model.to(dtype)), torch.randint(VOCAB, (11, 6))
    together, _ = decoded(native, ids, None)
    for row in (0, 4, 8, 10):
        same(decoded(native, ids[row : row + 1], None)[0][0], together[row], 0)


@torch.no_grad()
def test_tokens_taken_back_are_read_again(model, same):
    native, ids = NativeModel(model), torch.randint(VOCAB, (2, 20))
    pool = model.init_state(2).for_decoding(torch.float32, rollback=5).reserve(20)
    want, pool = decoded(native, ids, pool)
    pool.rollback(5)
    same(native(ids[:, 15:], pool)[0], want[:, 15:], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.int8], ids=str)
def test_states_of_fewer_bits_give_what_they_give_in_torch(each, narrow, threads, same):
    """Up to the folds of the first 12 tokens, whose rounding both do."""
    native, ids = NativeModel(each), torch.randint(VOCAB, (3, 12))
    pools = [each.init_state(3).for_decoding(torch.float32, state_dtype=narrow).reserve(12) for _ in range(2)]
    got, state = decoded(native, ids, pools[0])
    want, other = decoded(each, ids, pools[1])
    rings = [m.value.state.dtype for m in state.memories if m.kind == "retention"]
    assert rings == [narrow] * len(rings)
    steps = 1e-3 if narrow == torch.bfloat16 else 1e-2  # numbers that are rounded to the other neighbour
    same(got, want, steps / 2)  # where windows of attention follow; a tenth without
    same(named(state), named(other), steps)


@torch.no_grad()
def test_the_state_of_a_prompt_is_not_written_over(one, same):
    """A prefix cache keeps that state."""
    native, ids = NativeModel(one), torch.randint(VOCAB, (1, 20))
    _, state = native(ids)
    kept = state.clone()
    native(ids, state)
    same(state.tensors(), kept.tensors(), 0)


@torch.no_grad()
def test_a_long_run_stays_with_float64(each, same):
    native, ids = NativeModel(each), torch.randint(VOCAB, (1, 3000))
    _, state = decoded(native, ids, None)
    _, exact = in_float64(each, ids)
    same([x.double() for x in named(state)], [x.double() for x in named(exact)], 1e-5)


def test_the_engine_and_generate_write_what_they_write_with_torch(each):
    native, one = NativeModel(each), each
    prompts = [torch.randint(VOCAB, (n,)).tolist() for n in (3, 70, 20)]
    greedy = SamplingParams(temperature=0.0)
    engine = Engine(native, slots=2, prefill_chunk=16)
    streams = [engine.submit(prompt, greedy, max_tokens=12)[0] for prompt in prompts]
    while engine.step():
        pass
    for prompt, stream in zip(prompts, streams, strict=True):
        want = [token.id for token in generate(one, prompt, greedy, max_tokens=12)]
        assert [token.id for token in stream] == want
        assert [token.id for token in generate(native, prompt, greedy, max_tokens=12)] == want


def test_what_needs_gradients_or_another_backend_is_left_to_torch(one, same, monkeypatch):
    native, ids = NativeModel(one), torch.randint(VOCAB, (2, 9))
    monkeypatch.setattr("retentive.native.model.Reading", None)  # what the library is called with
    logits, _ = native(ids)
    logits.sum().backward()
    assert all(p.grad is not None for p in one.parameters())
    with torch.no_grad(), ops.using(backend="reference"):
        same(native(ids)[0], one(ids)[0], 0)
        same(native(ids, lengths=torch.tensor([9, 4]))[0], one(ids, lengths=torch.tensor([9, 4]))[0], 0)
    assert [name for name, _ in native.named_parameters()] == [name for name, _ in one.named_parameters()]


@torch.no_grad()
def test_many_callers_at_once_get_what_each_gets_alone(one, same):
    native, ids = NativeModel(one, threads=2), torch.randint(VOCAB, (4, 30))
    want, got = [decoded(native, row[None], None)[0] for row in ids], {}

    @torch.no_grad()
    def call(n):
        got[n] = decoded(native, ids[n][None], None)[0]

    callers = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    same([got[n] for n in range(4)], want, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_process_has_threads_of_its_own(one, threads):
    with torch.no_grad():
        native, ids = NativeModel(one), torch.randint(VOCAB, (1, 5))
        want = native(ids)[0]
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(native(ids)[0], want) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(native(ids)[0], want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@torch.no_grad()
def test_a_child_process_does_not_wait_for_a_thread_that_it_does_not_have(one):
    native, ids = NativeModel(one), torch.randint(VOCAB, (1, 5))
    want = native(ids)[0]
    with native._threads._lock:  # as another thread holds it that is in a call
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # which ends it
            os._exit(0 if torch.equal(native(ids)[0], want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@torch.no_grad()
def test_more_threads_than_the_pool_has(one, monkeypatch):
    """The pool uses the threads that it has, even if a larger number was found the fastest."""
    native, ids = NativeModel(one, threads=3), torch.randint(VOCAB, (1, 5))
    want = native(ids)[0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(Pace, "threads", lambda self, now: 4)  # of 1, 2, 4
    for _ in range(3 * Pace.TRIES + 1):
        assert torch.equal(native(ids)[0], want)


@torch.no_grad()
def test_rings_of_fewer_sequences_are_refused(one, refuses):
    native, ids = NativeModel(one), torch.randint(VOCAB, (3, 1))
    _, state = native(ids[:2])
    _, state = native(ids[:2], state)  # the rings that the next token would go into
    with refuses("3 sequences need"):
        native(ids, State(state.memories, torch.zeros(2, dtype=torch.int64)))
    with refuses("state must be float32 [3, 2, "):
        native(ids, State(state.memories, torch.zeros(3, dtype=torch.int64)))


@torch.no_grad()
@pytest.mark.parametrize("most", [2, 9])
def test_tokens_are_taken_back_from_the_rows_of_a_convolution(most, same):
    """As speculation does: a few tokens at once, some of them taken back, and on from there."""
    model, ids = mattering(CONFIGS["hybrid-window-convolution"]), torch.randint(VOCAB, (2, TOKENS))
    native, at, got = NativeModel(model), 0, []
    state = model.init_state(2).for_decoding(torch.float32, rollback=most).reserve(TOKENS)
    while at < TOKENS:
        part = ids[:, at : at + most + 1]
        logits, state = native(part, state)
        kept = max(1, part.shape[1] - 1 - at % most)
        state.rollback(part.shape[1] - kept)
        got.append(logits[:, :kept])
        at += kept
    want, theirs = model(ids)
    same(torch.cat(got, 1), want, 1e-4)
    same(named(state), named(theirs), 1e-5)


@torch.no_grad()
def test_rows_of_other_taps_are_refused(refuses):
    native, ids = NativeModel(mattering(CONFIGS["retnet-convolution"])), torch.tensor([[1, 2]])
    other = build(retnet(**SMALL, convolution=4)).init_state(1)
    with refuses("the state is of 4 taps, this model has 3: another model's state?"):
        native(ids, other)
    with refuses("rows must be float32 [2, 2, 48], got torch.float32 [1, 2, 48]"):
        native(ids.expand(2, 2), State(native.init_state(1).memories, torch.zeros(2, dtype=torch.int64)))


@torch.no_grad()
@pytest.mark.parametrize("group", [48, 96, 240])
@pytest.mark.parametrize("bits", [8, 4])
def test_groups_of_any_size_in_prompts(bits, group, threads):
    """No thread writes into another's work space: the same bits every time, near those of float32."""
    made = quantize(mattering(retnet(**SMALL | dict(dim=256, ffn_dim=448))), bits, group)
    native, ids = NativeModel(made, threads=threads), torch.randint(VOCAB, (2, TOKENS))
    first = native(ids)[0]
    for _ in range(5):
        assert torch.equal(native(ids)[0], first)
    want = copy.deepcopy(made).float()(ids)[0]
    assert float((first - want).norm() / want.norm()) < 0.03  # bf16 in 2 layers: 0.01


@torch.no_grad()
def test_the_logits_of_nothing(one):
    model = NativeModel(one)
    x, _ = model.hidden(torch.tensor([[1, 2]]))
    assert model.head(x[:, :0]).shape == (1, 0, one.config.vocab_size)


@torch.no_grad()
def test_ids_and_positions_of_other_integers(one, same, refuses):
    made, ids = NativeModel(one), torch.randint(VOCAB, (2, 9))
    want, state = one(ids[:, :8])
    for dtype in (torch.int32, torch.int64):
        same(made(ids[:, :8].to(dtype))[0], want, 1e-4)
        moved = State(state.memories, state.position.to(dtype))
        same(made(ids[:, 8:].to(dtype), moved)[0], one(ids)[0][:, 8:], 1e-4)
    for bad in (ids.to(torch.uint8), ids.to(torch.bool), ids.float(), ids.tolist(), "ids"):
        with refuses("token ids must be a tensor of int64 or int32, got", TypeError):
            made(bad)


def step_of_an_optimiser(model):
    with torch.enable_grad():
        model(torch.tensor([[1, 2, 3]]))[0].sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def times(model):
    for p in model.parameters():
        if p.is_floating_point():
            p.mul_(1.5)


def other_storage(model):
    for p in model.parameters():
        p.data = p.data.roll(1, 0)


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(build(model.config).state_dict()),
    "assigned": lambda model: model.load_state_dict(build(model.config).state_dict(), assign=True),
    "in-place": times,
    "optimiser": step_of_an_optimiser,
    "other-storage": other_storage,
    "one-vector": lambda model: model.blocks[-1].ffn_norm.weight.add_(1),
    "the-head": lambda model: model.head.weight.mul_(2),
    "a-bias": lambda model: [p.add_(1) for name, p in model.named_parameters() if name.endswith("bias")],
    "the-taps": lambda model: [
        p.add_(1) for name, p in model.named_parameters() if name.endswith("convolution.weight")
    ],
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["own-decays", "biases", "forget-gate", "hybrid", "hybrid-window-convolution"])
def test_it_computes_with_the_weights_as_they_are_now(name, change, same):
    """Weights changed through either model are packed again."""
    model, ids = mattering(CONFIGS[name]), torch.randint(VOCAB, (2, 9))
    native = NativeModel(model)
    for changed in (native, model) if change != "assigned" else (native,):  # only there are the new ones
        native(ids)
        CHANGES[change](changed)
        same(native(ids)[0], super(NativeModel, native).hidden(ids)[0] @ native.head.weight.T, 1e-4)


@torch.no_grad()
def test_integers_are_packed_again_too(one, same):
    made, other = (quantize(mattering(CONFIGS["retnet"]), 4, dtype=torch.float32) for _ in range(2))
    native, ids = NativeModel(made), torch.randint(VOCAB, (1, 9))
    native(ids)
    native.load_state_dict(other.state_dict())
    same(native(ids)[0], other(ids)[0], 1e-3)


@torch.no_grad()
def test_weights_made_in_inference_mode_are_read(same):
    with torch.inference_mode():
        model = mattering(CONFIGS["hybrid"])
        native, ids = NativeModel(model), torch.randint(VOCAB, (1, 9))
        same(native(ids)[0], model(ids)[0], 1e-4)


@torch.no_grad()
def test_another_shape_or_dtype_of_the_weights_is_refused_afterwards(one, refuses):
    made, ids = NativeModel(one), torch.tensor([[1, 2, 3]])
    one.blocks[0].ffn.up_proj.weight.data = torch.zeros(7, 48)
    with refuses("the native engine has packed float32 [80, 48], the model has float32 [7, 48] now: call with_engine"):
        made(ids)
    made = NativeModel(one := mattering(CONFIGS["retnet"]))
    one.bfloat16()
    for part in (ids[:, :1], ids):
        with refuses("the native engine has float32 weights, the model has bfloat16 now: call with_engine anew"):
            made(part)


def test_it_is_not_converted(one, refuses):
    made = NativeModel(one)
    for convert in (made.half, made.bfloat16, made.double, lambda: made.to("meta")):
        with refuses("a model of the native engine stays float32 on the CPU: convert the model it was made from"):
            convert()
    assert made.float() is made and made.to("cpu") is made


@torch.no_grad()
@pytest.mark.parametrize("name", ["own-decays", "transformer", "hybrid", "hybrid-window-convolution"])
def test_rows_in_place_of_ids(name, same, refuses):
    """Rows, as of pictures and sound, are scaled and normalised like the embeddings of ids."""
    model = mattering(CONFIGS[name])
    native, ids = NativeModel(model), torch.randint(VOCAB, (2, 21))
    rows = torch.randn(2, 21, 48)
    got, state = native.hidden(None, embeds=rows[:, :20])
    want, theirs = model.hidden(None, embeds=rows[:, :20])
    same(got, want, 1e-4)
    same(native.hidden(None, state, embeds=rows[:, 20:])[0], model.hidden(None, theirs, embeds=rows[:, 20:])[0], 1e-4)
    same(native.hidden(None, embeds=model.embed(ids))[0], native.hidden(ids)[0], 0)
    packed = torch.tensor([0, 5, 21])
    got, _ = native.hidden(None, embeds=rows[:1], cu_seqlens=packed)
    same(got, model.hidden(None, embeds=rows[:1], cu_seqlens=packed)[0], 1e-4)
    with refuses("the model needs embeds [B,T,48], got [2, 21, 47]"):
        native.hidden(None, embeds=rows[..., 1:])


def test_it_is_not_copied(one, refuses):
    with refuses("is not copied or pickled", TypeError):
        copy.deepcopy(NativeModel(one))


def test_without_memory_for_it_torch_goes_on_where_nobody_chose(one, monkeypatch, refuses):
    def full(*_, **__):
        raise MemoryError("no memory for 9 MB of packed weights")

    monkeypatch.setattr("retentive.native.model.Packed", full)
    assert with_engine(one) is one
    with refuses("no memory for 9 MB", MemoryError):
        with_engine(one, "native")


@torch.no_grad()
def test_what_it_cannot_do_is_refused(one, refuses):
    assert refused(one) is None
    assert "the model is float16" in refused(build(retnet(**SMALL)).half())
    with refuses("the native engine cannot run this model: it computes in float32 or bfloat16, the model is float16"):
        NativeModel(build(retnet(**SMALL)).half())
    with refuses("activations of int8 need int8 or int4 weights, the model has none: quantise it"):
        NativeModel(one, activations="int8")
    with refuses("unknown activations 'int9', expected one of int16, int8"):
        NativeModel(one, activations="int9")
    with refuses("this model has activations of int16: name the one that it was made from"):
        with_engine(NativeModel(one), "native", "int8")
    with refuses("activations of int8 need the native engine: the engine is torch"):
        with_engine(one, "torch", "int8")
    native = NativeModel(one)
    with refuses("the model needs ids [B,T] with at least one token, got [1, 0]"):
        native(torch.zeros(1, 0, dtype=torch.int64))
    for bad in (-1, VOCAB):
        with refuses(f"token ids must be from 0 to 52, got {bad}", IndexError):
            native(torch.tensor([[3, bad]]))
    other = build(retnet(**{**SMALL, "heads": 4})).init_state(1)
    with refuses("state must be float32 [1, 2, 24, 40], got torch.float32 [1, 4, 12, 24]"):
        native(torch.zeros(1, 1, dtype=torch.int64), other)
    short = State(one.init_state(2).memories, torch.zeros(3, dtype=torch.int64))
    with refuses("state must be float32 [3, 2, 24, 40], got torch.float32 [2, 2, 24, 40]"):
        native(torch.zeros(3, 1, dtype=torch.int64), short)
    with refuses("3 sequences need a position each, got [2]"):
        native(torch.zeros(3, 1, dtype=torch.int64), one.init_state(2))
    with refuses("cu_seqlens must ascend from 0 to the 4 tokens, got [0, 5]"):
        native(torch.zeros(1, 4, dtype=torch.int64), cu_seqlens=torch.tensor([0, 5]))
