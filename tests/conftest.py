"""Shared fixtures: one seed, poisoned memory, and ways of asserting."""

import gc
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from filelock import FileLock

# Threads that spin while waiting take time from others: on busy cores the suite would run ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # already one process per core; processes started by tests inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# A suite started in the background of a shell inherits an ignored Ctrl-C, which tests send to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """The run's folder, the same for all workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # a worker's lies inside the run's


@pytest.fixture(scope="session")
def once(root, tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, make)`: a file or folder written by `make(path)` for all workers. The first to ask makes it, others
    wait. A failure is not cached: the next to ask tries again."""

    def path(name: str, make: Callable[[Path], None]) -> Path:
        made = root / name
        with FileLock(f"{made}.lock"):
            if not made.exists():
                part = tmp_path_factory.mktemp("once") / name
                make(part)
                part.rename(made)
        return made

    return path


# A process of Ray imports for many seconds where cores are busy. Ray gives it niceness 15: beside other tests it would
# get next to nothing. After Ray's own five seconds Serve kills its proxy and starts another, without end; Train gives
# its workers one minute.
PATIENCE = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
}


@pytest.fixture
def small_ray(root):
    """Ray on this machine, two cores of it, without its dashboard. One at a time: other workers wait."""
    import ray

    with FileLock(root / "ray.lock"), mock.patch.dict(os.environ, PATIENCE):
        ray.init(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def poisoned(monkeypatch) -> Counter:
    """Fills uninitialised floating-point memory with NaN, so that reading it shows. Counts tensors by function."""
    counts = Counter()

    def poison(function, name):
        def call(*args, **kwargs):
            x = function(*args, **kwargs)
            if x.dtype.is_floating_point:
                x.fill_(float("nan"))
                counts[name] += 1
            return x

        return call

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poison(getattr(owner, name), name))
    return counts


@pytest.fixture
def same():
    """`same(a, b, tol)`: tensors or sequences of them, equal to `tol` of the norm of b (0, integers: exactly)."""

    def check(a, b, tol: float, what: str = ""):
        if not isinstance(a, torch.Tensor):
            assert len(a) == len(b)
            for n, (x, y) in enumerate(zip(a, b, strict=True)):
                check(x, y, tol, f"{what}[{n}]")
            return
        assert a.shape == b.shape and a.dtype == b.dtype, f"{what} {a.dtype} {a.shape} against {b.dtype} {b.shape}"
        if tol == 0 or not b.dtype.is_floating_point:
            assert torch.equal(a, b), what
        else:
            error, size = float((a - b).detach().norm()), float(b.detach().norm())
            assert error <= tol * size, f"{what} is off by {error:.2e} of {size:.2e}, more than {tol:.0e} of it"

    return check


@pytest.fixture
def gold_rule():
    """`gold_rule(gold, test, plain, tol)`: |gold - test| <= (1 + tol) |gold - plain torch in the dtype of the test|.

    Uses norms of whole tensors, since single elements may be luckily rounded on one side.
    """

    def check(gold, test, plain, tol: float, what: str = ""):
        assert test.isfinite().all(), f"{what} is not finite"
        gold, test, plain = (x.detach().double() for x in (gold, test, plain))
        size, off, allowed = (float(x.norm()) for x in (gold, gold - test, gold - plain))
        assert off <= (1 + tol) * allowed, f"{what} is off by {off:.2e} of {size:.2e}, plain torch by {allowed:.2e}"

    return check


@pytest.fixture
def refuses():
    """`with refuses(words, kind)`: the block raises `kind` (ValueError) with a message of one line with `words`."""

    @contextmanager
    def check(words: str, kind: type[Exception] = ValueError):
        with pytest.raises(kind, match=re.escape(words)) as info:
            yield
        assert "\n" not in str(info.value)

    return check


@pytest.fixture
def plain_retention():
    """The parallel form in its simplest version, all but the decays in q's dtype: the yardstick of the gold rule."""

    def parallel(q, k, v, log_decay, *, scale, state):
        since = log_decay.expand(q.shape[:3]).cumsum(1).transpose(1, 2)  # [B,H,T]
        future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        decay = (since[..., :, None] - since[..., None, :]).masked_fill(future, -torch.inf).exp().to(q.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = scale * ((q @ k.mT * decay) @ v + (q * since.exp()[..., None].to(q.dtype)) @ state.to(q.dtype))
        ends = (since[..., -1:] - since).exp()[..., None].to(q.dtype)
        new = since[..., -1].exp()[..., None, None] * state + (k * ends).mT @ v
        return o.transpose(1, 2), new

    return parallel


@pytest.fixture(scope="session")
def chromium():
    """A headless browser."""
    from tests.pages import launched

    with launched() as browser:
        yield browser


@pytest.fixture
def visit(chromium):
    """`visit(url, …)` opens a page as a user has it (`tests/pages.py`)."""
    from tests.pages import visits

    with visits(chromium) as open_page:
        yield open_page


def pytest_collection_finish():
    """Spare the garbage collector thousands of tests, which live to the end."""
    gc.freeze()
