"""A compiler that was killed costs nothing: what it left cut is made again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from relora_opt.compiler import drop_cut_library

TRAIN = """
import torch
from torch import nn
from relora_opt import ReLoRAOptimizer

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
optimizer = ReLoRAOptimizer(model, rank=2, lr=1e-2)
step = optimizer.make_step(model, lambda model, x: model(x).square().mean())
print([float(step(torch.ones(4, 8))) for _ in range(3)])
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def library(cache: Path, content: bytes = b"\x7fELF") -> Path:
    path = cache / "ab" / "kernel.main.so"
    path.parent.mkdir()
    path.write_bytes(content)
    return path


def test_a_cut_library_is_dropped_once(cache: Path) -> None:
    path, dropped = library(cache), set[Path]()
    error = ImportError(f"{path}: file too short", path=str(path))
    assert drop_cut_library(error, dropped)
    assert not path.exists()
    path.write_bytes(b"the new one")
    assert not drop_cut_library(error, dropped)
    assert path.exists()


def test_a_library_that_the_loader_alone_names_is_dropped(cache: Path) -> None:
    path = library(cache)
    assert drop_cut_library(OSError(f"{path}: file too short"), set())
    assert not path.exists()


def test_nothing_else_is_deleted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = library(tmp_path_factory.mktemp("elsewhere"))
    source = cache / "kernel.cpp"
    source.write_text("")
    for error in (
        ImportError(f"{elsewhere}: file too short", path=str(elsewhere)),
        ImportError("no such module"),
        OSError(f"{source}: file too short"),
        ValueError(f"{library(cache)}: file too short"),
    ):
        assert not drop_cut_library(error, set())
    assert elsewhere.exists()
    assert source.exists()


@pytest.mark.slow
def test_a_step_compiles_again_what_a_killed_compiler_left_cut(cache: Path) -> None:
    def train() -> str:
        done = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
        return done.stdout

    losses = train()
    libraries = [path for path in cache.rglob("*.main.so") if path.stat().st_size]
    assert len(libraries) >= 2  # of the forward and of the backward pass
    for path in libraries:
        path.write_bytes(path.read_bytes()[:100])
    assert train() == losses
    assert all(path.stat().st_size > 100 for path in libraries)
