"""The roofline model: FLOPs and bytes of a retention, and the least time that they need.

A multiply-add counts as two FLOPs. Retention counts as its chunkwise form with chunks of C tokens; a chunk of n tokens
has n (n + 1) / 2 pairs of a query and a key not after it, since the upper triangle need not be computed. In FLOPs:

    forward     scores q k^T, times v         2 (K + V)     a pair
                q S, k^T v                    4 K V         a token
    backward    scores again, P^T do          2 (K + V)     a pair
                do v^T, dP k, dP^T q          2 (V + 2 K)   a pair
                do S^T, v dS^T, k dS, q^T do  8 K V         a token
                k^T v again, for the states   2 K V         a token

Causal attention with heads of D numbers has two products forward and five backward, 2 D a pair. Memory: each of q, k, v
and o is moved once, and so is its gradient in a backward pass, in the dtype of the inputs. Decays count as nothing.

The limit, the roofline, is max(FLOPs / GEMM rate, bytes / read bandwidth), with the rates that torch reaches here. A
fraction above 1 is possible: if torch's BLAS does not use the CPU's widest vectors (MKL on AMD, in float32), a kernel
that does exceeds it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """One retention: shape, length, dtype and device."""

    B: int
    H: int
    K: int
    V: int
    T: int
    dtype: str = "fp32"
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def qkvo_bytes(self) -> int:
        """Bytes of q, k, v and o."""
        return 2 * self.B * self.T * self.H * (self.K + self.V) * self.torch_dtype.itemsize

    @property
    def attention_dim(self) -> int:
        """Head dim of the attention with as many numbers in q, k, v and o."""
        return (self.K + self.V) // 2

    def bytes(self, *, backward: bool) -> int:
        return self.qkvo_bytes * (2 if backward else 1)

    def flops(self, chunk: int, *, backward: bool) -> int:
        """FLOPs of the chunkwise form; the last chunk has the remaining tokens."""
        full, left = divmod(self.T, chunk)
        # the table above, row by row: pairs of every chunk, then what each token costs whatever the chunk
        per_head = full * pairs(chunk) * 2 * (self.K + self.V) + pairs(left) * 2 * (self.K + self.V)
        per_head += 4 * self.T * self.K * self.V
        if backward:
            n = full * pairs(chunk) + pairs(left)
            # in the pairs scores again and P^T do, then the three with do and dP; per token 8 + 2 times K V
            per_head += n * (2 * (self.K + self.V) + 2 * (self.V + 2 * self.K)) + 10 * self.T * self.K * self.V
        return self.B * self.H * per_head

    def attention_flops(self, *, backward: bool) -> int:
        # two products forward and five backward, each of 2 D FLOPs a pair
        return self.B * self.H * pairs(self.T) * 2 * self.attention_dim * (7 if backward else 2)


def pairs(n: int) -> int:
    """Pairs (i, j) of n tokens with j <= i."""
    return n * (n + 1) // 2


class Limit(NamedTuple):
    seconds: float
    by: str
    """Bound: "compute" or "memory"."""


def limit(flops: float, nbytes: float, flops_rate: float, byte_rate: float) -> Limit:
    """The longer of two times: computing at `flops_rate` (FLOP/s) and moving at `byte_rate` (bytes/s)."""
    # the longer, not the sum: while one tile is computed, the next can be loaded
    compute, memory = flops / flops_rate, nbytes / byte_rate
    return Limit(compute, "compute") if compute >= memory else Limit(memory, "memory")
