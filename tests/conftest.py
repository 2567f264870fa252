"""The tests work on small tensors: one thread is quickest, and keeps them out of each other's way.

The commands that they start inherit the environment, and with it the number of threads.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

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


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture at the end of a run in this process empty: drawing takes longer than a tiny run.

    A test marked `draws` has it drawn, as every run in a process of its own has; test_cli_plot.py sees to the rest.
    """
    train = sys.modules.get("relora_opt_cli.train")
    if train is not None and not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(train, "plot_runs", _empty_picture)


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """Let torch forget what a test has compiled: it stops after a few versions of the same code in a process."""
    before = _num_compiled()
    yield
    if _num_compiled() != before:
        torch.compiler.reset()


def _num_compiled() -> int:
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else utils.counters["frames"]["total"] + utils.counters["stats"]["unique_graphs"]


def _empty_picture(runs: Sequence[Path], out: Path | None) -> Path:
    (run,) = runs
    assert out is None
    path = run / "curves.png"
    path.touch()
    return path
