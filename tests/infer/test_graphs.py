"""Recorded steps, with a stand-in for CUDA graphs: it repeats the operators of a step on the same tensors, no Python.

What a step computes outside of these tensors, or in Python, would be missing or stale in the second run.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retentive.bench.lab import decoders
from retentive.infer import graphs as room
from retentive.infer.decoder import TorchDecoder
from retentive.models import build, mixed, retnet
from retentive.ops import backends, rows
from retentive.ops.ring import Ring


class Graph:
    """As torch.cuda.CUDAGraph: operators, the tensors that they read, and the tensors that they gave."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for f, args, kwargs, results in self.calls:
            again = f(*args, **kwargs)
            for old, new in zip(results, again if isinstance(again, tuple | list) else (again,), strict=True):
                # views and in-place results are there already
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """As torch.cuda.graph: nothing is computed, so what operators wrote in place is taken back at the end."""

    def __init__(self, graph: Graph, pool=None, capture_error_mode="global"):
        super().__init__()
        self.graph, self.before = graph, []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f is torch.ops.aten.nonzero.default:  # the size of its result is known to Python after it has run
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, schema in zip(args, f._schema.arguments, strict=False):
            if schema.is_write and isinstance(argument, torch.Tensor):
                self.before.append((argument, argument.clone()))
        results = f(*args, **kwargs)
        listed = results if isinstance(results, tuple | list) else () if results is None else (results,)
        self.graph.calls.append((f, args, kwargs, listed))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        for written, old in reversed(self.before):
            written.copy_(old)


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs on the CPU. A decode step in C counts as one operator, as a kernel on a GPU does."""
    monkeypatch.setattr(rows, "compiled", lambda *tensors: False)  # C code that is called without an operator
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)

    def one_operator(q, k, v, log_decay, scale, ring: Ring):
        parts = (ring.state, ring.k, ring.v, ring.log_decay, ring.written, ring.folded)
        return backends.decode_step_op(q, k, v, log_decay, scale, *parts)

    plain = backends.decode_step
    monkeypatch.setattr(backends, "decode_step", lambda *a: (one_operator if inside() else plain)(*a))

    def inside() -> bool:
        return isinstance(torch.utils._python_dispatch._get_current_dispatch_mode(), Recording)


CONFIG = dict(vocab_size=61, dim=32, layers=2, heads=2)
MODELS = {
    "retnet": retnet(**CONFIG),
    "convolution": retnet(**CONFIG, convolution=4),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_are_the_steps(graphs, name, same):
    torch.manual_seed(0)
    model = build(MODELS[name]).eval()
    plain, recorded = TorchDecoder(model), TorchDecoder(model)
    recorded._graphs.possible = True
    pools = [plain.pool(3), recorded.pool(3)]
    generator = torch.Generator().manual_seed(1)
    # the number of sequences changes and comes back; forty steps fold each ring several times
    for n in [3] * 20 + [2] * 20 + [3] * 20:
        ids = torch.randint(61, (n,), generator=generator)
        want, got = plain.decode(ids, pools[0]), recorded.decode(ids, pools[1])
        same(got, want, 0)
    assert [*recorded._graphs.steps] == [3, 2] and all(recorded._graphs.steps.values())
    for a, b in zip(pools[0].settled().tensors(), pools[1].settled().tensors(), strict=True):
        same(a, b, 0)


@torch.inference_mode()
def test_a_model_that_cannot_be_recorded_decodes_as_before(graphs):
    model = build(MODELS["retnet"]).eval()
    decoder, alone = TorchDecoder(model), TorchDecoder(model)
    decoder._graphs.possible = True
    model.head.register_forward_pre_hook(lambda head, x: (x[0] + len(x[0].isnan().nonzero()),))
    pool, other = decoder.pool(1), alone.pool(1)
    for token in (1, 2):
        want = alone.decode(torch.tensor([token]), other)
        with pytest.warns(UserWarning, match="without CUDA graphs") if token == 2 else room.warnings.catch_warnings():
            assert torch.equal(decoder.decode(torch.tensor([token]), pool), want)
    assert not decoder._graphs.possible


@torch.inference_mode()
def test_the_bench_times_no_wrong_recording(graphs, monkeypatch):
    rival = decoders.Recorded("retnet", MODELS["retnet"], torch.device("cpu"), torch.float32)
    rival.check()
    run = room.RecordedStep.run
    monkeypatch.setattr(room.RecordedStep, "run", lambda self, ids: run(self, ids) + (ids[0] == 40))
    with pytest.raises(ArithmeticError, match="a recorded step is off by 1"):
        rival.check()


def test_only_steps_that_wait_for_nothing_are_recorded(monkeypatch):
    monkeypatch.setattr(room, "find_spec", lambda name: True)
    gpu, config = torch.device("cuda"), MODELS["retnet"]
    assert room.recordable(config, gpu) and room.recordable(MODELS["convolution"], gpu)
    assert not room.recordable(config, torch.device("cpu"))
    assert not room.recordable(config, gpu, torch.int8)
    assert not room.recordable(mixed(config), gpu)
    assert not room.recordable(retnet(**CONFIG, architecture="retnet-paper"), gpu)
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    assert not room.recordable(config, gpu)
