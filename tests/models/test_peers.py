"""Peers of the transformers library behind our interface: packed rows, parameters, saving, what they refuse.

The oracle is the library's own call on each sequence alone. Skipped where the library is not installed.
"""

import pytest
import torch
import torch.nn.functional as F

import retentive
from retentive.checkpoint import save_model
from retentive.infer import generate
from retentive.models import LanguageModel, Peer, PeerConfig, build, cost, peer, retnet
from retentive.models.peers import KINDS

pytest.importorskip("transformers")
# the library tells that it takes its own slow ways on a CPU
pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = retnet(vocab_size=31, dim=32, layers=2, heads=2, tie_embeddings=True)


@pytest.fixture(params=KINDS)
def model(request) -> Peer:
    torch.manual_seed(0)
    return build(peer(SMALL, request.param)).eval()


@torch.no_grad()
def test_packed_sequences_are_sequences_alone(model, same):
    parts = [torch.randint(31, (1, n)) for n in (5, 1, 8)]
    got, state = model(torch.cat(parts, 1), cu_seqlens=torch.tensor([0, 5, 6, 14]))
    assert state is None
    for ids, logits in zip(parts, got.split([5, 1, 8], 1), strict=True):
        alone = model.head(model.backbone(ids, use_cache=False).last_hidden_state)
        same(logits, alone, 1e-5)  # float32: other batches sum in another order


@torch.no_grad()
def test_no_token_sees_those_after_it(model, same):
    ids = torch.randint(31, (1, 9))
    other = ids.clone()
    other[0, 6:] = (ids[0, 6:] + 1) % 31
    same(model(ids)[0][:, :6], model(other)[0][:, :6], 1e-5)
    assert not torch.allclose(model(ids)[0][:, 6:], model(other)[0][:, 6:])


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(model, same):
    ids = torch.randint(31, (2, 7))
    logits, _ = model(ids, lengths=torch.tensor([7, 4]))
    same(logits[1:, :4], model(ids[1:, :4])[0], 1e-5)


def test_a_folder_gives_the_same_logits(model, tmp_path, same):
    save_model(tmp_path / "peer", model)
    again, tokenizer = retentive.load(tmp_path / "peer")
    assert again.config == model.config and tokenizer is None
    ids = torch.randint(31, (2, 7))
    with torch.no_grad():
        same(again(ids)[0], model(ids)[0], 0)


@pytest.mark.parametrize("size", ["1m", "5m"])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_about_the_retnets(kind, size):
    config = retnet(size, vocab_size=1000)
    # Mamba's blocks come in wholes, of a size that is not ours
    assert cost.block_parameters(peer(config, kind)) == pytest.approx(cost.block_parameters(config), rel=0.15)
    assert cost.parameters(peer(config, kind)) == sum(p.numel() for p in build(peer(config, kind)).parameters())


@torch.no_grad()
def test_losses_begin_as_retnets_does(model):
    """No head start, no handicap: embedding and output are initialised as there."""
    ids, targets = torch.randint(31, (4, 30)), torch.randint(31, (120,))
    losses = [float(F.cross_entropy(m(ids)[0].flatten(0, 1), targets)) for m in (model, build(SMALL).eval())]
    # of 120 tokens; transformers' own initialisation of embeddings would be far off (RWKV's are 1e-4)
    assert abs(losses[0] - losses[1]) < 1.0, losses


def test_what_it_cannot_do_is_refused(model, refuses):
    ids = torch.randint(31, (1, 4))
    with refuses("has no state here: it can be trained and scored"):
        model.init_state(1)
    for how in (dict(embeds=torch.zeros(1, 4, 32)), dict(lengths=torch.tensor([[1, 4]]))):
        with refuses("no state, no embeds, no left padding"):
            model(ids, **how)


def test_it_is_not_decoded_without_its_context(model, refuses):
    with refuses("has no state here"):
        list(generate(model, [1, 2, 3], max_tokens=2))


def test_it_keeps_no_state(model):
    assert isinstance(model, LanguageModel) and not model.keeps_state
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_an_unknown_kind_is_refused(refuses):
    with refuses("unknown kind of model 'gpt2', expected one of llama, mamba, mamba2, rwkv"):
        PeerConfig("gpt2", 31, 32, 2, 2, 64)
