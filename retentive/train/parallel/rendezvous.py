"""Rendezvous: the ranks of a run join and leave a process group, started by torchrun, `launch` or Ray.

The environment variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK) give the rank of a process.
"""

import contextlib
import datetime
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from retentive.machine import pick_device
from retentive.train.parallel.cluster import ALONE, Cluster, RankFailed
from retentive.train.parallel.mesh import Parallel
from retentive.train.signals import Interrupted

LAUNCHED = "RETENTIVE_LAUNCHED"
"""Environment variable that `launch` sets: it reports a lost rank itself, so the ranks need not."""


def several() -> bool:
    """True if this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def joined(parallel: Parallel, device: str) -> Iterator[Cluster]:
    """Join the cluster of the ranks that were started together; unless one fails, they leave it together.

    Reuses an existing process group (Ray makes one), and does not destroy it.

    Args:
        device: as in `pick_device`; each rank takes the GPU with its local rank.

    Raises:
        ValueError: the mesh is for another number of ranks, or ranks have different meshes.
        ConnectionError: another rank has ended or does not answer (RankFailed if `launch` reports it).
    """
    if not several():
        parallel.sizes(1)
        yield ALONE
        return
    timeout, ours = datetime.timedelta(seconds=parallel.patience), not dist.is_initialized()
    if ours:
        connect(device, timeout)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # only under torchrun: a shell that started a rank may be closed
            stop_without(os.getppid())
    try:
        yield _cluster(parallel, device, timeout)
    except Interrupted:  # all ranks raise it together
        if ours:
            leave()
        raise
    except Exception as error:  # some may have left already
        if ours and dist.get_backend() == "gloo":  # gloo's threads would abort a process that ends without this
            dist.destroy_process_group()
        if not lost_a_rank(error):
            raise
        if LAUNCHED in os.environ:
            raise RankFailed from error
        how = f"was silent for {parallel.patience} s" if timed_out(error) else "has ended"
        raise ConnectionError(f"another rank of this run {how}: go on with `resume=True`") from error
    if ours:
        leave()


def _cluster(parallel: Parallel, device: str, timeout: datetime.timedelta) -> Cluster:
    """Make the cluster after checking that all ranks have the same mesh."""
    world_size = int(os.environ["WORLD_SIZE"])
    beginning = Cluster((world_size, 1, 1, 1), timeout=timeout)
    with beginning.barrier():
        sizes, picked = parallel.sizes(world_size), pick_device(device)
        if picked.type == "mps":
            raise ValueError("several ranks train on GPUs of NVIDIA or on CPUs, not on mps: take `device='cpu'`")
        if picked.type == "cuda":
            picked = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(picked)
    beginning.check_same(sizes, "rank {} was started with another mesh than rank 0: give all the same options")
    return Cluster(sizes, device=picked, timeout=timeout)


def lost_a_rank(error: Exception) -> bool:
    """True if torch.distributed raised the error because another process ended or timed out."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def timed_out(error: Exception) -> bool:
    """True if torch.distributed raised the error because another process did not answer in time."""
    return re.search("timed? ?out", str(error).lower()) is not None


def connect(device: str, timeout: datetime.timedelta) -> None:
    """Join the process group of all ranks.

    Raises:
        ConnectionError: not all ranks joined in time.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # gloo beside NCCL: numbers that ranks agree on are CPU tensors
    gpus = device != "cpu" and torch.cuda.is_available()
    how: dict[str, Any] = {"timeout": timeout}
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)
            how |= {"store": fresh_part(store, rank, world_size, timeout), "rank": rank, "world_size": world_size}
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", **how)
    except RuntimeError as error:  # errors of stores and of gloo are RuntimeErrors
        why = f"in {timeout.total_seconds():.0f} s ({str(error).splitlines()[0]})"
        raise ConnectionError(f"the ranks of this run did not meet {why}") from error


def fresh_part(store: dist.Store, rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """Agree on a fresh part of torchrun's store, in which this attempt's ranks leave their addresses.

    torchrun has one store for a run and all its restarts. torch 2.13 reads there the addresses of dead ranks, so that
    restarted ranks never meet (https://github.com/pytorch/pytorch/issues/135712). torchrun's count of restarts cannot
    tell attempts apart, since each machine counts its own. So each rank leaves a new random name, and rank 0 answers
    every name with the name of the part, until all ranks have confirmed it.

    Raises:
        ConnectionError: not all ranks confirmed in time.
    """
    if rank:
        name = uuid.uuid4().hex
        store.set(f"retentive {rank}", name)
        part = store.get(f"retentive part for {name}").decode()  # waits for it
        store.set(f"retentive {part} {rank}", "")
        return dist.PrefixStore(part, store)
    part, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    waiting = list(range(1, world_size))
    while waiting := [other for other in waiting if not store.check([f"retentive {part} {other}"])]:
        for other in waiting:  # the name may be a dead rank's, and replaced later
            if store.check([f"retentive {other}"]):
                store.set(f"retentive part for {store.get(f'retentive {other}').decode()}", part)
        if time.monotonic() > end:
            raise ConnectionError(f"ranks {waiting} did not meet rank 0 in {timeout.total_seconds():.0f} s")
        time.sleep(0.02)
    return dist.PrefixStore(part, store)


def stop_without(parent: int) -> None:
    """Start a thread that makes this process save and stop (SIGTERM) when the process `parent` is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def leave() -> None:
    """End the process group after a barrier: a rank that left early would break the others' connections."""
    dist.barrier()
    dist.destroy_process_group()
