"""Every block comes once an epoch, and a batch is a function of seed and index."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relora_opt_cli.data import Batches
from relora_opt_cli.errors import UserError

streams = st.integers(2, 400).map(np.arange)
sizes = st.tuples(streams, st.integers(1, 30), st.integers(1, 9), st.integers(0, 5)).filter(lambda s: len(s[0]) > s[1])


def firsts(batches: Batches, indices: range) -> list[int]:
    """The first token of every sequence, which in these streams is its position."""
    return torch.cat([batches.batch(index)[:, 0] for index in indices]).tolist()


@given(sizes)
@settings(deadline=None)
def test_every_block_comes_once_an_epoch(size: tuple[Any, int, int, int]) -> None:
    stream, seq_len, batch_size, seed = size
    batches = Batches(stream, seq_len=seq_len, batch_size=batch_size, seed=seed)
    blocks = list(range(0, batches.num_blocks * seq_len, seq_len))
    assert len(stream) - seq_len <= blocks[-1] + seq_len < len(stream)
    seen = firsts(batches, range(-(-3 * len(blocks) // batch_size)))
    for epoch in range(3):
        assert sorted(seen[epoch * len(blocks) : (epoch + 1) * len(blocks)]) == blocks


@given(sizes, st.integers(0, 10**9))
@settings(deadline=None)
def test_a_batch_is_a_function_of_seed_and_index(size: tuple[Any, int, int, int], index: int) -> None:
    stream, seq_len, batch_size, seed = size
    walked = Batches(stream, seq_len=seq_len, batch_size=batch_size, seed=seed)
    for before in (index + 1, 0, index):
        walked.batch(before)
    jumped = Batches(stream, seq_len=seq_len, batch_size=batch_size, seed=seed).batch(index)
    assert torch.equal(walked.batch(index), jumped)
    assert jumped.shape == (batch_size, seq_len + 1)
    assert jumped.dtype == torch.int64
    assert (jumped.diff(dim=1) == 1).all()


def test_orders_differ_between_epochs_and_between_seeds() -> None:
    stream = np.arange(1001, dtype=np.uint16)
    orders = [
        firsts(Batches(stream, seq_len=1, batch_size=100, seed=seed), range(10 * epoch, 10 * epoch + 10))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_batches_refuse_what_cannot_be() -> None:
    for changes, message in (
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seq_len": 10}, "given text has 10 tokens, fewer than one sequence of seq_len=10"),
    ):
        with pytest.raises(UserError, match=message):
            Batches(np.arange(10), **{"seq_len": 4, "batch_size": 2, **changes})
