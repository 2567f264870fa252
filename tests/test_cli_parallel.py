"""`torchrun -m relora_opt_cli pretrain`: one run on several processes, as on one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from relora_opt_cli.checkpoint import checkpoints, read_config, read_progress, save_progress, write_all_but_weights
from relora_opt_cli.errors import UserError
from relora_opt_cli.parallel import World, world
from relora_opt_cli.record import TENSORS, read_record
from relora_opt_cli.resolution import resolve
from relora_opt_cli.run import _check_shares, new_run
from safetensors.torch import load_file, save_file

OPTIONS = "--vocab-size 300 --seq-len 16 --batch-size 8 --rank 8 --restart-every 4 --restart-warmup 2 --warm-start 3"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"The number {n} is followed by {n + 1} and squared it is {n * n}." for n in range(400)))
    return path


def command(size: int, *arguments: Any, program: tuple[str, ...] = ("-m", "relora_opt_cli")) -> list[str]:
    run = (
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)] if size > 1 else [sys.executable]
    )
    port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if size > 1 else []
    return [*run, *port, *program, "pretrain", *map(str, arguments)]


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


PROGRAM = """
import os, resource, signal, sys, time
from datetime import timedelta
from relora_opt_cli import app, checkpoint, data, loop, parallel, run, saving

rank = int(os.environ["RANK"])


def after(function, number, do):
    def wrapped(*arguments, **options):
        wrapped.count += 1
        if wrapped.count == number:
            do()
        return function(*arguments, **options)
    wrapped.count = 0
    return wrapped


def give(option, value):
    place = sys.argv.index(option) if option in sys.argv else len(sys.argv)
    sys.argv[place : place + 2] = [option, value]


def fails(place, name, number):
    setattr(place, name, after(getattr(place, name), number, fail))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*_, **__):
    raise RuntimeError("the disk has melted")


