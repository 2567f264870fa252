"""A run that was interrupted and resumed equals, bit for bit, the run that never stopped; another run is refused."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from relora_opt_cli import machine, saving, train
from relora_opt_cli.changes import changes
from relora_opt_cli.checkpoint import checkpoints, read_config, read_identity, read_progress, save_progress
from relora_opt_cli.config_file import load_config_file, to_toml
from relora_opt_cli.corpus import Settings, prepare
from relora_opt_cli.data import Batches
from relora_opt_cli.errors import UserError
from relora_opt_cli.loop import Loop
from relora_opt_cli.parallel import World
from relora_opt_cli.record import read_record, write_record
from relora_opt_cli.resolution import resolve
from relora_opt_cli.resume import config_of
from relora_opt_cli.signals import Interrupts
from relora_opt_cli.train import resume_run
from tiny import CYCLE, STEPS, WARM_START, end_of, rows
from tiny import train as run_tiny

from relora_opt import guard


class Killed(BaseException):
    """Stands for a kill: nothing in the command line catches it."""


@pytest.fixture(autouse=True)
def _quick(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        torch.set_num_threads(1)
        return run_tiny(tmp_path_factory.mktemp("whole"), keep=100)


def at_micro_batch(number: int, do: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Do something before the micro-batch of that number (from 1) is trained on."""
    make_step = Loop._make_step

    def counting(self: Loop) -> Any:
        step, count = make_step(self), iter(range(1, 10**6))

        def counted(tokens: torch.Tensor) -> torch.Tensor:
            if next(count) == number:
                do()
            return step(tokens)

        return counted

    patch.setattr(Loop, "_make_step", counting)


def kill() -> None:
    raise Killed


def interrupted(folder: Path, micro_batch: int, do: Callable[[], None], **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_micro_batch(micro_batch, do, patch)
        run_tiny(folder, **options)


def resumed_and_killed(run: Path, micro_batch: int, options: dict[str, Any] | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_micro_batch(micro_batch, kill, patch)
        with pytest.raises(Killed):
            resume_run(run, options)


SECOND_EPOCH = 17  # the update that takes the first blocks of the second epoch
POINTS = {
    "before the first update": 0,
    "in the warm start": 2,
    "on the update before the switch": WARM_START - 1,
    "at the switch": WARM_START,
    "after the switch": WARM_START + 1,
    "on the update before a restart": WARM_START + CYCLE - 1,
    "at a restart": WARM_START + CYCLE,
    "after a restart": WARM_START + CYCLE + 1,
    "at the second restart": WARM_START + 2 * CYCLE,
    "in the second epoch": SECOND_EPOCH,
    "at the third restart, on the update before the last": STEPS - 1,
}
# Of the points, those that are fast.
WITHIN_AN_UPDATE = (
    "before the first update",
    "on the update before the switch",
    "at the switch",
    "on the update before a restart",
    "at a restart",
    "after a restart",
    "in the second epoch",
    "at the third restart, on the update before the last",
)
BETWEEN_UPDATES = ("before the first update", "at the switch", "after a restart", "in the second epoch")


def cases() -> Iterator[Any]:
    for point in POINTS:
        marks = () if point in WITHIN_AN_UPDATE else pytest.mark.slow
        yield pytest.param(point, 2, 1, id=f"{point}, within an update", marks=marks)
        marks = () if point in BETWEEN_UPDATES else pytest.mark.slow
        yield pytest.param(point, 1, 4, id=f"{point}, between updates", marks=marks)


@pytest.mark.parametrize(("point", "micro_batch", "save_every"), [*cases()])
def test_a_killed_run_ends_as_the_one_that_never_stopped_bitwise(
    point: str, micro_batch: int, save_every: int, whole: Path, tmp_path: Path
) -> None:
    """Killed between two updates, or in the middle of the second one's accumulation; resumed there, or from earlier."""
    made = POINTS[point]
    with pytest.raises(Killed):
        interrupted(tmp_path, 2 * made + micro_batch, kill, save_every=save_every)
    run = tmp_path / "run"
    assert int(checkpoints(run)[-1].name) == made - made % save_every
    resume_run(run)
    assert rows(run) == rows(whole)
    assert end_of(run) == end_of(whole)


def test_the_matrix_reaches_a_second_epoch(whole: Path) -> None:
    config = config_of(whole)
    stream = prepare(config.data, Settings.of(config, tokenizer=whole / "tokenizer.json"), seq_len=config.seq_len).train
    batches = Batches(stream, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed)
    assert (SECOND_EPOCH - 1) * config.batch_size < batches.num_blocks < SECOND_EPOCH * config.batch_size
    assert [rows(whole)[WARM_START + number * CYCLE].restarts for number in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "options",
    [
        {"base": "muon"},
        {"init": "gradient"},
        {"dtype": "bfloat16", "checkpoint_activations": True},
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ({"base": "sgd"}, {"prune": "random:0.9"}, {"rank": 0})
        ),
    ],
    ids=str,
)
def test_every_kind_of_run_goes_on_bitwise(options: dict[str, Any], tmp_path: Path) -> None:
    """Killed before the switch, after it, where a gradient is sketched once of twice, and at a restart."""
    whole, run = run_tiny(tmp_path, out=str(tmp_path / "whole"), steps=12, **options), tmp_path / "run"
    with pytest.raises(Killed):
        interrupted(tmp_path, 2 * (WARM_START - 1) + 2, kill, steps=12, **options)
    for num_updates in (1, 1, CYCLE - 1):
        resumed_and_killed(run, 2 * num_updates + 2)
    resume_run(run)
    assert rows(run) == rows(whole)
    assert end_of(run) == end_of(whole)


@pytest.mark.slow
def test_a_run_that_is_killed_at_every_update_ends_the_same(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        interrupted(tmp_path, 2, kill)
    for _ in range(STEPS - 1):
        resumed_and_killed(tmp_path / "run", 4)
    resume_run(tmp_path / "run")
    assert rows(tmp_path / "run") == rows(whole)
    assert end_of(tmp_path / "run") == end_of(whole)


@pytest.fixture
def endable() -> Iterator[None]:
    """Python's own answers to Ctrl-C and a closed terminal: background jobs of a shell, and `nohup`, ignore them."""
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, answer) for number, answer in own.items()}
    yield
    for number, answer in before.items():
        signal.signal(number, answer)


