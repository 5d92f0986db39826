"""The processes of a run: who they are, what they agree on, and how they end together.

torchrun starts them and says in environment variables which each is (RANK, WORLD_SIZE, LOCAL_RANK). The first one
writes and speaks; an error of any of them is said by it in one line, and ends all.
"""

import contextlib
import datetime
import hashlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from retentive.machine import pick_device
from retentive.train.signals import Interrupted

LONGEST = 1000
"""Bytes of an error message that processes tell each other."""
EXPECTED = (ValueError, OSError, ArithmeticError, ImportError, MemoryError)
"""Errors that are the user's to mend, and said in a line."""
Group = dist.ProcessGroup | None
"""None for a group of this process alone."""


class Elsewhere(Exception):
    """Another process has the error, and the first one says it."""


class Processes:
    """This process among those of a run, which are a mesh of (dp_replicate, dp_shard, cp, tp); by default it is alone.

    Args:
        sizes: of the mesh's axes.
        patience: how long this process waits for the others.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int, int] = (1, 1, 1, 1),
        *,
        device: torch.device | None = None,
        patience: datetime.timedelta | None = None,
    ):
        self.dp_replicate, self.dp_shard, self.cp, self.tp = sizes
        self.world = self.dp_replicate * self.dp_shard * self.cp * self.tp
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.device, self.patience = device, patience
        self.main = self.rank == 0
        self.divided = self.dp_shard * self.cp * self.tp > 1  # no process has a whole model that runs by itself
        self.dp, self.shares = self.dp_replicate * self.dp_shard, self.world // self.tp
        self.share = self.rank // self.tp
        """Which of the `shares` of the global batch this process reads; those of one tp group read the same."""
        self.dp_rank, self.cp_rank, self.tp_rank = self.share // self.cp, self.share % self.cp, self.rank % self.tp
        self.shard_group_size = self.dp_shard * self.cp
        self.shard_rank = self.share % self.shard_group_size
        self.everyone: Group = None
        """Who agrees, and fails, together; None for torch.distributed's group of all."""
        self.share_group: Group = None
        self.dp_group: Group = None
        self.cp_group: Group = None
        self.tp_group: Group = None
        self.shard_group: Group = None
        self.shard_mesh: DeviceMesh | None = None
        if self.world > 1:
            self._make_groups(patience)

    def _make_groups(self, patience: datetime.timedelta | None) -> None:
        """All processes make all groups, in the same order, as torch.distributed wants it."""
        R, S, C, P = self.dp_replicate, self.dp_shard, self.cp, self.tp
        ranks = torch.arange(self.world).view(R, S, C, P)

        def group(lines: Tensor) -> Group:
            """The one of this process among groups along the last axis."""
            own = None
            for line in lines.flatten(0, -2).tolist():
                made = dist.new_group(line, timeout=patience) if len(line) > 1 else None
                own = made if self.rank in line else own
            return own

        self.tp_group = group(ranks)
        self.cp_group = group(ranks.mT)
        self.dp_group = group(ranks.permute(2, 3, 0, 1).flatten(2))
        self.share_group = group(ranks.permute(3, 0, 1, 2).flatten(1))
        if S == 1:
            return
        self.shard_group = group(ranks.permute(0, 3, 1, 2).flatten(2))
        mine = ranks[..., self.tp_rank].reshape(R, S * C)  # parameters are divided over cp as well
        kind = self.device.type if self.device else "cpu"
        assert self.shard_group is not None
        if R == 1:
            self.shard_mesh = DeviceMesh.from_group(self.shard_group, kind, mesh_dim_names=("shard",))
            return
        replicas = group(ranks.permute(1, 2, 3, 0))
        assert replicas is not None
        names = ("replicate", "shard")
        self.shard_mesh = DeviceMesh.from_group([replicas, self.shard_group], kind, mesh=mine, mesh_dim_names=names)

    def beside(self) -> "Processes":
        """The same processes, for what another thread of each does: they agree in a group of their own."""
        other = copy(self)
        if self.world > 1:
            other.everyone = dist.new_group(backend="gloo", timeout=self.patience)
        return other

    def described(self, device: torch.device) -> str:
        """The device, and how many processes there are along each axis."""
        axes = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "cp": self.cp, "tp": self.tp}
        shape = ", ".join(f"{name} {n}" for name, n in axes.items() if n > 1)
        return f"{self.world} x {device.type} ({shape})" if shape else str(device)

    # what they agree on

    def total(self, *numbers: float) -> list[float]:
        """The sums over all shares of the batch."""
        if self.shares == 1:
            return list(numbers)
        x = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(x, group=self.share_group)
        return x.tolist()

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.world == 1:
            return number
        x = torch.tensor(number)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return int(x)

    def first(self, number: int) -> int:
        """The number of the first process."""
        return self.largest(number if self.main else -(2**62))

    def check_same(self, what: Any, message: str) -> None:
        """Raises ValueError, with `message` and who it is, where a process has another value (by its `repr`)."""
        if self.world == 1:
            return
        mine = hashlib.sha256(repr(what).encode()).digest()
        found = self._gather(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
        others = [rank for rank in range(self.world) if bytes(found[rank].tolist()) != bytes(found[0].tolist())]
        if others:
            raise self.said_by_first(ValueError(message.format(others[0])))

    def _gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x, group=self.everyone)
        return torch.stack(parts)

    # how they fail

    def said_by_first(self, error: Exception) -> Exception:
        """What to raise for an error that all processes have: the first one says it, the others end silently."""
        return error if self.main else Elsewhere()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What fails in this block on one process fails on all. The block must not wait for another process."""
        error: BaseException | None = None
        try:
            yield
        except Exception as raised:
            if self.world == 1:
                raise
            error = raised
        if self.world == 1:
            return
        said = f"{type(error).__name__ if not str(error) else error}".encode()[:LONGEST] if error else b""
        lines = self._gather(torch.frombuffer(bytearray(said.ljust(LONGEST, b"\0")), dtype=torch.uint8))
        failed = [rank for rank in range(self.world) if lines[rank, 0]]
        if not failed:
            return
        if error and (self.main or not isinstance(error, EXPECTED)):
            raise error
        if not self.main:
            raise Elsewhere
        text = bytes(lines[failed[0]].tolist()).rstrip(b"\0").decode(errors="replace")
        raise ValueError(f"process {failed[0]}: {text}")

    @contextlib.contextmanager
    def on_first(self, make: Callable[[], AbstractContextManager]) -> Iterator[None]:
        """A context that the first process alone enters; where it cannot, all fail."""
        with ExitStack() as stack:
            with self.together():
                if self.main:
                    stack.enter_context(make())
            yield


ALONE = Processes()
"""One process, which asks nobody."""


def started_by_torchrun() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def started(sizes: Callable[[int], tuple[int, int, int, int]], device: str, patience: int) -> Iterator[Processes]:
    """The processes that torchrun has started; one that it has not is alone. They leave together where nothing failed.

    Where whoever started them has joined them in a group, that one is taken, and left to him.

    Args:
        sizes: of the mesh for a number of processes; it raises ValueError where there are none.
        device: as of `pick_device`; each process takes the GPU of its number on its machine.
        patience: seconds after which one that waits for another gives up.
    """
    if not started_by_torchrun():
        sizes(1)
        yield ALONE
        return
    world = int(os.environ["WORLD_SIZE"])
    wait = datetime.timedelta(seconds=patience)
    ours = not dist.is_initialized()
    if ours:
        join(device, wait)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # not where somebody's shell, which may be closed, has started each
            threading.Thread(target=stop_when_left, args=(os.getppid(),), daemon=True).start()
    try:
        beginning = Processes((world, 1, 1, 1), patience=wait)
        with beginning.together():
            shape, picked = sizes(world), pick_device(device)
            if picked.type == "mps":
                raise ValueError("several processes train on GPUs of NVIDIA or on CPUs, not on mps: --device cpu")
            if picked.type == "cuda":
                picked = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
                torch.cuda.set_device(picked)
        differs = "process {} was started with another mesh than process 0: give all the same options"
        beginning.check_same(shape, differs)
        yield Processes(shape, device=picked, patience=wait)
    except Interrupted:  # which all have
        if ours:
            leave()
        raise
    except Exception as error:  # some may have left already
        if ours and dist.get_backend() == "gloo":  # whose threads would abort a process that ends without this
            dist.destroy_process_group()
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
            raise ConnectionError(f"another process of this run has ended, or was silent for {patience} s") from error
        raise
    if ours:
        leave()


def join(device: str, wait: datetime.timedelta) -> None:
    """Joins the group of all processes that torchrun has started.

    Raises:
        ConnectionError: they did not meet in time.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # gloo beside NCCL: numbers that processes agree on lie in the memory of the CPU
    gpus = device != "cpu" and torch.cuda.is_available()
    how: dict[str, Any] = {"timeout": wait}
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, world, is_master=False, timeout=wait)
            how |= {"store": fresh_part(store, rank, world, wait), "rank": rank, "world_size": world}
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", **how)
    except RuntimeError as error:  # torch's own of stores and of gloo are such
        why = f"in {wait.total_seconds():.0f} s ({str(error).splitlines()[0]})"
        raise ConnectionError(f"the processes of this run did not meet {why}") from error


