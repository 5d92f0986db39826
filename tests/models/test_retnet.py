"""RetNet's forms, backends, compilation and checkpointing against its plain eager call."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from retentive.models import ARCHITECTURES, LanguageModel, retnet, transformer
from retentive.ops import using
from tests.configs import hybrid

SMALL = dict(vocab_size=31, dim=24, layers=2, heads=2)
CONFIG = retnet(**SMALL)
PAPER = retnet(**SMALL, **ARCHITECTURES["retnet-paper"])
FORMS = ["parallel", "recurrent", "chunkwise"]
EXACT = 1e-12  # float64 has 53 bits, 1e-16; two layers of sums in another order cost thousands of that


def ids_of(B: int, T: int) -> torch.Tensor:
    return torch.randint(31, (B, T))


configs = pytest.mark.parametrize("config", [CONFIG, PAPER], ids=["retnet", "retnet-paper"])


@configs
@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
@torch.no_grad()
def test_any_form_goes_on_where_any_other_stopped(first, second, config, make, same):
    model, ids = make(config), ids_of(2, 12)
    want, end = model(ids)
    for split in range(1, 12):
        with using(form=first, chunk_size=5):
            one, state = model(ids[:, :split])
        with using(form=second, chunk_size=4):
            two, state = model(ids[:, split:], state)
        same(torch.cat((one, two), 1), want, EXACT, f"split at {split}")
        same(state.tensors(), end.tensors(), EXACT, f"split at {split}")


@pytest.mark.parametrize("lengths", [[9, 4, 1], [[0, 9], [5, 9], [8, 9]]], ids=["right", "left"])
@pytest.mark.parametrize("form", FORMS)
@configs
@torch.no_grad()
def test_padding_is_exact_in_every_form(config, form, lengths, make, same):
    model, ids, lengths = make(config), ids_of(3, 9), torch.tensor(lengths)
    with using(form=form, chunk_size=4):
        logits, state = model(ids, lengths=lengths)
        more, _ = model(ids, state)  # rows at different positions
    for row in range(3):
        a, b = lengths[row].tolist() if lengths.ndim == 2 else (0, int(lengths[row]))
        want, _ = model(torch.cat((ids[row, a:b], ids[row]))[None])
        same(torch.cat((logits[row, a:b], more[row]))[None], want, EXACT, f"row {row}")


# torchscale's forms differ by 0.2 in the logits at its default eps; ours by float32's 24 bits, 6e-8, some hundred-fold
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, EXACT), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", ["retnet", "retnet-paper", "torchscale"])
@torch.no_grad()
def test_any_form_and_any_chunk_size_give_the_same_logits(name, dtype, tol, make, same):
    model, ids = make(retnet(**SMALL, **ARCHITECTURES[name]), dtype), ids_of(2, 70)
    with using(form="recurrent"):
        want, end = model(ids)
    hows = [dict(form="parallel"), dict(backend="reference"), dict(form="auto")]
    hows += [dict(form="chunkwise", chunk_size=C) for C in (1, 7, 16, 64, 70, 1000)]
    for how in hows:
        with using(**how):
            logits, state = model(ids)
        same([logits, *state.tensors()], [want, *end.tensors()], tol, str(how))


@pytest.mark.parametrize("more", [{}, dict(cu_seqlens=[0, 4, 9]), dict(lengths=[9])], ids=["rows", "packed", "padded"])
def test_compiles_as_one_graph(more, make, same):
    model = make(retnet(**SMALL | dict(layers=1)))
    ids, more = ids_of(1, 9), {name: torch.tensor(value) for name, value in more.items()}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def run(f):
        logits, state = f(ids, **more)
        loss = logits.square().sum() + state.memories[0].value.sum()
        return logits, state.memories[0].value, *torch.autograd.grad(loss, list(model.parameters()))

    same(run(compiled), run(model), EXACT)


def test_decoding_compiles_as_one_graph(make, same):
    model, ids = make(retnet(**SMALL | dict(layers=1))), ids_of(2, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want, state = model(ids)
        _, start = model(ids[:, :3])
        logits, after = compiled(ids[:, 3:], start)
    same([logits, *after.settled().tensors()], [want[:, 3:], *state.tensors()], EXACT)


def test_activation_checkpointing_gives_the_same_gradients(make, same):
    model, ids = make(CONFIG), ids_of(2, 9)

    def gradients():
        return torch.autograd.grad(model(ids)[0].square().sum(), list(model.parameters()))

    want = gradients()
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    same(gradients(), want, EXACT)


def test_gradients_flow_through_many_states(make, same):
    model, ids = make(CONFIG), ids_of(2, 12)
    want = torch.autograd.grad(model(ids)[0][:, -1].square().sum(), list(model.parameters()))
    state = None
    for part in ids.split(3, 1):
        logits, state = model(part, state)
    got = torch.autograd.grad(logits[:, -1].square().sum(), list(model.parameters()))
    same(got, want, EXACT)


@pytest.mark.parametrize("T", [1, 5], ids=["T1", "T5"])
def test_choices_that_cannot_be_met_are_refused(T, make, refuses):
    """A backend that is named never falls back, one token or many."""
    model, ids = make(CONFIG), ids_of(2, T)
    with refuses("backend 'blocked' cannot do this"), using(form="recurrent", backend="blocked"):
        model(ids)
    with refuses("backend 'cpu' cannot do this: it computes in float32 at most"), using(backend="cpu"):
        model(ids)


@torch.no_grad()
def test_attention_takes_no_notice_of_forms(make, same):
    """It is no retention: the twin computes what it did, and in a hybrid only the other blocks change their form."""
    ids = ids_of(2, 9)
    twin, mixer = make(transformer(**SMALL)), make(hybrid(**SMALL | dict(layers=3), attention_every=2))
    want, mixed = twin(ids)[0], mixer(ids)[0]
    with using(form="recurrent", backend="reference"):
        same(twin(ids)[0], want, 0)
        same(mixer(ids)[0], mixed, EXACT)


@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_runs_on_the_meta_device(form):
    with torch.device("meta"):
        model, ids = LanguageModel(CONFIG), torch.zeros(2, 5, dtype=torch.int64)
        with using(form=form):
            logits, state = model(ids)
            logits, state = model(ids[:, :1], state)
    assert logits.shape == (2, 1, 31) and state.memories[0].value.device.type == "meta"


def test_initialisation_is_torchscales_and_the_twins_alike():
    """Xavier uniform: bound gain sqrt(6 / (in + out)), gain 2^-2.5 for what enters and 2^-1 for what leaves."""
    for model, name in ((LanguageModel(CONFIG), "retention"), (LanguageModel(transformer(**SMALL)), "attention")):
        layer = getattr(model.blocks[0], name)
        for proj, gain in ((layer.q_proj, 2**-2.5), (layer.v_proj, 2**-2.5), (layer.out_proj, 0.5)):
            bound = gain * (6 / sum(proj.weight.shape)) ** 0.5
            # 576 and more uniform draws: that the largest is below 0.97 of the bound has probability 0.97^576, 2e-8
            assert 0.97 * bound < proj.weight.abs().max().item() <= bound
        # 744 draws of N(0, 1/D): the standard error of their deviation is 1 / sqrt(2 * 744), 2.6 %; four of those
        for matrix in (model.embed.weight, model.head.weight):
            assert matrix.std().item() == pytest.approx(24**-0.5, rel=0.11)
