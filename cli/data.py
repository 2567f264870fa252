"""From sources to batches: documents are read, split, tokenized into two streams, and cut into sequences.

    sources.py, tree.py,
    formats.py               what there is to read       split.py      which documents are held out
    tokens.py                the tokenizer               encoding.py   text to ids, on all cores
    store.py                 the streams, on the disk    corpus.py     all of that, in order
    here                     sequences and batches

A block is seq_len + 1 consecutive tokens; blocks start every seq_len tokens, so each has one token of look-ahead and
every token is predicted once an epoch, but for the first and what is left at the end, less than a block. The batch of
an index is a function of (seed, index) alone: to resume is to ask for the same index. Streams stay on the disk; the
order of an epoch takes 8 bytes a block.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .counted import counted
from .errors import UserError
from .store import Stream, check_mapped


def check_length(part: str, tokens: Stream, seq_len: int) -> None:
    """Refuse a stream that is shorter than one block."""
    if len(tokens) < seq_len + 1:
        raise UserError(
            f"the {part} text has {counted(len(tokens), 'token')}, fewer than one sequence of seq_len={seq_len} and "
            f"its next token: give more data{', a larger val_share' * (part == 'held-out')} or a smaller seq_len"
        )


class Batches:
    """Sequences of a stream, shuffled anew every epoch.

    `batch(index)` is pure: the same (seed, index) gives the same batch, however one gets there. Each of the
    `num_blocks` blocks comes once an epoch; a batch may span two epochs.

    >>> batches = Batches(np.arange(10), seq_len=3, batch_size=3, seed=0)
    >>> sorted(batches.batch(0).tolist())
    [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    """

    def __init__(self, tokens: Stream, *, seq_len: int, batch_size: int, seed: int = 0) -> None:
        for name, value, least in (("seq_len", seq_len, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise UserError(f"{name}={value} must be at least {least}: give a larger number")
        check_length("given", tokens, seq_len)
        self.num_blocks = (len(tokens) - 1) // seq_len
        self._tokens = tokens
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._shuffled: tuple[int, Stream] = (-1, np.empty(0, dtype=np.int64))  # the last epoch asked for, its order

    def batch(self, index: int) -> Tensor:
        """Return batch number `index` = 0, 1, ... as int64 (batch_size, seq_len + 1)."""
        assert index >= 0
        places = range(index * self._batch_size, (index + 1) * self._batch_size)
        return self._blocks([int(self._order(i // self.num_blocks)[i % self.num_blocks]) for i in places])

    def _order(self, epoch: int) -> Stream:
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, np.random.default_rng([self._seed, epoch]).permutation(self.num_blocks)
        return self._shuffled[1]

    def _blocks(self, numbers: list[int]) -> Tensor:
        check_mapped(self._tokens)
        starts = np.array(numbers)[:, None] * self._seq_len
        return torch.from_numpy(self._tokens[starts + np.arange(self._seq_len + 1)].astype(np.int64))
