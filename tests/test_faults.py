"""What goes wrong around a run, from a kill to a full disk, has a defined end and costs no finished checkpoint.

The number of kills is FAULT_KILLS, 1 if it is not set; `make test-all` sets 50.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from disks import mounted
from folders import small_model
from relora_opt_cli import lock, saving, train
from relora_opt_cli.checkpoint import checkpoints, damage_of, save_checkpoint, snapshot
from relora_opt_cli.errors import UserError
from relora_opt_cli.export import write_export
from relora_opt_cli.lock import locked
from relora_opt_cli.loop import Loop
from relora_opt_cli.progress import Progress
from relora_opt_cli.train import resume_run
from tiny import end_of, options, rows
from tiny import train as run_tiny
from tokenizer import byte_tokenizer
from torch.nn import Linear

pytestmark = pytest.mark.faults
KILLS = int(os.environ.get("FAULT_KILLS", "1"))


@pytest.fixture(autouse=True)
def _quick(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def assert_whole(run: Path) -> None:
    assert checkpoints(run)
    assert [damage_of(path) for path in checkpoints(run)] == [None] * len(checkpoints(run))


# ---- kills


def test_a_run_killed_at_random_moments_ends_as_the_one_that_was_not_bitwise(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    program = [sys.executable, str(Path(__file__).with_name("kills.py")), str(tmp_path), str(KILLS), str(seed)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60 + 20 * KILLS)
    told = f"seed {seed}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, told
    assert rows(tmp_path / "run") == rows(tmp_path / "whole"), told
    assert end_of(tmp_path / "run") == end_of(tmp_path / "whole"), told
    assert_whole(tmp_path / "run")
    assert KILLS < 50 or "while saving" in done.stdout, told


# ---- disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "8m") as disk:
        yield disk


def test_a_disk_that_runs_full_ends_the_run_with_a_sentence_and_loses_nothing(disk: Path, tmp_path: Path) -> None:
    whole = run_tiny(tmp_path, out=str(tmp_path / "whole"))
    run, filler = disk / "run", disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 900_000))  # room for some checkpoints
    with pytest.raises(UserError, match="No space left on device") as caught:
        run_tiny(tmp_path, out=str(run), keep=100)
    assert "\n" not in str(caught.value)
    assert_whole(run)
    saved = [path.name for path in checkpoints(run)]
    assert len(saved) < 20
    filler.unlink()
    resume_run(run)
    assert rows(run) == rows(whole)
    assert end_of(run) == end_of(whole)
    assert [path.name for path in checkpoints(run)][: len(saved)] == saved


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_an_export_to_a_full_disk_is_one_sentence_and_leaves_nothing(share: float, disk: Path) -> None:
    """Whichever of its files is the one without room: the tokenizer is the last."""
    free = shutil.disk_usage(disk).free
    export = write_export(small_model(), byte_tokenizer(), disk, disk / "export")
    taken = free - shutil.disk_usage(disk).free
    shutil.rmtree(export)
    (disk / "filler").write_bytes(bytes(free - int(share * taken)))
    with pytest.raises(UserError, match=r"out='.*export' cannot be written: .*; give another folder, or make room"):
        write_export(small_model(), byte_tokenizer(), disk, disk / "export")
    assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.slow
def test_a_full_disk_does_not_keep_a_run_from_being_read(disk: Path, tmp_path: Path) -> None:
    """Resuming needs room; what there is stays as it is until there is some."""
    run = run_tiny(tmp_path, out=str(disk / "run"), steps=20, keep=100)
    for path in checkpoints(run)[12:]:
        shutil.rmtree(path)
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free))
    with pytest.raises(UserError, match=r"No space left on device|cannot be written"):
        resume_run(run)
    assert_whole(run)
    filler.unlink()
    resume_run(run)
    assert end_of(run) == end_of(run_tiny(tmp_path, out=str(tmp_path / "whole")))


def test_a_read_only_disk_is_one_sentence_and_the_run_goes_on_when_it_can_be_written(
    disk: Path, tmp_path: Path
) -> None:
    whole, run = run_tiny(tmp_path, out=str(tmp_path / "whole")), disk / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(checkpoints(run)[-1])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match=r"lock cannot be written: Read-only file system"):
        resume_run(run)
    with pytest.raises(UserError, match=r"could not be written: .*Read-only file system"):
        save_checkpoint(run, snapshot(Linear(1, 1), {}, Progress(20, 20, 1.0), {}), keep=2)
    assert_whole(run)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    resume_run(run)
    assert end_of(run) == end_of(whole)


# ---- what vanishes


def test_a_run_whose_folder_vanishes_ends_with_a_sentence_and_does_not_make_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Loop.attempt

    def vanish(self: Loop) -> None:
        attempt(self)
        if self.run.progress.update == 5:
            self.run.writer.wait()
            shutil.rmtree(self.run.folder)

    monkeypatch.setattr(Loop, "attempt", vanish)
    with pytest.raises(UserError, match=r"run.lock is not the one that this run holds"):
        run_tiny(tmp_path)
    assert not (tmp_path / "run").exists()


def test_texts_that_vanish_are_named_and_the_run_goes_on_when_they_are_back(tmp_path: Path) -> None:
    whole = run_tiny(tmp_path, out=str(tmp_path / "whole"))
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for path in checkpoints(run)[-1:]:
        shutil.rmtree(path)
    (tmp_path / "texts").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"data='.*texts' does not exist"):
        resume_run(run)
    assert_whole(run)
    (tmp_path / "elsewhere").rename(tmp_path / "texts")
    resume_run(run)
    assert end_of(run) == end_of(whole)


# ---- two at once


def test_a_second_process_on_a_run_is_refused_by_name_of_the_first(tmp_path: Path) -> None:
    run = run_tiny(tmp_path)
    with locked(run, print), pytest.raises(UserError, match=rf"is being trained by process {os.getpid()} on .*: wait"):
        resume_run(run)
    resume_run(run)


def test_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    tmp_path.joinpath("lock").write_text("99999999 on another machine")
    with locked(tmp_path, print):
        assert tmp_path.joinpath("lock").read_text().startswith(f"{os.getpid()} on ")


def test_a_new_run_does_not_take_a_folder_that_another_process_has_just_made(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run", print), pytest.raises(UserError, match="is being trained by process"):
        run_tiny(tmp_path)


def test_where_there_are_no_locks_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(lock.errno.ENOLCK, os.strerror(lock.errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    said: list[str] = []
    with locked(tmp_path, said.append):
        assert said == [f"{tmp_path} cannot be locked (No locks available): see that no other process trains this run"]


def test_a_run_that_ended_before_its_first_checkpoint_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(_: object) -> None:
        raise Killed

    monkeypatch.setattr(train, "save", kill)
    with pytest.raises(Killed):
        run_tiny(tmp_path)
    with pytest.raises(UserError, match="holds a run that ended before its first checkpoint: remove it, or"):
        run_tiny(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint to resume"):
        resume_run(tmp_path / "run")


# ---- the thread that writes


def test_what_fails_in_the_thread_that_writes_ends_the_run_at_the_next_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not left for the next save, which may be hours away."""
    save = saving.save_checkpoint

    def fail(run: Path, taken: saving.Snapshot, **options: int) -> Path:
        if taken.progress.update == 50:
            raise UserError("the disk has melted")
        return save(run, taken, **options)

    monkeypatch.setattr(saving, "save_checkpoint", fail)
    with pytest.raises(UserError, match="the disk has melted"):
        run_tiny(tmp_path, save_every=50, steps=200)
    assert rows(tmp_path / "run")[-1].update < 100
    assert_whole(tmp_path / "run")


def test_metrics_that_the_disk_refuses_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise OSError(lock.errno.EIO, os.strerror(lock.errno.EIO))

    monkeypatch.setattr(saving, "flushed", refuse)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: Input/output error"):
        run_tiny(tmp_path)
    assert_whole(tmp_path / "run")


def test_a_mistake_waits_for_the_checkpoint_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Loop.attempt

    def fail(self: Loop) -> None:
        if self.run.progress.update == 8:
            raise UserError("that went wrong")
        attempt(self)

    monkeypatch.setattr(Loop, "attempt", fail)
    with pytest.raises(UserError, match="that went wrong"):
        run_tiny(tmp_path, save_every=8)
    assert checkpoints(tmp_path / "run")[-1].name == "00000008"
    assert_whole(tmp_path / "run")


def test_a_run_that_is_refused_leaves_its_folder_as_it_was(tmp_path: Path) -> None:
    given = options(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    with pytest.raises(UserError, match="is there and not empty"):
        run_tiny(tmp_path)
    assert [path.name for path in Path(given["out"]).iterdir()] == ["notes"]