@pytest.mark.usefixtures("endable")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), pytest.param(signal.SIGHUP, 129, id="SIGHUP")]
)
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_signal_finishes_the_update_saves_and_says_how_to_go_on(
    number: int, status: int, micro_batch: int, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        interrupted(tmp_path, 2 * 7 + micro_batch, lambda: os.kill(os.getpid(), number), save_every=100)
    run = tmp_path / "run"
    assert end.value.code == status
    assert f"stopped; to go on: relora-opt pretrain --resume {run}" in capsys.readouterr().out
    assert int(checkpoints(run)[-1].name) == rows(run)[-1].update == 8
    resume_run(run)
    assert rows(run) == rows(whole)
    assert end_of(run) == end_of(whole)


def test_a_terminal_that_is_closed_does_not_stop_what_nohup_started(whole: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupted(tmp_path, 2 * 7, lambda: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert end_of(tmp_path / "run") == end_of(whole)


def test_a_second_interrupt_ends_at_once_and_leaves_the_last_checkpoint(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def twice() -> None:
        end = time.monotonic() + 30
        while int(checkpoints(run)[-1].name) != 4 and time.monotonic() < end:
            time.sleep(0.01)  # a thread writes it
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as end:
        interrupted(tmp_path, 2 * 7 + 1, twice, save_every=4)
    assert end.value.code == 130
    assert f"aborted; to go on: relora-opt pretrain --resume {run}" in capsys.readouterr().out
    assert int(checkpoints(run)[-1].name) == 4
    resume_run(run)
    assert end_of(run) == end_of(whole)


def test_an_echo_of_an_interrupt_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun hands on to its processes what the terminal has sent them already; to one alone nobody does."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Interrupts(World(size=2)):
        for now[0] in (100.0, 100.0, 100.4):
            os.kill(os.getpid(), signal.SIGINT)
        now[0] = 100.6
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("endable")
def test_an_interrupt_after_the_last_update_leaves_its_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However long the last checkpoint takes to write."""
    save = saving.save_checkpoint

    def slowly(run: Path, taken: saving.Snapshot, **options: Any) -> Path:
        time.sleep(0.5 * (taken.progress.update == STEPS))
        return save(run, taken, **options)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", slowly)
        patch.setattr(train, "export_checkpoint", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit) as end:
            run_tiny(tmp_path)
    run = tmp_path / "run"
    assert int(checkpoints(run)[-1].name) == STEPS
    assert end.value.code == 130
    assert f"aborted; to go on: relora-opt pretrain --resume {run}" in capsys.readouterr().out
    resume_run(run)
    assert rows(run) == rows(whole)
    assert end_of(run) == end_of(whole)


def test_a_resumed_run_draws_the_random_numbers_that_it_would_have_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where something draws at every update, as dropout would: between the newest checkpoint and the kill, too."""
    attempt, drawn = Loop.attempt, list[tuple[int, float, float, float]]()

    def drawing(self: Loop) -> None:
        attempt(self)
        made = self.run.progress.update
        drawn.append((made, random.random(), float(np.random.rand()), float(torch.rand(()))))

    monkeypatch.setattr(Loop, "attempt", drawing)
    run_tiny(tmp_path, out=str(tmp_path / "whole"))
    whole = [*drawn]
    drawn.clear()
    with pytest.raises(Killed):
        interrupted(tmp_path, 2 * 10 + 1, kill, save_every=4)
    assert drawn == whole[:10]
    drawn.clear()
    resume_run(tmp_path / "run")
    assert drawn == whole[8:]


# ---- updates that are skipped


def spoil_batches(patch: pytest.MonkeyPatch, numbers: range, factor: float = float("nan")) -> None:
    """Multiply the loss of these batches (from 0), as a text in a strange format might."""
    attempt, loss, is_spoiled = Loop.attempt, Loop._loss, [False]

    def attempt_batch(self: Loop) -> None:
        is_spoiled[0] = self.run.progress.attempts in numbers
        attempt(self)

    def loss_of_batch(self: Loop, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        return loss(self, model, tokens) * (factor if is_spoiled[0] else 1.0)

    patch.setattr(Loop, "attempt", attempt_batch)
    patch.setattr(Loop, "_loss", loss_of_batch)


@pytest.fixture
def quick_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that knows enough after 4 updates."""
    monkeypatch.setattr(guard, "NUM_LOSSES", 4)


NAN, JUMP = r"loss nan is not finite", r"loss \d{3}\.\d+ is above \d\.\d+, and the last 4 had a mean of \d\.\d+"


@pytest.mark.usefixtures("quick_guard")
@pytest.mark.parametrize(
    ("factor", "reason", "killed_at"),
    [
        pytest.param(float("nan"), NAN, 6, id="nan, 6"),
        pytest.param(100.0, JUMP, 7, id="finite, 7"),
        pytest.param(float("nan"), NAN, 7, id="nan, 7", marks=pytest.mark.slow),
        pytest.param(100.0, JUMP, 6, id="finite, 6", marks=pytest.mark.slow),
    ],
)
def test_batches_whose_loss_explodes_are_skipped_counted_and_not_served_again(
    factor: float,
    reason: str,
    killed_at: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Batches 5 and 6 are spoiled; the run is killed in an attempt around them."""
    spoil_batches(monkeypatch, range(5, 7), factor)
    whole = run_tiny(tmp_path, out=str(tmp_path / "whole"))
    said = capsys.readouterr().out
    assert len(re.findall(f"update 6 skipped: {reason}", said)) == 2
    assert re.search(r"skipped updates +2\b", said)
    skipped = {row.update: (row.skips, row.skip_reason) for row in rows(whole) if row.skips or row.skip_reason}
    assert [*skipped] == [6]
    assert skipped[6][0] == 2
    assert re.fullmatch(reason, skipped[6][1] or "")
    progress = read_progress(checkpoints(whole)[-1])
    assert (progress.update, progress.attempts, progress.skips) == (STEPS, STEPS + 2, 0)
    with pytest.raises(Killed):
        interrupted(tmp_path, 2 * killed_at + 1, kill)
    resume_run(tmp_path / "run")
    assert rows(tmp_path / "run") == rows(whole)
    assert end_of(tmp_path / "run") == end_of(whole)


def test_too_many_skips_in_a_row_end_the_run_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_batches(monkeypatch, range(5, 1000))
    with pytest.raises(
        UserError,
        match=r"3 updates in a row were skipped, .* loss nan is .*max_skips=3\): start again with lower rates$",
    ):
        run_tiny(tmp_path, max_skips=3)
    run = tmp_path / "run"
    progress = read_progress(checkpoints(run)[-1])
    assert (progress.update, progress.skips) == (5, 2)
    with pytest.raises(UserError, match="3 updates in a row"):  # those before it was resumed count
        resume_run(run)


@pytest.mark.usefixtures("quick_guard")
def test_a_loss_that_has_exploded_for_good_ends_the_run_which_may_be_told_to_train_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_batches(monkeypatch, range(5, 1000), 100.0)
    run = tmp_path / "run"
    with pytest.raises(
        UserError, match=rf"3 updates in a row .* {JUMP} .*rates, or train .*{run} --max-loss-jump inf$"
    ):
        run_tiny(tmp_path, max_skips=3)
    resume_run(run, {"max_loss_jump": float("inf")})
    assert "max_loss_jump: 10.0 -> inf\n" in capsys.readouterr().out
    assert rows(run)[-1].update == STEPS
    assert rows(run)[6].skips == 2  # those that were saved


# ---- metrics


def test_rows_beyond_the_restored_update_are_cut(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        interrupted(tmp_path, 2 * 10 + 1, kill, save_every=4)
    run = tmp_path / "run"
    assert rows(run)[-1].update == 10
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"update": 11, "tok')  # torn by the kill
    resumed_and_killed(run, 1)
    assert rows(run) == rows(whole)[:9]


# ---- folders


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_a_run_goes_on_in_its_own_folder_alone(whole: Path, tmp_path: Path) -> None:
    run = part_of(whole, tmp_path)
    other = Path(shutil.copytree(whole, tmp_path / "other"))
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=r"out='.*other' is not resume='.*run': a run goes on in its own folder"):
        resume_run(run, {"out": str(other)})
    with pytest.raises(UserError, match=r"out='.*new' is not resume='.*run'"):
        resume_run(run, {"out": str(tmp_path / "new")})
    assert files_of(tmp_path) == before
    resume_run(run, {"out": f"{run}/../run"})
    assert end_of(run) == end_of(whole)
    assert files_of(other) == {path: data for path, data in before.items() if other in path.parents}
    assert load_config_file(run / "config.toml")["out"] == str(run)


def test_a_checkpoint_that_another_run_has_written_is_not_taken_for_this_one_s(whole: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "run" / "checkpoints" / "00000003"
    foreign = whole / "checkpoints" / "00000003"
    with pytest.raises(UserError, match=r"checkpoint .*00000003 could not be written: .*Directory not empty"):
        interrupted(tmp_path, 2 * 2 + 1, lambda: shutil.copytree(foreign, theirs))
    assert {path.name: data for path, data in files_of(theirs).items()} == {
        path.name: data for path, data in files_of(foreign).items()
    }


@pytest.mark.parametrize(("micro_batch", "save_every"), [(9, 8), (2 * STEPS, 100)])
def test_a_run_whose_folder_was_replaced_leaves_the_new_one_alone(
    micro_batch: int, save_every: int, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def replaced() -> None:
        shutil.rmtree(run)
        shutil.copytree(whole, run)

    with pytest.raises(UserError, match=r"lock is not the one that this run holds: the folder, or the lock"):
        interrupted(tmp_path, micro_batch, replaced, keep=1, save_every=save_every)
    assert {path.relative_to(run): data for path, data in files_of(run).items()} == {
        path.relative_to(whole): data for path, data in files_of(whole).items()
    }


# ---- settings that changed


def part_of(whole: Path, tmp_path: Path, update: int = 8) -> Path:
    """Return a copy of a run as it was when it was killed after an update."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for path in checkpoints(run):
        if int(path.name) > update:
            shutil.rmtree(path)
    return run


def test_what_training_does_not_see_may_change_and_is_listed(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = part_of(whole, tmp_path)
    capsys.readouterr()
    resume_run(run, {"eval_every": 5, "keep": 3, "keep_every": 10, "save_every": 2})
    said = capsys.readouterr().out
    head = f"resuming {run} after update 8\n  eval_every: 6 -> 5\n  save_every: 1 -> 2\n  keep: 100 -> 3\n"
    assert f"{head}  keep_every: none -> 10\n" in said
    assert end_of(run) == end_of(whole)
    assert [row.update for row in rows(run) if row.val_loss is not None] == [0, 4, 6, 10, 15, 20]
    assert [int(path.name) for path in checkpoints(run)] == [0, 10, 16, 18, 20]
    assert load_config_file(run / "config.toml")["eval_every"] == 5
    assert read_config(checkpoints(run)[-1])["eval_every"] == 5
    assert read_config(checkpoints(run)[1])["eval_every"] == 5


def test_what_may_round_differently_is_said(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = part_of(whole, tmp_path)
    resume_run(run, {"micro_batch_size": 4})
    assert "micro_batch_size: 2 -> 4; sums may round differently" in capsys.readouterr().out
    for ours, theirs in zip(rows(run)[1:], rows(whole)[1:], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)  # Adam enlarges what float32 rounds


def test_more_steps_move_the_schedule_s_end_and_the_new_rate_is_said(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = part_of(whole, tmp_path)
    resume_run(run, {"steps": 30})
    found = rows(run)
    assert [row.update for row in found] == list(range(31))
    assert found[:9] == rows(whole)[:9]
    line = f"steps: 20 -> 30; the rate of update 9 is {found[9].lr:.3g}, and was to be {rows(whole)[9].lr:.3g}\n"
    assert line in capsys.readouterr().out
    assert found[9].lr > rows(whole)[9].lr


@pytest.mark.parametrize("settings", [{"factor_lr": 2.0}, {"rank": 0}], ids=str)
def test_the_rate_that_was_to_be_is_that_of_the_run_itself(settings: dict[str, Any], tmp_path: Path) -> None:
    run = run_tiny(tmp_path, save_every=20, **settings)
    before = resolve(load_config_file(run / "config.toml"))
    for row in rows(run)[1:]:
        (line,) = changes(before, replace(before, steps=30), update=row.update - 1)
        assert f"; the rate of update {row.update} is " in line
        assert line.endswith(f", and was to be {row.lr:.3g}")


def test_a_finished_run_goes_on_when_it_gets_more_steps_or_tokens(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = part_of(whole, tmp_path, STEPS)
    resume_run(run)
    assert "is finished: 20 updates; give more --steps to go on" in capsys.readouterr().out
    resume_run(run, {"tokens": 24 * 4 * 16})
    assert [row.update for row in rows(run)] == list(range(25))
    assert read_progress(checkpoints(run)[-1]).is_finished
    assert end_of(run) != end_of(whole)


def test_a_finished_run_that_goes_on_and_is_killed_has_no_export_of_its_earlier_end(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = part_of(whole, tmp_path, STEPS)
    resumed_and_killed(run, 1, {"steps": 24})
    assert "\n  export: removed, it was of update 20; the new end makes one\n" in capsys.readouterr().out
    assert not (run / "export").exists()
    assert not read_progress(checkpoints(run)[-1]).is_finished
    resume_run(run, {"steps": 20})  # closes it again
    assert end_of(run) == end_of(whole)


@pytest.mark.parametrize("steps", [WARM_START - 1, WARM_START + CYCLE - 1])
def test_a_run_may_be_made_to_end_before_its_switch_or_its_first_restart(
    steps: int, whole: Path, tmp_path: Path
) -> None:
    run = part_of(whole, tmp_path, 2)
    resume_run(run, {"steps": steps})
    assert [row.update for row in rows(run)] == list(range(steps + 1))
    assert rows(run)[-1].restarts == 0
    resume_run(run, {"steps": STEPS})
    assert rows(run)[-1].restarts == 3


def test_a_run_that_has_begun_ends_no_earlier_than_its_warm_up(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, warmup=9)
    with pytest.raises(UserError, match="warmup=9 is longer than the run, steps=8: give at least so many steps"):
        resume_run(run, {"steps": 8})


def test_a_longer_run_at_a_constant_rate_equals_one_that_was_long_from_the_start(tmp_path: Path) -> None:
    options = {"outer": "constant", "warmup": 0, "eval_every": 3}
    whole = run_tiny(tmp_path, out=str(tmp_path / "whole"), steps=24, **options)
    run = run_tiny(tmp_path, steps=15, **options)
    resume_run(run, {"steps": 24})
    assert rows(run) == rows(whole)
    assert end_of(run) == end_of(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, r"seed=1, but .*run was trained with 0: go on with that, or start a new run"),
        ({"lr": 0.5}, r"lr=0\.5, but .*run was trained with 0\.01"),
        ({"rank": 2}, r"rank=2, but .*run was trained with 4"),
        ({"seq_len": 8}, r"seq_len=8, but"),
        ({"batch_size": 8}, r"batch_size=8, but"),
        ({"restart_every": 6}, r"restart_every=6, but"),
        ({"base": "sgd"}, r"base='sgd', but"),
        ({"dtype": "bfloat16"}, r"dtype='bfloat16', but"),
        ({"steps": 11}, r"steps=11, but .*run has made 12 updates: give at least as many"),
        ({"steps": 9, "tokens": 640}, r"steps=9 and tokens=640 both say"),
        ({"tokens": 1}, r"tokens=1 is less than one update's 64"),
        ({"eval_every": 0}, r"eval_every=0 must be a whole number"),
        ({"keep": "ten"}, r"keep='ten' is of the wrong kind"),
    ],
    ids=str,
)
def test_what_would_make_another_run_is_refused_by_name_and_changes_nothing(
    options: dict[str, Any], message: str, whole: Path, tmp_path: Path
) -> None:
    run = part_of(whole, tmp_path, 12)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    with pytest.raises(UserError, match=message):
        resume_run(run, options)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"} == before


def test_a_setting_that_was_changed_by_hand_is_refused_or_listed_too(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = part_of(whole, tmp_path)
    config = run / "config.toml"
    plain = config.read_text()
    config.write_text(plain.replace("seed = 0", "seed = 3"))
    with pytest.raises(UserError, match=r"seed=3, but .* was trained with 0"):
        resume_run(run)
    config.write_text(plain.replace("eval_every = 6", "eval_every = 4"))
    resume_run(run)
    assert "eval_every: 6 -> 4\n" in capsys.readouterr().out
    assert end_of(run) == end_of(whole)


def test_what_is_left_open_stays_as_it_was_settled(whole: Path, tmp_path: Path) -> None:
    run = part_of(whole, tmp_path)
    resume_run(run, {"dtype": "auto"})
    assert load_config_file(run / "config.toml")["dtype"] == "float32"
    assert end_of(run) == end_of(whole)


def test_threads_and_device_stay_those_with_which_the_run_began(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = part_of(whole, tmp_path)
    settled = load_config_file(run / "config.toml")
    assert (settled["threads"], settled["device"]) == (1, "cpu" if not torch.accelerator.is_available() else ANY)
    torch.set_num_threads(2)
    resume_run(run, {"device": "auto"})
    assert torch.get_num_threads() == 1
    assert not re.search(r"^  (threads|device):", capsys.readouterr().out, re.MULTILINE)
    assert end_of(run) == end_of(whole)


def test_the_threads_that_a_process_of_several_has_are_not_those_of_the_run_for_good(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = part_of(whole, tmp_path, STEPS - 1)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("threads = 1\n", "threads = 4\n"))
    monkeypatch.setattr(machine, "num_cores", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    resume_run(run)
    assert torch.get_num_threads() == 2
    assert "  threads: 1 -> 2; sums may round differently" in capsys.readouterr().out
    assert load_config_file(run / "config.toml")["threads"] == 4
    assert read_config(checkpoints(run)[-1])["threads"] == 4


def test_a_step_that_cannot_be_recorded_here_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    said = "cuda_graphs=True, but the run is on cpu"
    with pytest.raises(UserError, match=said):
        run_tiny(tmp_path, steps=10, device="cpu", cuda_graphs=True)
    assert not (tmp_path / "run").exists()
    run = run_tiny(tmp_path, steps=10, device="cpu")
    with pytest.raises(UserError, match=said):
        resume_run(run, {"steps": 12, "cuda_graphs": True})
    assert rows(run)[-1].update == 10


def test_a_run_of_recorded_steps_goes_on_where_there_is_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_tiny(tmp_path, steps=10, device="cpu", compile=False)
    newest, config = checkpoints(run)[-1], run / "config.toml"
    recorded = {"device": "cuda", "cuda_graphs": True, "compile": True}
    save_progress(newest, read_progress(newest), {**read_config(newest), **recorded})
    config.write_text(to_toml(replace(resolve(load_config_file(config)), **recorded)))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    resume_run(run, {"steps": 12, "compile": False})
    said = capsys.readouterr().out
    assert "  cuda_graphs: True -> False; sums may round differently" in said
    assert rows(run)[-1].update == 12
    assert load_config_file(config)["cuda_graphs"] is False


def test_other_threads_or_a_device_that_is_not_to_be_had_are_listed(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = part_of(whole, tmp_path)
    newest, config = checkpoints(run)[-1], run / "config.toml"
    here = load_config_file(config)["device"]
    save_progress(newest, read_progress(newest), {**read_config(newest), "device": "xpu:7"})
    config.write_text(config.read_text().replace(f'device = "{here}"', 'device = "xpu:7"'))
    with pytest.raises(UserError, match="device='xpu:7' is not to be had here"):
        resume_run(run, {"device": "xpu:7"})
    resume_run(run, {"threads": 2})
    said = capsys.readouterr().out
    assert f"  device: xpu:7 -> {here}; sums may round differently: equal to the run so far, but not in the" in said
    assert "  threads: 1 -> 2; sums may round differently" in said
    assert (load_config_file(config)["device"], load_config_file(config)["threads"]) == (here, 2)


def spoil_shape(run: Path) -> str:
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 500.0}))
    return r"rope_theta=500\.0 in .*config\.json, but .*run was trained with 10000\.0: restore it, or start a new run"


def spoil_tokenizer(run: Path) -> str:
    path = run / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": {"type": "Fuse"}}))
    return r"tokenizer\.json is not the tokenizer that .*run was trained with: restore it, or start a new run"


@pytest.mark.parametrize("spoil", [spoil_shape, spoil_tokenizer])
def test_a_model_s_shape_and_its_tokenizer_do_not_change(
    spoil: Callable[[Path], str], whole: Path, tmp_path: Path
) -> None:
    run = part_of(whole, tmp_path)
    message, before = spoil(run), files_of(run)
    with pytest.raises(UserError, match=message):
        resume_run(run)
    assert files_of(run) == before


def test_a_checkpoint_of_before_there_was_an_identity_goes_on(whole: Path, tmp_path: Path) -> None:
    run = part_of(whole, tmp_path)
    record = read_record(newest := checkpoints(run)[-1])
    values = {name: value for name, value in record.values.items() if name != "identity"}
    write_record(newest, replace(record, values=values))
    resume_run(run)
    assert end_of(run) == end_of(whole)
    assert read_identity(newest) == {} != read_identity(checkpoints(run)[-1])


def test_texts_may_move_but_not_change(whole: Path, tmp_path: Path) -> None:
    run = part_of(whole, tmp_path)
    texts = Path(load_config_file(run / "config.toml")["data"][0])
    shutil.copytree(texts, tmp_path / "moved")
    (tmp_path / "moved" / "0.txt").write_text((texts / "0.txt").read_text().replace("a", "b"))
    with pytest.raises(UserError, match=r"the texts are not those that .*run was trained on"):
        resume_run(run, {"data": [str(tmp_path / "moved")]})
    shutil.copy(texts / "0.txt", tmp_path / "moved" / "0.txt")
    resume_run(run, {"data": [str(tmp_path / "moved")]})
    assert end_of(run) == end_of(whole)


def test_a_run_s_folder_may_move(whole: Path, tmp_path: Path) -> None:
    run = part_of(whole, tmp_path).rename(tmp_path / "elsewhere")
    resume_run(run)
    assert rows(run) == rows(whole)
    assert replace(read_progress(checkpoints(run)[-1]), seconds=0.0).is_finished