def fresh_part(store: dist.Store, rank: int, world: int, wait: datetime.timedelta) -> dist.Store:
    """A part of torchrun's store that this attempt's processes have to themselves, to leave their addresses in.

    torchrun has one store for a run and all of its restarts, and torch 2.13 reads there what processes that are dead
    have left: nobody joins anybody again (https://github.com/pytorch/pytorch/issues/135712). The count of restarts that
    it tells them would tell attempts apart, but each machine counts its own. So each process leaves a name that nobody
    had before, the first one answers every name that it finds with that of the part, until all have taken it.

    Raises:
        ConnectionError: they did not in time.
    """
    if rank:
        name = uuid.uuid4().hex
        store.set(f"retentive {rank}", name)
        part = store.get(f"retentive part for {name}").decode()  # waits for it
        store.set(f"retentive {part} {rank}", "")
        return dist.PrefixStore(part, store)
    part, end = uuid.uuid4().hex, time.monotonic() + wait.total_seconds()
    waiting = list(range(1, world))
    while waiting := [other for other in waiting if not store.check([f"retentive {part} {other}"])]:
        for other in waiting:  # the name may be that of a dead one, and another one tomorrow
            if store.check([f"retentive {other}"]):
                store.set(f"retentive part for {store.get(f'retentive {other}').decode()}", part)
        if time.monotonic() > end:
            raise ConnectionError(f"processes {waiting} did not meet the first one in {wait.total_seconds():.0f} s")
        time.sleep(0.02)
    return dist.PrefixStore(part, store)


def stop_when_left(parent: int) -> None:
    """Has this process save and stop (SIGTERM) once the one that started it is gone: nobody would look after it."""
    while os.getppid() == parent:
        time.sleep(2)
    os.kill(os.getpid(), signal.SIGTERM)


def leave() -> None:
    """Ends the group, once all have come to it: one that left early would break the others' connections."""
    dist.barrier()
    dist.destroy_process_group()
