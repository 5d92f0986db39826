"""The interface of every model: device, dtype, states that it accepts; torch.export and torch.func."""

from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

from retentive.models import LanguageModel, State, build, retnet, transformer
from retentive.ops import Ring
from tests.configs import hybrid

SMALL = dict(vocab_size=31, dim=24, layers=2, heads=2)
CONFIGS = {
    "retnet": retnet(**SMALL),
    "hybrid": hybrid(**SMALL, attention_every=2),
    "transformer": transformer(**SMALL),
}
kinds = pytest.mark.parametrize("kind", CONFIGS)
EXACT = 1e-12  # float64 has 53 bits, 1e-16; two layers of sums in another order cost thousands of that


def ids_of(B: int, T: int) -> torch.Tensor:
    return torch.randint(31, (B, T))


@kinds
def test_device_and_dtype_are_those_of_its_weights(kind):
    model = build(CONFIGS[kind])
    assert isinstance(model, LanguageModel) and model.keeps_state
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    model.bfloat16().to("meta")
    assert (model.device.type, model.dtype) == ("meta", torch.bfloat16)


@kinds
def test_logits_are_the_head_of_what_is_hidden(kind, make, same):
    model, ids = make(CONFIGS[kind]), ids_of(2, 5)
    x, _ = model.hidden(ids)
    same(model.head(x), model(ids)[0], 0)


@pytest.mark.parametrize("other", CONFIGS)
@kinds
def test_another_kinds_state_is_refused_in_one_line(kind, other, make, refuses):
    model, state = make(CONFIGS[kind]), make(CONFIGS[other]).init_state(2)
    if kind == other:
        assert model(ids_of(2, 3), state)[0].isfinite().all()
        return
    with refuses(f"of this model is of {model.config.kinds[0 if state.kinds[0] != model.config.kinds[0] else 1]}"):
        model(ids_of(2, 3), state)


@kinds
def test_a_state_of_another_depth_is_refused(kind, make, refuses):
    model = make(CONFIGS[kind])
    config = CONFIGS[kind]
    state = make(replace(config, blocks=config.blocks * 2)).init_state(2)
    with refuses("the state is of 4 blocks"):
        model(ids_of(2, 3), state)


@kinds
@torch.no_grad()
def test_exported_it_gives_the_same_logits_and_state(kind, make, same):
    model, ids = make(CONFIGS[kind]), ids_of(2, 5)
    want, end = model(ids)
    logits, state = torch.export.export(model, (ids,)).module()(ids)
    assert isinstance(state, State) and state.kinds == end.kinds
    same([logits, *state.named().values(), state.position], [want, *end.named().values(), end.position], EXACT)


@torch.no_grad()
def test_a_step_of_decoding_can_be_exported(make, same):
    model, ids = make(CONFIGS["retnet"]), ids_of(2, 6)
    want, _ = model(ids)
    _, state = model(ids[:, :4])
    step = torch.export.export(model, (ids[:, 4:5], state.clone())).module()
    logits, state = step(ids[:, 4:5], state)
    same(logits, want[:, 4:5], EXACT)
    assert all(isinstance(x, Ring) for x in (m.value for m in state.memories))
    again = torch.export.export(model, (ids[:, 5:], state.clone())).module()  # the state has other parts now
    same(again(ids[:, 5:], state)[0], want[:, 5:], EXACT)


@kinds
@torch.no_grad()
def test_a_state_is_a_tree_of_its_tensors(kind, make, same):
    model, ids, more = make(CONFIGS[kind]), ids_of(2, 3), ids_of(2, 1)
    _, state = model(ids[:, 2:], model(ids[:, :2])[1])
    copy = pytree.tree_map(torch.clone, state)
    same(copy.position, state.position, 0)
    same(model(more, copy)[0], model(more, state)[0], 0)


@kinds
def test_torch_func_differentiates_a_whole_model(kind, make, same):
    model, ids = make(CONFIGS[kind]), ids_of(2, 5)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (ids,))[0].square().sum()

    want = torch.autograd.grad(loss(parameters), list(parameters.values()))
    same(list(torch.func.grad(loss)(parameters).values()), list(want), EXACT)
