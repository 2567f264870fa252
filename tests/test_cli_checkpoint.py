"""A checkpoint is whole or absent: what can go wrong while writing or reading one leaves the others, and says so."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import differences, jagged_schedule, snapshot
from relora_opt_cli import checkpoint
from relora_opt_cli.checkpoint import (
    Progress,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    read_progress,
    save_checkpoint,
)
from relora_opt_cli.config import UserError
from relora_opt_cli.model import Llama, LlamaConfig, init_weights

from relora_opt import ReLoRAOptimizer

SHAPE = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
PROGRESS = Progress(update=5, attempts=6, seconds=1.25, val_loss_start=3.5, val_loss_switch=3.25, val_loss=3.0)
Trained = tuple[Llama, ReLoRAOptimizer]


def build(num_updates: int = 0, *, seed: int = 0) -> Trained:
    """Return a model and its optimizer, which switches after 2 updates and restarts after 5 and 8."""
    model = Llama(SHAPE)
    init_weights(model, seed=seed)
    optimizer = ReLoRAOptimizer(model, torch.optim.AdamW, rank=4, schedule=jagged_schedule(3, 1, 2), lr=0.01)
    train(model, optimizer, num_updates)
    return model, optimizer


def train(model: Llama, optimizer: ReLoRAOptimizer, count: int) -> None:
    for _ in range(count):
        generator = torch.Generator().manual_seed(optimizer.num_updates)
        tokens = torch.randint(0, 40, (2, 9), generator=generator)
        logits = model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(run: Path, trained: Trained, update: int, *, keep: int = 2) -> Path:
    return save_checkpoint(run, *stated(trained), replace(PROGRESS, update=update), keep=keep)


def stated(trained: Trained) -> tuple[Llama, dict[str, Any]]:
    model, optimizer = trained
    return model, optimizer.state_dict()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- saving and loading


@pytest.mark.parametrize("num_updates", [0, 1, 2, 3, 5, 6])
def test_what_is_loaded_is_what_was_saved_and_goes_on_bitwise(num_updates: int, tmp_path: Path) -> None:
    model, optimizer = build(num_updates)
    progress = replace(PROGRESS, update=num_updates)
    folder = save_checkpoint(tmp_path, model, optimizer.state_dict(), progress, keep=2)
    assert folder == latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / f"{num_updates:08d}"
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "optimizer.pt", "progress.json"]
    other, fresh = build(seed=1)
    assert load_checkpoint(folder, other, fresh) == progress
    assert not differences(snapshot(other, fresh), snapshot(model, optimizer))
    train(model, optimizer, 4)
    train(other, fresh, 4)
    assert not differences(snapshot(other, fresh), snapshot(model, optimizer))


def test_weights_can_be_loaded_without_an_optimizer(tmp_path: Path) -> None:
    model, optimizer = build(4)
    folder = save(tmp_path, (model, optimizer), 4)
    other, _ = build(seed=1)
    load_checkpoint(folder, other)
    assert not differences(other.state_dict(), model.state_dict())


def test_saving_changes_nothing(tmp_path: Path) -> None:
    trained, plain = build(4), build(4)
    before = torch.get_rng_state()
    save(tmp_path, trained, 4)
    assert torch.equal(before, torch.get_rng_state())
    assert not differences(snapshot(*trained), snapshot(*plain))


@pytest.mark.parametrize(
    "progress", [PROGRESS, Progress(0, 0, 0.0), replace(PROGRESS, is_finished=True, val_loss=None)]
)
def test_progress_is_read_back_as_it_was(progress: Progress, tmp_path: Path) -> None:
    assert read_progress(save_checkpoint(tmp_path, *stated(build()), progress, keep=1)) == progress


def test_a_loss_that_is_not_finite_does_not_spoil_a_checkpoint(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, *stated(build()), replace(PROGRESS, val_loss=float("inf")), keep=1)
    assert read_progress(folder).val_loss == float("inf")


# ---- which are kept, and which is the latest


@pytest.mark.parametrize("keep", [1, 2, 3, 10])
def test_the_newest_are_kept_and_the_latest_is_the_highest(keep: int, tmp_path: Path) -> None:
    trained = build()
    updates = [0, 5, 10, 100, 1000]
    for update in updates:
        save(tmp_path, trained, update, keep=keep)
        assert latest_checkpoint(tmp_path).name == f"{update:08d}"
    assert names(tmp_path) == [f"{update:08d}" for update in updates[-keep:]]
    assert [path.name for path in checkpoints(tmp_path)] == names(tmp_path)


def test_saving_an_update_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    trained = build(3)
    folder = save(tmp_path, trained, 3)
    save_checkpoint(tmp_path, *stated(trained), replace(PROGRESS, update=3, is_finished=True), keep=2)
    assert names(tmp_path) == ["00000003"]
    assert read_progress(folder).is_finished


@pytest.mark.parametrize("name", [".00000009.partial", "00000009.partial", "notes", ".DS_Store", "9.5"])
def test_what_is_no_checkpoint_is_never_the_latest_and_stays(name: str, tmp_path: Path) -> None:
    trained = build()
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    save(tmp_path, trained, 3)
    assert latest_checkpoint(tmp_path).name == "00000003"
    save(tmp_path, trained, 4, keep=1)
    assert latest_checkpoint(tmp_path).name == "00000004"
    assert name in names(tmp_path)


def test_what_a_killed_save_left_is_written_over(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / ".00000003.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="holds no checkpoint to resume or export"):
        latest_checkpoint(tmp_path)
    save(tmp_path, build(), 3)
    assert names(tmp_path) == ["00000003"]


@pytest.mark.parametrize("has_folder", [False, True])
def test_no_checkpoint_is_an_error_that_names_the_run(has_folder: bool, tmp_path: Path) -> None:
    if has_folder:
        (tmp_path / "checkpoints").mkdir()
    assert checkpoints(tmp_path) == []
    with pytest.raises(UserError, match=f"'{tmp_path}' holds no checkpoint"):
        latest_checkpoint(tmp_path)


# ---- writes that fail


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_replace = os.replace


def no_space_for_folders(source: Path, target: Path) -> None:
    """Refuse the last step of a save, which moves the whole folder into place."""
    if Path(source).is_dir():
        no_space()
    _replace(source, target)


@pytest.mark.parametrize(
    ("owner", "function", "failure"),
    [
        (checkpoint, "save_merged", no_space),
        (torch, "save", no_space),
        (checkpoint, "_flush", no_space),
        (os, "fsync", no_space),
        (os, "replace", no_space),
        (os, "replace", no_space_for_folders),
        (Path, "write_text", no_space),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_write_that_fails_leaves_every_earlier_checkpoint_and_no_half_of_one(
    owner: Any, function: str, failure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = build(3)
    for update in (1, 2):
        save(tmp_path, trained, update)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, failure)
        with pytest.raises(UserError, match="No space left on device; earlier checkpoints are untouched") as caught:
            save(tmp_path, trained, 3)
    assert "00000003" in str(caught.value)
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["00000001", "00000002"]
    save(tmp_path, trained, 3)
    assert names(tmp_path) == ["00000002", "00000003"]


def test_a_failing_rewrite_of_an_update_leaves_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run saves the last update's checkpoint again, as finished."""
    trained = build(3)
    folder = save(tmp_path, trained, 3, keep=1)
    before = contents(tmp_path)
    for function, failure in (("fsync", no_space), ("replace", no_space)):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, failure)
            with pytest.raises(UserError, match="earlier checkpoints are untouched"):
                save(tmp_path, trained, 3, keep=1)
        assert latest_checkpoint(tmp_path) == folder
        assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_ends_a_save_otherwise_leaves_earlier_checkpoints(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = build(3)
    folder = save(tmp_path, trained, 1)

    def end(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", end)
        with pytest.raises(error):
            save(tmp_path, trained, 2)
    assert latest_checkpoint(tmp_path) == folder
    load_checkpoint(folder, *build(seed=1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own; skipped where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a full disk needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a caught error may hold a file of it open


@pytest.mark.parametrize("num_free", [0, 4, 12, 24, 40], ids="{} KiB free".format)
def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_checkpoint(num_free: int, small_disk: Path) -> None:
    trained = build(3)
    folder = save(small_disk, trained, 1)
    before = contents(folder)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(free - num_free * 1024))
    with pytest.raises(UserError, match="earlier checkpoints are untouched") as caught:
        save(small_disk, trained, 2)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before
    assert names(small_disk) == [folder.name]
    load_checkpoint(latest_checkpoint(small_disk), *build(seed=1))


# ---- files that are damaged


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


@pytest.mark.parametrize("damage", [cut, empty, garbage, Path.unlink])
@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "progress.json"])
def test_a_damaged_file_is_one_sentence_that_names_it(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = save(tmp_path, build(4), 4)
    damage(folder / name)
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder, *build(seed=1))
    message = str(caught.value)
    assert "00000004" in message
    assert message.count("\n") == 0
    assert len(message) < 600


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        "{}",
        '{"format": 1}',
        '{"format": 1, "update": 3, "attempts": 3, "seconds": 1.0, "more": 1}',
        '{"format": 1, "update": 3',
        '{"format": 1, "update": "three", "attempts": 3, "seconds": 1.0}',
        '{"format": 1, "update": null, "attempts": 3, "seconds": 1.0}',
    ],
)
def test_progress_that_makes_no_sense_is_one_sentence_with_the_remedy(text: str, tmp_path: Path) -> None:
    folder = save(tmp_path, build(), 3)
    (folder / "progress.json").write_text(text)
    with pytest.raises(
        UserError, match=r"progress\.json is damaged \(.*\): delete the folder .*00000003 to go on"
    ) as caught:
        read_progress(folder)
    assert "\n" not in str(caught.value)


