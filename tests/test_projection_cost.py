"""The backward pass of a low-rank product takes whichever way to its factors' gradients has fewer operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from relora_opt.weight import LowRankWeight, is_dense_cheaper, project

T, M, N, S = 64, 24, 40, 0.7
RANKS = range(1, M)


def backward(rank: int) -> tuple[int, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return the operations of a backward pass, its gradients of A and B, and those that the dense gradient gives."""
    generator = torch.Generator().manual_seed(rank)
    x, W, A, B, g = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((T, N), (M, N), (rank, N), (M, rank), (T, M))
    )
    A.requires_grad_(), B.requires_grad_()
    y = torch.nn.functional.linear(x.requires_grad_(), LowRankWeight.wrap(W, A, B, S))
    with FlopCounterMode(display=False) as counter:
        y.backward(g)
    assert A.grad is not None
    assert B.grad is not None
    return counter.get_total_flops(), (A.grad, B.grad), project(g.T @ x.detach(), A.detach(), B.detach(), S)


@pytest.mark.parametrize("rank", RANKS)
def test_the_fewest_operations_are_taken(rank: int) -> None:
    num_operations, _, _ = backward(rank)
    for_x = 2 * T * M * N
    by_factors, by_gradient = 4 * T * rank * (M + N), 2 * T * M * N + 4 * M * N * rank
    assert num_operations == for_x + min(by_factors, by_gradient)


def test_both_ways_occur_and_cross_once() -> None:
    chosen = [is_dense_cheaper(T, M, N, rank) for rank in RANKS]
    assert chosen == sorted(chosen)
    assert len(set(chosen)) == 2


@pytest.mark.parametrize("rank", RANKS)
def test_both_ways_give_the_projection_of_the_dense_gradient(rank: int) -> None:
    _, found, expected = backward(rank)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_for_a_square_weight_and_many_tokens_they_cross_at_a_quarter_of_the_width() -> None:
    assert not is_dense_cheaper(10**6, 1024, 1024, 256)
    assert is_dense_cheaper(10**6, 1024, 1024, 257)
