"""The roofline model: FLOPs against a loop that counts them, bytes against tensors."""

import pytest
import torch

from benchmarks.lab.roofline import Work, limit, pairs


@pytest.mark.parametrize("T", [8, 12, 13, 3])
def test_flops_are_those_of_a_loop_that_counts(T):
    """The chunkwise form as loops over single products, a multiply-add at a time, upper triangles left out."""
    K, V, C, count = 3, 5, 4, 0

    def multiply_add(n: int) -> None:
        nonlocal count
        count += 2 * n

    for start in range(0, T, C):
        n = min(C, T - start)
        for i in range(n):
            for _ in range(i + 1):
                multiply_add(K)  # a score
                multiply_add(V)  # times a v
            multiply_add(K * V)  # the query and the state
            multiply_add(K * V)  # k v^T into the state
    forward = count
    for start in range(0, T, C):
        n = min(C, T - start)
        for i in range(n):
            for _ in range(i + 1):
                multiply_add(K)  # the score again
                multiply_add(V)  # dv from do
                multiply_add(V)  # dP from do and v
                multiply_add(K)  # dq from dP and k
                multiply_add(K)  # dk from dP and q
            for _ in ("do S^T", "v dS^T", "k dS", "q^T do", "k^T v again"):
                multiply_add(K * V)
    work = Work(3, 2, K, V, T)
    assert work.flops(C, backward=False) == 6 * forward
    assert work.flops(C, backward=True) == 6 * count


def test_flops_of_attention_are_those_of_its_products():
    work = Work(2, 3, 4, 8, 10)
    assert work.attention_dim == 6
    assert work.attention_flops(backward=False) == 2 * 3 * 55 * 2 * (6 + 6)
    assert work.attention_flops(backward=True) == 2 * 3 * 55 * 2 * 7 * 6
    assert pairs(4) == 1 + 2 + 3 + 4


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_bytes_are_those_of_the_tensors(dtype, size):
    work = Work(2, 3, 16, 32, 10, dtype)
    tensors = [torch.empty(2, 10, 3, n, dtype=work.torch_dtype) for n in (16, 16, 32, 32)]
    assert work.qkvo_bytes == work.bytes(backward=False) == sum(x.nbytes for x in tensors)
    assert work.bytes(backward=True) == 2 * work.qkvo_bytes
    assert tensors[0].element_size() == size


def test_the_limit_is_the_slower_of_computing_and_moving():
    assert limit(100, 10, 10, 10) == (10, "compute")
    assert limit(10, 100, 10, 10) == (10, "memory")