def test_another_format_names_both(tmp_path: Path) -> None:
    folder = save(tmp_path, build(), 3)
    content = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps({**content, "format": 9}))
    with pytest.raises(UserError, match="has format 9 and not 1: use the version of relora-opt that wrote it"):
        read_progress(folder)


def test_a_state_that_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    folder = save(tmp_path, build(4), 4)
    model = Llama(SHAPE)
    other = ReLoRAOptimizer(model, torch.optim.AdamW, rank=5, schedule=jagged_schedule(3, 1, 2))
    with pytest.raises(UserError, match=r"optimizer\.pt cannot be loaded: the saved state has rank \[4, 0\]"):
        load_checkpoint(folder, model, other)
    other_shape = Llama(replace(SHAPE, hidden_size=32))
    with pytest.raises(UserError, match="00000004"):
        load_checkpoint(folder, other_shape)


def test_a_checkpoint_runs_no_code_of_strangers(tmp_path: Path) -> None:
    """optimizer.pt is read with weights_only."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "touched",))

    folder = save(tmp_path, build(), 3)
    torch.save({"state": Evil()}, folder / "optimizer.pt")
    with pytest.raises(UserError, match=r"optimizer\.pt cannot be loaded") as caught:
        load_checkpoint(folder, *build(seed=1))
    assert not (tmp_path / "touched").exists()
    assert "\n" not in str(caught.value)
