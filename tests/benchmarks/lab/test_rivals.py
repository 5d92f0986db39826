"""Rivals of the operator: torchscale's decays, our backend by its name."""

import importlib
import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from benchmarks.lab import rivals
from benchmarks.lab.roofline import Work
from retentive.ops import backends

WORK = Work(1, 2, 16, 32, 64)

torchscale = pytest.mark.skipif(
    importlib.util.find_spec("torchscale") is None,
    reason="torchscale is not installed: pip install --no-deps torchscale",
)


@torchscale
def test_torchscale_gets_the_decays_that_it_makes_itself(monkeypatch):
    """Its module wants fairscale and more, for things that have no part in this."""
    for name in ("fairscale", "fairscale.nn", "timm", "timm.layers", "timm.models", "timm.models.layers", "apex"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    try:
        theirs = importlib.import_module("torchscale.architecture.retnet").RetNetRelPos
    except (ImportError, TypeError) as error:
        pytest.skip(f"torchscale's module does not load without its dependencies: {error}")
    config = SimpleNamespace(decoder_embed_dim=64, decoder_retention_heads=4, recurrent_chunk_size=32)
    _, expected = theirs(config)(64, chunkwise_recurrent=True)
    got = rivals.torchscale_decays(4, 32, torch.float32, torch.device("cpu"))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-7)  # float32 powers of theirs, float64 of ours


def test_ours_names_the_backend_that_auto_takes():
    auto, chunk = rivals.taken(replace(WORK, T=1000), "auto")
    q = torch.empty(1, 1000, 2, 16)
    call = backends.Call(q, q, q, torch.zeros(2), 1.0, torch.empty(1, 2, 16, 16), "auto", None, None)
    assert backends.choose("auto", call) is backends.BACKENDS[auto] and chunk == backends.chunk_size(call)
    assert rivals.taken(WORK, "blocked") == ("blocked", 64)
