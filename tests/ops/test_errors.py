"""Each misuse of `retention` and `retention_step` raises a ValueError of one line, as the docstrings promise."""

import pytest
import torch

from retentive.ops import retention, retention_step

B, T, H, K, V = 2, 4, 3, 4, 6


def arguments(**changes) -> dict:
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    return {"q": q, "k": k, "v": v, "log_decay": torch.full((H,), -0.1)} | changes


def packed(*cu_seqlens, dtype=torch.int64, rows=1) -> dict:
    """Returns arguments with one row of T tokens, cut at `cu_seqlens`."""
    q, k, v = torch.randn(rows, T, H, K), torch.randn(rows, T, H, K), torch.randn(rows, T, H, V)
    return {"q": q, "k": k, "v": v, "cu_seqlens": torch.tensor(cu_seqlens, dtype=dtype)}


BAD = {
    "k-shape": (dict(k=torch.randn(B, T, H, K + 1)), "got q (2, 4, 3, 4), k (2, 4, 3, 5)"),
    "v-heads": (dict(v=torch.randn(B, T, H + 1, V)), "v (2, 4, 4, 6)"),
    "three-dims": (dict(q=torch.randn(B, H, K)), "q and k [B,T,H,K]"),
    "dtypes": (dict(k=torch.randn(B, T, H, K).bfloat16()), "one floating dtype, got torch.float32, torch.bfloat16"),
    "integers": ({n: torch.ones(B, T, H, K, dtype=torch.int64) for n in "qkv"}, "one floating dtype, got torch.int64"),
    "devices": (dict(v=torch.randn(B, T, H, V, device="meta")), "one device, got cpu, cpu, meta"),
    "no-tokens": ({n: torch.randn(B, 0, H, K) for n in "qkv"}, "at least one row and one token"),
    "no-rows": ({n: torch.randn(0, T, H, K) for n in "qkv"}, "at least one row and one token"),
    "form": (dict(form="serial"), "unknown form 'serial', expected one of auto, parallel, recurrent, chunkwise"),
    "backend": (dict(backend="cuda"), "unknown backend 'cuda', expected auto, triton, cpu, blocked, reference"),
    "backend-cannot": (dict(backend="blocked", form="recurrent"), "backend 'blocked' cannot do this: it"),
    "chunk-0": (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
    "chunk-negative": (dict(chunk_size=-3), "chunk_size must be at least 1, got -3"),
    "decay-shape": (dict(log_decay=torch.zeros(H + 1)), "log_decay must be [3] or [2, 4, 3], got [4]"),
    "decay-per-row": (dict(log_decay=torch.zeros(B, H)), "log_decay must be [3] or [2, 4, 3], got [2, 3]"),
    "decay-bf16": (dict(log_decay=torch.zeros(H).bfloat16()), "float32 or float64, which keep gamma near 1 apart"),
    "decay-fp16": (dict(log_decay=torch.zeros(H).half()), "log_decay must be float32 or float64"),
    "decay-integer": (dict(log_decay=torch.zeros(H, dtype=torch.int64)), "log_decay must be float32 or float64"),
    "decay-device": (dict(log_decay=torch.zeros(H, device="meta")), "q is on cpu, but log_decay on meta"),
    "state-shape": (dict(state=torch.zeros(B, H, V, K)), "state must be torch.float32 [2, 3, 4, 6]"),
    "state-dtype": (dict(state=torch.zeros(B, H, K, V).bfloat16()), "got torch.bfloat16 [2, 3, 4, 6]"),
    "state-rows": (dict(state=torch.zeros(B + 1, H, K, V)), "got torch.float32 [3, 3, 4, 6]"),
    "state-device": (dict(state=torch.zeros(B, H, K, V, device="meta")), "but state on meta"),
    "cu-descends": (packed(0, 3, 2, 4), "cu_seqlens must ascend from 0 to T = 4, got [0, 3, 2, 4]"),
    "cu-empty-sequence": (packed(0, 2, 2, 4), "cu_seqlens must ascend from 0 to T = 4"),
    "cu-end": (packed(0, 2, 5), "cu_seqlens must ascend from 0 to T = 4, got [0, 2, 5]"),
    "cu-start": (packed(1, 2, 4), "cu_seqlens must ascend from 0 to T = 4, got [1, 2, 4]"),
    "cu-one-number": (packed(0), "cu_seqlens must be [N+1]"),
    "cu-dtype": (packed(0.0, 4.0, dtype=torch.float32), "cu_seqlens must be [N+1] int32 or int64, got torch.float32"),
    "cu-two-rows": (packed(0, 4, rows=2), "B must be 1, got 2"),
    "cu-state-rows": (packed(0, 2, 4) | dict(state=torch.zeros(1, H, K, V)), "state must be torch.float32 [2, 3, 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_retention_refuses(case, refuses):
    changes, words = BAD[case]
    with refuses(words):
        retention(**arguments(**changes))


BAD_STEPS = {
    "time-axis": (dict(q=torch.randn(B, 1, H, K)), "q and k [B,H,K] and v [B,H,V], got q (2, 1, 3, 4)"),
    "k-shape": (dict(k=torch.randn(B, H, K + 1)), "k (2, 3, 5)"),
    "dtypes": (dict(v=torch.randn(B, H, V).half()), "got torch.float32, torch.float32, torch.float16"),
    "devices": (dict(k=torch.randn(B, H, K, device="meta")), "one device, got cpu, meta, cpu"),
    "decay-shape": (dict(log_decay=torch.zeros(B, 1, H)), "log_decay must be [3] or [2, 3], got [2, 1, 3]"),
    "decay-bf16": (dict(log_decay=torch.zeros(H).bfloat16()), "log_decay must be float32 or float64"),
    "state-shape": (dict(state=torch.zeros(B, H, V, K)), "state must be torch.float32 [2, 3, 4, 6]"),
    "state-dtype": (dict(state=torch.zeros(B, H, K, V).double()), "got torch.float64"),
    "state-device": (dict(state=torch.zeros(B, H, K, V, device="meta")), "but state on meta"),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_a_step_refuses(case, refuses):
    changes, words = BAD_STEPS[case]
    good = dict(q=torch.randn(B, H, K), k=torch.randn(B, H, K), v=torch.randn(B, H, V), log_decay=torch.zeros(H))
    with refuses(words):
        retention_step(**{**good, **changes})


def test_the_good_call_that_the_bad_ones_are_made_from_is_good():
    assert retention(**arguments())[0].shape == (B, T, H, V)
    assert retention(**arguments(**packed(0, 1, 4)))[1].shape == (2, H, K, V)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_shapes_on_the_meta_device(backend):
    """Shape inference without memory, which `torch.device("meta")` promises for every operator."""
    tensors = {name: x.to("meta") for name, x in arguments().items()}
    o, state = retention(**tensors, backend=backend)
    assert (o.shape, state.shape, o.device.type) == ((B, T, H, V), (B, H, K, V), "meta")


def test_shapes_of_a_step_on_the_meta_device():
    q, k, v = torch.randn(B, H, K), torch.randn(B, H, K), torch.randn(B, H, V)
    o, state = retention_step(*(x.to("meta") for x in (q, k, v, torch.zeros(H))))
    assert (o.shape, state.shape) == ((B, H, V), (B, H, K, V))
