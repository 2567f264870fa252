"""`torchrun -m relora_opt_cli pretrain`: one run on several processes, as on one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from relora_opt_cli.config import UserError
from relora_opt_cli.parallel import World, world
from safetensors.torch import load_file

OPTIONS = "--vocab-size 300 --seq-len 16 --batch-size 8 --rank 8 --restart-every 4 --restart-warmup 2 --warm-start 3"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"The number {n} is followed by {n + 1} and squared it is {n * n}." for n in range(400)))
    return path


def command(size: int, *arguments: Any) -> list[str]:
    run = (
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)] if size > 1 else [sys.executable]
    )
    port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if size > 1 else []
    return [*run, *port, "-m", "relora_opt_cli", "pretrain", *map(str, arguments)]


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "200"}


def pretrain(tmp_path: Path, size: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(size, *arguments),
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=240,
    )


@contextmanager
def started(tmp_path: Path, size: int, *arguments: Any) -> "Iterator[subprocess.Popen[str]]":
    """Run in the background, in a process group of its own; the body begins when some updates were made."""
    log = (tmp_path / "log").open("w")
    running = subprocess.Popen(
        command(size, *arguments),
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    try:
        while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
            assert running.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        yield running
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        log.close()


def last_save(run: Path) -> int:
    return max(int(path.name) for path in (run / "checkpoints").iterdir())


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def column(some: list[dict[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in some if row[key] is not None]


def options(text: Path, *, steps: int = 12) -> list[Any]:
    return [*OPTIONS.split(), "--steps", steps, "--data", text, "--dtype", "float32", "--no-compile"]


@pytest.mark.parametrize("extra", [("--micro-batch-size", 2), ("--shard",)], ids=str)
def test_two_processes_train_what_one_does(tmp_path: Path, text: Path, extra: tuple[Any, ...]) -> None:
    pretrain(tmp_path, 1, *options(text), "--out", "one", "--eval-every", 4).check_returncode()
    two = pretrain(tmp_path, 2, *options(text), "--out", "two", "--eval-every", 4, *extra)
    two.check_returncode()
    assert two.stdout.count("update 12/12") == 1  # the first process alone speaks
    one, other = rows(tmp_path / "one"), rows(tmp_path / "two")
    for key in ("loss", "val_loss", "grad_norm"):
        assert column(one, key) == pytest.approx(column(other, key), rel=1e-4)
    for key in ("update", "tokens", "restarts", "phase", "lr"):
        assert column(one, key) == column(other, key)
    exports = [load_file(tmp_path / run / "export" / "model.safetensors") for run in ("one", "two")]
    for name, weight in exports[0].items():
        torch.testing.assert_close(exports[1][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("save_every", [2, 3, 9])  # in the warm start, at the switch, in the second cycle
def test_a_sharded_run_goes_on_sharded_or_not(
    tmp_path: Path, text: Path, first: int, second: int, save_every: int
) -> None:
    """A run of one process that says `shard` is not sharded; its checkpoints are the same."""
    pretrain(tmp_path, 1, *options(text), "--out", "whole").check_returncode()
    shard = ["--shard"] if first > 1 else []
    pretrain(
        tmp_path, first, *options(text), *shard, "--out", "run", "--save-every", save_every, "--keep", 9
    ).check_returncode()
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace("shard = false", "shard = true"))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.name) > save_every:
            shutil.rmtree(path)
    pretrain(tmp_path, second, "--resume", "run").check_returncode()
    whole, resumed = rows(tmp_path / "whole"), rows(tmp_path / "run")
    assert column(whole, "update") == column(resumed, "update")
    assert column(whole, "loss") == pytest.approx(column(resumed, "loss"), rel=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, text: Path) -> None:
    pretrain(tmp_path, 1, *options(text), "--out", "whole").check_returncode()
    pretrain(tmp_path, 2, *options(text), "--out", "run", "--save-every", 3).check_returncode()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000012")
    assert last_save(tmp_path / "run") == 9
    pretrain(tmp_path, 1, "--resume", "run").check_returncode()
    whole, resumed = rows(tmp_path / "whole"), rows(tmp_path / "run")
    assert column(whole, "update") == column(resumed, "update")
    assert column(whole, "loss") == pytest.approx(column(resumed, "loss"), rel=1e-4)


@pytest.mark.slow
def test_a_dead_process_ends_the_run_with_a_message_and_a_checkpoint(tmp_path: Path, text: Path) -> None:
    endless = [*options(text, steps=100_000), "--save-every", 1_000_000]
    with started(tmp_path, 2, *endless, "--out", "run") as running:
        found = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, check=True)
        workers = sorted(map(int, found.stdout.split()))
        os.kill(workers[-1], signal.SIGKILL)
        assert running.wait(120) != 0
    log = (tmp_path / "log").read_text()
    assert log.count("another process of this run has ended") == 1
    saved = last_save(tmp_path / "run")
    assert f"saved after update {saved}; to go on, resume run" in log
    assert saved > 0
    with started(tmp_path, 1, "--resume", "run"):
        pass


@pytest.mark.slow
def test_an_interrupt_stops_all_processes_at_the_same_update(tmp_path: Path, text: Path) -> None:
    endless = [*options(text, steps=100_000), "--save-every", 1_000_000]
    with started(tmp_path, 2, *endless, "--out", "run") as running:
        os.killpg(running.pid, signal.SIGINT)
        running.wait(120)
    assert "stopped; to go on: relora-opt pretrain --resume run" in (tmp_path / "log").read_text()
    assert last_save(tmp_path / "run") == rows(tmp_path / "run")[-1]["update"] > 0


def test_a_batch_that_cannot_be_shared_is_refused_once(tmp_path: Path, text: Path) -> None:
    run = pretrain(tmp_path, 2, *options(text), "--batch-size", 9, "--out", "run")
    assert run.returncode != 0
    message = "relora-opt: batch_size=9 does not divide among 2 processes: make it a multiple"
    assert (run.stdout + run.stderr).count(message) == 1
    assert not (tmp_path / "run").exists()


def test_one_process_cannot_be_sharded(tmp_path: Path, text: Path) -> None:
    run = pretrain(tmp_path, 1, *options(text), "--shard", "--out", "run")
    assert run.returncode == 2
    assert "shard=True, but there is one process: start several with torchrun" in " ".join(run.stderr.split())
    assert not (tmp_path / "run").exists()


def test_an_environment_of_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE=2 without RANK"), world("cpu"):
        pass


def test_shares_make_up_the_batch_in_order() -> None:
    batch = torch.arange(12).view(6, 2)
    shares = [World(rank, 0, 3).share(batch) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert torch.equal(torch.cat(shares), batch)
    assert [len(World(rank, 0, 4).share(batch[:2])) for rank in range(4)] == [1, 1, 0, 0]


def test_one_process_needs_nobody() -> None:
    with world("cpu") as alone:
        assert alone.sum(1.5, 2.0) == [1.5, 2.0]
        assert alone.from_main("x") == "x"
        assert alone.on_main(lambda: 3) == alone.main_first(lambda: 3) == 3
