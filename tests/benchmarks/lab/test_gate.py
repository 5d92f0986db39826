"""The correctness gate of the operator: rivals pass it with a margin. (Wrong operators: test_retention.py.)"""

import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.lab import gate, rivals
from benchmarks.lab.roofline import Work
from retentive.ops import retention as retention_op
from retentive.ops.decay import log_decay

WORK = Work(1, 2, 16, 32, 64)

torchscale = pytest.mark.skipif(
    importlib.util.find_spec("torchscale") is None,
    reason="torchscale is not installed: pip install --no-deps torchscale",
)


@pytest.mark.parametrize("name", rivals.OURS)
def test_ours_passes_with_its_error(name):
    assert 0 < gate.check(name, WORK) < gate.TOLERANCE["fp32"]


@torchscale
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [64, 128])
def test_torchscale_computes_what_we_do_up_to_its_normaliser(dtype, chunk):
    assert 0 < gate.check("torchscale", replace(WORK, dtype=dtype), chunk) < gate.RIVAL_TOLERANCE[dtype]


@pytest.mark.parametrize("older", [False, True])
def test_fla_is_called_with_tokens_before_heads(older, monkeypatch):
    """A stand-in with its signature: older ones took heads first unless told otherwise, and fp32 in TF32."""

    def chunk_retention(q, k, v, scale=None, initial_state=None, output_final_state=False):
        decays = log_decay("paper", q.shape[2])
        return retention_op(q, k, v, decays, backend="blocked")[0] * (1 + 1e-4), None

    def with_layout(q, k, v, head_first=True):
        return chunk_retention(*(x if not head_first else x.transpose(1, 2) for x in (q, k, v)))

    room = SimpleNamespace(chunk_retention=with_layout if older else chunk_retention)
    for name in ("fla", "fla.ops", "fla.ops.retention"):
        monkeypatch.setitem(sys.modules, name, room)
    assert gate.TOLERANCE["fp32"] < gate.check("fla", WORK) < gate.RIVAL_TOLERANCE["fp32"]
