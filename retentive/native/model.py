"""NativeModel: one token for each of a few sequences, by the library."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from retentive.models import RetNet
from retentive.native.library import Call, Rings, library
from retentive.native.weights import ROWS, Packed, refused
from retentive.ops.compiler import NotBuilt
from retentive.ops.cpu import DTYPES


class NativeModel:
    """A RetNet that decodes by the library, over the states that the model itself would decode with.

    Its weights are a packed copy: what happens to the model's afterwards does not reach it.
    """

    def __init__(self, model: RetNet, *, weights: str = "bfloat16", threads: int | None = None):
        """
        Args:
            weights: float32 or bfloat16.
            threads: those that share a token; by default torch's number.

        Raises:
            RuntimeError: there is no library, or it cannot run such a model.
            MemoryError: no memory, or no threads.
        """
        built = library()
        if isinstance(built, NotBuilt):
            raise RuntimeError(str(built))
        if reason := refused(model.config):
            raise RuntimeError(f"the native engine cannot run this model: {reason}")
        self.vocab_size = model.config.vocab_size
        self._packed = Packed(model, weights)
        self._threads = built.native_open(threads or torch.get_num_threads())
        if not self._threads:
            raise MemoryError("no memory or no threads for the native engine")

    def __del__(self):
        if getattr(self, "_threads", None):
            library().native_close(self._threads)

    def decode(self, ids: Tensor, pool: Any) -> Tensor:
        """Logits `[n, vocab]`, float32, after ids `[n]`: one for each of the first n sequences of the pool (a
        RetentionState of rings), which have then read it."""
        n, first = len(ids), pool.layers[0]
        # a pool of fewer sequences or of another model would be written past its end
        if not 0 < n <= len(pool.position) or [tuple(r.state.shape[1:]) for r in pool.layers] != self._packed.states:
            raise ValueError(f"{n} ids do not go with this pool, of {len(pool.position)} sequences")
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise IndexError(f"token ids must be from 0 to {self.vocab_size - 1}, got {ids.tolist()}")
        logits = torch.empty(n, -(-self.vocab_size // ROWS) * ROWS)
        tensors = [(r.state, r.k, r.v, r.log_decay, r.written, r.folded) for r in pool.layers]
        rings = (Rings * len(tensors))(*(Rings(*(x.data_ptr() for x in ring)) for ring in tensors))
        ids, position = ids.contiguous(), pool.position[:n].contiguous()
        call = Call(
            n, first.k.shape[2], DTYPES.index(first.k.dtype), self._threads, ctypes.addressof(self._packed.struct),
            ids.data_ptr(), position.data_ptr(), ctypes.addressof(rings), logits.data_ptr(),
        )  # fmt: skip
        if library().native_decode(ctypes.byref(call)):
            raise MemoryError("no memory for the work space of a token")
        pool.position[:n] += 1
        return logits[:, : self.vocab_size]
