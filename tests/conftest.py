"""The tests work on small tensors: one thread is quickest, and keeps them out of each other's way.

The commands that they start inherit the environment, and with it the number of threads.
"""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from ranks import Ranks

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Give two processes of a group, which start at the first use and stay."""
    group = Ranks(2)
    yield group
    group.stop()
