"""The ranks of a run as one: agreement on numbers, and errors that end all ranks together.

Rank 0 writes and prints. It prints an error of any rank in one line, and the error ends all ranks.
"""

import contextlib
import datetime
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from retentive.train.parallel.mesh import Mesh

LONGEST = 1000
"""Maximum bytes of an error message between ranks."""
EXPECTED = (ValueError, OSError, ArithmeticError, ImportError, MemoryError)
"""Errors that the user can fix: rank 0 prints them in one line."""


class RankFailed(Exception):
    """Another rank failed, and rank 0 or the launcher reports it: this rank ends silently."""


class Cluster(Mesh):
    """This rank among the ranks of a run; by default the only one.

    Args:
        sizes: (dp_replicate, dp_shard, cp, tp).
        device: this rank's device; None lets the run pick it.
        timeout: how long a rank waits for the others.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int, int] = (1, 1, 1, 1),
        *,
        device: torch.device | None = None,
        timeout: datetime.timedelta | None = None,
    ):
        super().__init__(sizes, 0 if sizes == (1, 1, 1, 1) else dist.get_rank(), timeout)
        self.device = device
        self.main = self.rank == 0
        self._group: dist.ProcessGroup | None = None  # torch.distributed's own group of all ranks

    def for_thread(self) -> "Cluster":
        """A cluster of the same ranks for another thread of each, with a process group of its own.

        Within one group, all ranks must make the same calls in the same order.
        """
        other = copy(self)
        if self.world_size > 1:
            other._group = dist.new_group(backend="gloo", timeout=self.timeout)
        return other

    # agreement

    def sum(self, *numbers: float) -> list[float]:
        """Sum numbers over the ranks that read different tokens."""
        if self.dp_cp.size == 1:
            return list(numbers)
        x = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(x, group=self.dp_cp.group)
        return x.tolist()

    def max(self, number: int) -> int:
        """Largest of the ranks' numbers."""
        if self.world_size == 1:
            return number
        x = torch.tensor(number)
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self._group)
        return int(x)

    def broadcast(self, number: int) -> int:
        """Number of rank 0."""
        return self.max(number if self.main else -(2**62))

    def check_same(self, what: Any, message: str) -> None:
        """Raise ValueError, with `message` and the rank, if a rank's value differs from rank 0's (by its `repr`)."""
        if self.world_size == 1:
            return
        mine = hashlib.sha256(repr(what).encode()).digest()
        found = self._gather(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
        others = [rank for rank in range(self.world_size) if bytes(found[rank].tolist()) != bytes(found[0].tolist())]
        if others:
            raise self.once(ValueError(message.format(others[0])))

    def _gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x, group=self._group)
        return torch.stack(parts)

    # failure

    def once(self, error: Exception) -> Exception:
        """Exception to raise for an error that all ranks have: rank 0 reports it, the others end silently."""
        return error if self.main else RankFailed()

    @contextlib.contextmanager
    def barrier(self) -> Iterator[None]:
        """Make all ranks wait at the end of this block; an error on one rank fails on all.

        The block must not wait for another rank.
        """
        error: BaseException | None = None
        try:
            yield
        except Exception as raised:
            if self.world_size == 1:
                raise
            error = raised
        if self.world_size == 1:
            return
        said = f"{type(error).__name__ if not str(error) else error}".encode()[:LONGEST] if error else b""
        lines = self._gather(torch.frombuffer(bytearray(said.ljust(LONGEST, b"\0")), dtype=torch.uint8))
        failed = [rank for rank in range(self.world_size) if lines[rank, 0]]
        if not failed:
            return
        if error and (self.main or not isinstance(error, EXPECTED)):
            raise error
        if not self.main:
            raise RankFailed
        text = bytes(lines[failed[0]].tolist()).rstrip(b"\0").decode(errors="replace")
        raise ValueError(f"rank {failed[0]}: {text}")

    @contextlib.contextmanager
    def on_main(self, make: Callable[[], AbstractContextManager]) -> Iterator[None]:
        """Enter a context on rank 0 only; if that fails, all ranks fail."""
        with ExitStack() as stack:
            with self.barrier():
                if self.main:
                    stack.enter_context(make())
            yield


ALONE = Cluster()
"""Cluster of a single process."""
