"""Converted weights give the other projects' logits and states, each fixture to the tolerance that its README derives.

torchscale (microsoft/torchscale) and fla (flash-linear-attention) computed them with their own code. Each README says
how the weights were made, how far that code is from float64, and what typical mistakes would cost.
"""

import re

import pytest
import torch
from safetensors.torch import load_file

import retentive
from retentive.ops import using

TORCHSCALE = ["chunkwise-eps0", "clamp-active", "clamp-inactive", "parallel-gelu-tied", "parallel-swish", "recurrent"]
FLA = ["default", "kv-heads", "left-padding", "old-fused", "prefill-decode", "tied"]
FIXTURES = [f"torchscale-{name}" for name in TORCHSCALE] + [f"fla-{name}" for name in FLA]

FORMS = {
    "parallel": dict(form="parallel"),
    "recurrent": dict(form="recurrent"),
    "chunkwise": dict(form="chunkwise", chunk_size=16),
}
forms = pytest.mark.parametrize("form", FORMS)
fixtures = pytest.mark.parametrize("name", FIXTURES)


class Fixture:
    """One folder: the model as converted, what is expected of it, and how closely."""

    def __init__(self, folder, dtype):
        self.model, tokenizer = retentive.load(folder, dtype=dtype)
        assert tokenizer is None
        self.expected = load_file(folder / "expected.safetensors")
        self.ids = self.expected["input_ids"]
        self.narrow = dtype == torch.float32
        readme = (folder / "README.md").read_text(encoding="utf-8")
        self.atol = float(re.search(rf"Tolerance fp{32 if self.narrow else 64}: atol ([\de.-]+)", readme)[1])
        self.lengths, self.valid = None, torch.ones_like(self.ids, dtype=torch.bool)
        if "attention_mask" in self.expected:  # pads on the left
            self.valid = self.expected["attention_mask"].bool()
            end = torch.full((len(self.ids),), self.ids.shape[1])
            self.lengths = torch.stack((end - self.valid.sum(1), end), 1)

    def close(self, got, want, where=...):
        torch.testing.assert_close(got[where], want[where], rtol=0, atol=self.atol)


@pytest.fixture
def fixture(parity):
    return lambda name, dtype=torch.float32: Fixture(parity / name, dtype)


@forms
@fixtures
@torch.no_grad()
def test_logits_in_float32(name, form, fixture):
    f = fixture(name)
    with using(**FORMS[form]):
        logits, _ = f.model(f.ids, lengths=f.lengths)
    # where torchscale's third stabiliser acts, ours is what its recurrent mode does, without it (see its README)
    f.close(logits, f.expected["logits_recurrent" if name == "torchscale-clamp-active" else "logits"], f.valid)


@forms
@fixtures
@torch.no_grad()
def test_logits_in_float64(name, form, fixture):
    """In float64 not a single constant may have been rounded to float32 on the way."""
    f = fixture(name, torch.float64)
    with using(**FORMS[form]):
        logits, _ = f.model(f.ids, lengths=f.lengths)
    key = "logits_f64_formula" if name.startswith("fla") else "logits_f64_exact"
    f.close(logits, f.expected["logits_recurrent_f64_exact" if name == "torchscale-clamp-active" else key], f.valid)


@fixtures
@torch.no_grad()
def test_logits_through_transformers(name, fixture):
    pytest.importorskip("transformers", minversion="5.16", reason="needs pip install 'retentive[hf]'")
    from tests.hf.conftest import theirs_of

    f = fixture(name)
    logits = theirs_of(f.model)(f.ids, attention_mask=f.expected.get("attention_mask")).logits
    f.close(logits, f.expected["logits_recurrent" if name == "torchscale-clamp-active" else "logits"], f.valid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", ["torchscale-chunkwise-eps0", "torchscale-clamp-inactive", "torchscale-recurrent"])
@torch.no_grad()
def test_the_other_modes_of_torchscale_give_the_same(name, dtype, fixture):
    f = fixture(name, dtype)
    logits, _ = f.model(f.ids)
    suffix = "" if f.narrow else "_f64_exact"
    keys = [key for key in (f"logits_parallel{suffix}", f"logits_recurrent{suffix}") if key in f.expected]
    assert keys
    for key in keys:
        f.close(logits, f.expected[key])


@torch.no_grad()
def test_where_the_clamp_acts_we_differ_from_the_parallel_mode_by_what_torchscale_does_from_itself(fixture):
    f = fixture("torchscale-clamp-active", torch.float64)
    logits, _ = f.model(f.ids)
    own = (f.expected["logits_f64_exact"] - f.expected["logits_recurrent_f64_exact"]).abs().max().item()
    assert own > 1e7 * f.atol  # 2.4e-3 and 2.8e-3, say the READMEs
    ours = (f.expected["logits_f64_exact"] - logits).abs().max().item()
    assert ours == pytest.approx(own, abs=f.atol)


@pytest.mark.parametrize("name", [f"fla-{name}" for name in FLA])
@torch.no_grad()
def test_prefill_and_decode_give_flas_logits(name, fixture):
    f = fixture(name)
    want = f.expected["decode_logits"]
    steps = want.shape[1]
    T = f.ids.shape[1] - steps
    lengths = None if f.lengths is None else f.lengths.clamp(max=T)
    logits, state = f.model(f.ids[:, :T], lengths=lengths)
    if "prefill_logits" in f.expected:
        f.close(logits, f.expected["prefill_logits"])
    got = []
    for t in range(T, T + steps):
        logits, state = f.model(f.ids[:, t : t + 1], state)
        got.append(logits)
    f.close(torch.cat(got, 1), want)
    assert state.position.tolist() == f.valid.sum(1).tolist()


@torch.no_grad()
def test_states_are_flas(fixture, same):
    f = fixture("fla-prefill-decode")
    _, state = f.model(f.ids[:, :40])
    for when in ("prefill", "end"):
        for i, layer in enumerate(m.value for m in state.memories):
            # its states are 2e-6 from float64, says the README; another order of operations may cost a few times that
            same(layer, f.expected[f"state_{when}.{i}"], 1e-5, f"{when}, layer {i}")
        _, state = f.model(f.ids[:, 40:], state)


@pytest.mark.parametrize(
    # the tolerances of the logits, relative: its states are as large as 1, and no norm has enlarged their errors yet
    ("dtype", "prefix", "tol"), [(torch.float32, "state", 1e-5), (torch.float64, "state_f64_exact", 1e-10)],
    ids=["fp32", "fp64"],
)  # fmt: skip
@torch.no_grad()
def test_states_are_torchscales(dtype, prefix, tol, fixture, same):
    """Its prev_key_value is [B,H,V,K] and holds S / sqrt(sum of gamma^j) with K^-1/2 folded into k."""
    f = fixture("torchscale-recurrent", dtype)
    _, state = f.model(f.ids)
    for i, layer in enumerate(m.value for m in state.memories):
        theirs, scale = f.expected[f"{prefix}.{i}.prev_key_value"], f.expected[f"{prefix}.{i}.scale"]
        K = theirs.shape[-1]
        same(layer, theirs.mT * scale.sqrt()[:, None, None] * K**0.5, tol, f"layer {i}")