{body}
app.main()
"""


def sabotaged(tmp_path: Path, body: str, *arguments: Any, fails: bool = True) -> subprocess.CompletedProcess[str]:
    """Run with lines of Python of our own before it begins, in every process."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("{body}", body))
    run = subprocess.run(
        command(2, *arguments, program=(str(program),)),
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (run.returncode != 0) == fails
    return run


def said(run: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what the command itself says of its end."""
    return [line.removeprefix("relora-opt: ") for line in run.stderr.splitlines() if line.startswith("relora-opt: ")]


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


def forms(run: Path) -> dict[str, Any]:
    """Return the files of a run's last checkpoint, with the dtypes and shapes of all tensors in them."""
    folder = run / "checkpoints" / f"{last_save(run):08d}"
    return {
        path.name: {name: (tensor.dtype, tensor.shape) for name, tensor in load_file(path).items()}
        if path.suffix == ".safetensors"
        else None
        for path in folder.iterdir()
    }


def column(some: list[dict[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in some if row[key] is not None]


def options(text: Path, *, steps: int = 12) -> list[Any]:
    return [*OPTIONS.split(), "--steps", steps, "--data", text, "--dtype", "float32", "--no-compile"]


@pytest.mark.parametrize(
    "extra",
    [
        ("--micro-batch-size", 2),
        pytest.param(("--micro-batch-size", 2, "--shard"), marks=pytest.mark.slow),
        pytest.param(("--shard",), marks=pytest.mark.slow),
    ],
    ids=str,
)
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
    assert forms(tmp_path / "one") == forms(tmp_path / "two")


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
    assert f"saved after update {saved}\n" in log
    assert log.count("to go on: relora-opt pretrain --resume run") == 1
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


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    config = resolve({"data": ["text.txt"], "batch_size": 9})
    _check_shares(config, World(0, 0, 3))
    with pytest.raises(UserError, match="batch_size=9 does not divide among 2 processes: make it a multiple"):
        _check_shares(config, World(0, 0, 2))


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused_once(tmp_path: Path, text: Path) -> None:
    run = pretrain(tmp_path, 2, *options(text), "--batch-size", 9, "--out", "run")
    assert run.returncode != 0
    message = "batch_size=9 does not divide among 2 processes: make it a multiple"
    assert (run.stdout + run.stderr).count(message) == 1
    assert re.search(rf"^relora-opt: rank [01]: {message}$", run.stderr, re.MULTILINE)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(body, message, id=name)
        for name, body, message in [
            ("no text", "if rank == 1: give('--data', 'nowhere.txt')", "rank 1: data='nowhere.txt' does not exist"),
            (
                "no text on 0",
                "if rank == 0: give('--data', 'nowhere.txt')",
                "rank 0: data='nowhere.txt' does not exist",
            ),
            ("another text", "if rank == 1: give('--data', 'other.txt')", "rank 1: the texts are not those of rank 0"),
            ("option", "if rank == 1: give('--lr', '5')", "rank 1: lr=5.0, and 0.001 on rank 0: give all processes"),
            ("no options", "if rank == 1: give('--config', 'no.toml')", "rank 1: config='no.toml' cannot be read"),
            ("folder", "if rank == 0: give('--out', 'text.txt/run')", "rank 0: out='text.txt/run' cannot be"),
            (
                "long name",
                "if rank == 0: give('--out', 'x' * 300)",
                "rank 0: '" + "x" * 300 + "' is longer than names of",
            ),
            ("model", "if rank == 1: run.init_weights = fail", "rank 1: RuntimeError: the disk has melted"),
            ("save", "if rank == 0: fails(saving, 'save_checkpoint', 2)", "rank 0: RuntimeError: the disk has melted"),
            ("batch", "if rank == 1: fails(loop.Batches, 'batch', 5)", "rank 1: RuntimeError: the disk has melted"),
        ]
    ],
)
def test_what_goes_wrong_in_one_process_is_said_once_and_ends_all(
    tmp_path: Path, text: Path, body: str, message: str
) -> None:
    (tmp_path / "other.txt").write_text(text.read_text().replace("number", "count"))
    run = sabotaged(tmp_path, body, *options(text), "--save-every", 3, "--out", "run")
    (line,) = said(run)
    assert line.startswith(message)
    of_torchrun = run.stderr.count("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")
    assert run.stderr.count("Traceback (most recent call last)") - of_torchrun == line.count("RuntimeError")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_goes_on_as_if_a_process_had_not_died_between_an_update_and_its_evaluation(
    tmp_path: Path, text: Path, victim: int
) -> None:
    """The one that dies is evaluating at the switch, after update 3; the other has made that update."""
    settings = [*options(text), "--eval-every", 50]
    pretrain(tmp_path, 1, *settings, "--out", "whole").check_returncode()
    body = f"if rank == {victim}: loop.Loop._validate = after(loop.Loop._validate, 2, die)"
    (line,) = said(sabotaged(tmp_path, body, *settings, "--out", "run", "--save-every", 50))
    assert line == (
        f"rank {1 - victim}: another process of this run has ended without a word, killed perhaps; "
        "to go on: relora-opt pretrain --resume run"
    )
    assert last_save(tmp_path / "run") == (3 if victim else 0)
    resumed = pretrain(tmp_path, 1, "--resume", "run")
    resumed.check_returncode()
    assert "validation loss at the switch" in resumed.stdout
    for key in ("update", "tokens", "phase", "restarts"):
        assert column(rows(tmp_path / "run"), key) == column(rows(tmp_path / "whole"), key)
    for key in ("loss", "val_loss", "grad_norm", "low_rank_ratio", "update_rms"):
        mine, theirs = column(rows(tmp_path / "run"), key), column(rows(tmp_path / "whole"), key)
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_an_update_whose_loss_a_lost_process_takes_along_is_reported_without(tmp_path: Path, text: Path) -> None:
    """It dies between its second update and telling its loss; sums before: devices, evaluation, two of update 1."""
    body = "if rank == 1: World = parallel.World; World.sum = after(World.sum, 5, die)"
    sabotaged(tmp_path, body, *options(text), "--eval-every", 5, "--out", "run")
    last = rows(tmp_path / "run")[-1]
    assert (last["update"], last["loss"]) == (last_save(tmp_path / "run"), None) == (2, None)
    pretrain(tmp_path, 1, "--resume", "run").check_returncode()
    assert column(rows(tmp_path / "run"), "update") == list(range(13))


@pytest.mark.slow
def test_a_run_is_resumed_from_the_main_process_s_checkpoint_or_not_at_all(tmp_path: Path, text: Path) -> None:
    """Rank 1 is on another machine, whose folder is a copy; the newest checkpoint has not reached it."""
    shutil.copytree(tmp_path, tmp_path / "there")
    pretrain(tmp_path, 1, *options(text, steps=9), "--out", "run", "--save-every", 3).check_returncode()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000009")
    shutil.copytree(tmp_path / "run", tmp_path / "there" / "run")
    body = "if rank == 1: os.chdir('there')"
    shutil.rmtree(tmp_path / "there" / "run" / "checkpoints" / "00000006")
    shutil.copytree(
        tmp_path / "run" / "checkpoints" / "00000006", tmp_path / "there" / "run" / "checkpoints" / "00000003"
    )
    (line,) = said(sabotaged(tmp_path, body, "--resume", "run"))
    assert line == (
        "rank 1: run/checkpoints/00000006, from which rank 0 goes on, is not there, and the newest here is 00000003: "
        "give all machines the same folder, or copy it"
    )
    of_there = tmp_path / "there" / "run" / "checkpoints"
    (of_there / "00000003").rename(of_there / "00000006")
    newest = of_there / "00000006"
    save_progress(newest, replace(read_progress(newest), attempts=7), read_config(newest))
    (line,) = said(sabotaged(tmp_path, body, "--resume", "run"))
    assert line.startswith("rank 1: run/checkpoints/00000006 is not that of rank 0 (Progress(update=6, attempts=7")
    save_progress(newest, replace(read_progress(newest), attempts=6), read_config(newest))
    newest.rename(of_there / "00000007")
    shutil.copytree(tmp_path / "run" / "checkpoints" / "00000006", of_there / "00000006")
    sabotaged(tmp_path, body, "--resume", "run", fails=False)  # a newer one elsewhere does not count


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_does_not_answer_ends_the_run(tmp_path: Path, text: Path, rank: int) -> None:
    body = f"""
parallel._TIMEOUT = timedelta(seconds=6)
if rank == {rank}: loop.Batches.batch = after(loop.Batches.batch, 5, lambda: time.sleep(20))
"""
    run = sabotaged(tmp_path, body, *options(text), "--out", "run")
    (line,) = said(run)
    assert "another process of this run has not answered for 0.1 minutes" in line


@pytest.mark.slow  # test_step_parallel.py has the law itself
@pytest.mark.parametrize("shard", [(), ("--shard",)], ids=str)
def test_a_loss_that_explodes_in_one_process_is_skipped_by_all(
    tmp_path: Path, text: Path, shard: tuple[str, ...]
) -> None:
    """Three updates as they should be are what this guard wants to see; the seventh batch is spoiled in one process."""
    body = """
from relora_opt import guard
guard.NUM_LOSSES = 3
loss, attempt, number = loop.Loop._loss, loop.Loop.attempt, [0]
def counted(self):
    number[0] = self.run.progress.attempts
    attempt(self)
loop.Loop.attempt = counted
if rank == 1: loop.Loop._loss = lambda *arguments: loss(*arguments) * (1000 if number[0] == 6 else 1)
"""
    run = sabotaged(tmp_path, body, *options(text), "--out", "run", *shard, fails=False)
    (reason,) = re.findall("update 7 skipped: (.*)", run.stdout)
    assert re.fullmatch(r"loss \d{4}\.\d is above \d\.\d+, and the last 3 had a mean of \d\.\d+", reason)
    assert [row["skips"] for row in rows(tmp_path / "run")] == [int(update == 7) for update in range(13)]


@pytest.mark.slow
def test_long_work_of_one_process_is_waited_for(tmp_path: Path, text: Path) -> None:
    body = """
parallel._TIMEOUT = timedelta(seconds=6)
prepare = run.prepare
def slow(*arguments, **options):
    time.sleep(10)
    return prepare(*arguments, **options)
run.prepare = slow
"""
    sabotaged(tmp_path, body, *options(text, steps=8), "--out", "run", fails=False)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_never_joins_is_not_waited_for(tmp_path: Path, rank: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("{body}", "parallel._TIMEOUT = timedelta(seconds=1)"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    run = subprocess.run(
        command(1, program=(str(program),)),
        env={**environment(tmp_path), **{name: str(value) for name, value in place.items()}},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    (line,) = said(run)
    assert line.startswith(f"rank {rank}: the 2 processes have not all met within 0.0166667 minutes (")


WHOLE_NOWHERE = """
from torch.distributed.tensor import DTensor
full_tensor = DTensor.full_tensor
def of_one_number(self, **options):
    assert self.numel() == 1, "a tensor was gathered"
    return full_tensor(self, **options)
DTensor.full_tensor = of_one_number
"""


@pytest.mark.slow
@pytest.mark.parametrize("base", [("adamw",), ("sgd", "--betas", 0, 0)], ids=str)
def test_a_sharded_run_goes_on_bitwise_and_is_whole_nowhere(tmp_path: Path, text: Path, base: tuple[Any, ...]) -> None:
    """In the warm start and after it; plain SGD keeps no state."""
    settings = [*options(text), "--base", *base, "--shard", "--save-every", 2, "--keep", 9]
    sabotaged(tmp_path, WHOLE_NOWHERE, *settings, "--out", "whole", fails=False)
    for stop in (2, 6):
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        for path in (tmp_path / "run" / "checkpoints").iterdir():
            if int(path.name) > stop:
                shutil.rmtree(path)
        sabotaged(tmp_path, WHOLE_NOWHERE, "--resume", "run", fails=False)
        exports = [(tmp_path / run / "export" / "model.safetensors").read_bytes() for run in ("whole", "run")]
        assert exports[0] == exports[1]
        shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_while_it_writes_its_share_costs_no_earlier_checkpoint(
    tmp_path: Path, text: Path, victim: int
) -> None:
    body = f"""
from relora_opt_cli import shares
if rank == {victim}: shares.save = after(shares.save, 4, die)
"""
    run = sabotaged(tmp_path, body, *options(text), "--save-every", 3, "--out", "run", "--shard")
    (line,) = said(run)
    assert line == (
        f"rank {1 - victim}: another process of this run has ended without a word, killed perhaps; "
        "to go on: relora-opt pretrain --resume run"
    )
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["00000000"]
    pretrain(tmp_path, 1, "--resume", "run").check_returncode()


@pytest.mark.slow
def test_a_sharded_run_without_a_shared_folder_is_refused_once(tmp_path: Path, text: Path) -> None:
    (tmp_path / "there").mkdir()
    run = sabotaged(tmp_path, "if rank == 1: os.chdir('there')", *options(text), "--out", "run", "--shard")
    (line,) = said(run)
    assert line == (
        "rank 1: run/checkpoints/.00000000.partial/model.safetensors.parts, which rank 0 has made, is not there: give "
        "all machines one folder, on a shared disk"
    )
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_sharded_run_is_not_put_together_from_different_weights(tmp_path: Path, text: Path) -> None:
    """Every process takes its part of the files that it sees: of weights to begin with, and of a checkpoint."""
    pretrain(tmp_path, 1, *options(text), "--out", "run", "--save-every", 6).check_returncode()
    shutil.copytree(tmp_path / "run", tmp_path / "there" / "run")
    changed = tmp_path / "there" / "run" / "export" / "model.safetensors"
    weights = load_file(changed)
    save_file({**weights, "model.norm.weight": 2 * weights["model.norm.weight"]}, changed, metadata={"format": "pt"})
    body = "if rank == 1: os.chdir('there')"
    begun = [*options(text), "--init-from", "run/export", "--out", "new", "--shard"]
    (line,) = said(sabotaged(tmp_path, body, *begun))
    there = str(tmp_path / "there" / "run" / "export")
    assert line == f"rank 1: the weights are not those of rank 0 (init_from={there!r}): copy those"
    folders = [tmp_path / place / "run" / "checkpoints" for place in ("", "there")]
    for folder in folders:
        shutil.rmtree(folder / "00000012")
    record = read_record(folders[1] / "00000006")
    save_file(load_file(folders[1] / "00000006" / "model.safetensors") | weights, folders[1] / "00000006" / "x")
    os.replace(folders[1] / "00000006" / "x", folders[1] / "00000006" / "model.safetensors")
    write_all_but_weights(folders[1] / "00000006", record.values, load_file(folders[1] / "00000006" / TENSORS))
    (line,) = said(sabotaged(tmp_path, body, "--resume", "run"))
    assert line == "rank 1: run/checkpoints/00000006 has other files than that of rank 0: copy that one"


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "victim"), [((), 0), (("--shard",), 0), (("--shard",), 1)], ids=str)
def test_a_full_disk_ends_the_run_with_a_sentence_and_what_was_saved(
    tmp_path: Path, text: Path, shard: tuple[str, ...], victim: int
) -> None:
    """The second checkpoint finds no room: files of one process have 1 MB at most from then on."""
    body = f"""
def fill():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
name = "save_share" if rank else "save_checkpoint"
if rank == {victim}: setattr(saving, name, after(getattr(saving, name), 2, fill))
"""
    run = sabotaged(tmp_path, body, *options(text), "--save-every", 3, "--out", "run", *shard)
    (line,) = said(run)
    assert line.startswith(f"rank {victim}: checkpoint run/checkpoints/00000003 could not be written: ")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["00000000"]
    pretrain(tmp_path, 1, "--resume", "run").check_returncode()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_while_it_prepares_says_so_once(tmp_path: Path, text: Path, number: int) -> None:
    body = "run.prepare = after(run.prepare, 1, lambda: (open(f'ready{rank}', 'w').close(), time.sleep(60)))"
    (tmp_path / "program.py").write_text(PROGRAM.replace("{body}", body))
    running = subprocess.Popen(
        command(2, *options(text), "--out", "run", program=("program.py",)),
        cwd=tmp_path,
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "ready0").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(number)
        _, errors = running.communicate(timeout=60)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode != 0
    assert errors.count("relora-opt: rank ") == 1


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(World, "sum", lambda _, value: [value * 2])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    message = "2 processes on a machine with 1 GPU, .*: start torchrun with --nproc-per-node 1, or give --device cpu"
    for rank in (0, 1):
        with pytest.raises(UserError, match=message):
            World(rank, rank, 2).on_device("auto")
    monkeypatch.setattr(World, "sum", lambda _, value: [value])
    with pytest.raises(UserError, match="1 of 2 processes have a GPU"):
        World(0, 0, 2).on_device("cuda")


def test_a_text_to_exit_with_is_no_success_in_one_of_several_processes(tmp_path: Path) -> None:
    code = "import sys; from relora_opt_cli import app; app._run = lambda: sys.exit('that went wrong'); app.main()"
    for size in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment(tmp_path), "WORLD_SIZE": size},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (run.returncode, run.stderr) == (1, "that went wrong\n")


def test_one_process_is_not_sharded() -> None:
    config = resolve({"data": ["text.txt"], "shard": True})
    with pytest.raises(UserError, match="shard=True, but there is one process: start several with torchrun"):
        new_run(config, World(0, 0, 1))


@pytest.mark.slow
def test_one_process_cannot_be_sharded(tmp_path: Path, text: Path) -> None:
    run = pretrain(tmp_path, 1, *options(text), "--shard", "--out", "run")
    assert run.returncode == 2
    assert "shard=True, but there is one process: start several with torchrun" in " ".join(run.stderr.split())
    assert not (tmp_path / "run").exists()


def test_an_environment_of_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE=2 without RANK"), world():
        pass


def test_shares_make_up_the_batch_in_order() -> None:
    batch = torch.arange(12).view(6, 2)
    shares = [World(rank, 0, 3).share(batch) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert torch.equal(torch.cat(shares), batch)
    assert [len(World(rank, 0, 4).share(batch[:2])) for rank in range(4)] == [1, 1, 0, 0]


def test_one_process_needs_nobody() -> None:
    with world() as alone:
        assert alone.sum(1.5, 2.0) == [1.5, 2.0]
        assert alone.from_main("x") == "x"
        assert alone.on_main(lambda: 3) == alone.main_first(lambda: 3) == 3
