"""What all kinds of state share: what is done to each of their tensors alike, and their files."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, TypeVar

from torch import Tensor

from retentive.files import write_tensors

FORMAT = "retentive-state-1"
S = TypeVar("S", bound="Sequences")


class Sequences:
    """Several sequences' state, of which every tensor has the sequences first."""

    kind: ClassVar[str]
    """What a file says that it holds."""
    window: int
    """Tokens that a cache in it keeps for each sequence; 0: all, or there is no cache."""
    position: Tensor
    """int64 `[N]`, tokens that each sequence has had."""

    def _map(self: S, f: Callable[[Tensor], Tensor]) -> S:
        """The state of which each tensor is f of this one's."""
        raise NotImplementedError

    def named(self) -> dict[str, Tensor]:
        """The tensors by their names in a file, apart from the position."""
        raise NotImplementedError

    def select(self: S, rows: Tensor) -> S:
        """The sequences `rows`, int64 `[n]`."""
        return self._map(lambda x: x.index_select(0, rows.to(x.device)))

    def view(self: S, n: int) -> S:
        """The first n sequences, in the same memory."""
        return self._map(lambda x: x[:n])

    def clone(self: S) -> S:
        return self._map(lambda x: x.clone())

    def detach(self: S) -> S:
        return self._map(lambda x: x.detach())

    def to(self: S, device) -> S:
        return self._map(lambda x: x.to(device))

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Writes it as one safetensors file, with `metadata` beside the format's own."""
        window = {"window": str(self.window)} if self.window else {}
        about = {**(metadata or {}), "format": FORMAT, "kind": self.kind, **window}
        write_tensors(Path(path), self.named() | {"position": self.position}, about)
