"""A checkpoint is whole or absent: what can go wrong while writing or reading one leaves the others, and says so."""

import errno
import json
import os
import random
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from disks import mounted
from hypothesis import given, settings
from hypothesis import strategies as st
from models import differences, jagged_schedule
from models import snapshot as moment
from relora_opt_cli import checkpoint, disk, record
from relora_opt_cli.checkpoint import (
    Snapshot,
    checkpoints,
    damage_of,
    latest_checkpoint,
    load_checkpoint,
    newest_whole,
    read_config,
    read_identity,
    read_progress,
    save_checkpoint,
    save_progress,
    snapshot,
)
from relora_opt_cli.errors import UserError
from relora_opt_cli.format1 import upgrade_checkpoint
from relora_opt_cli.model import Llama, LlamaConfig, init_weights
from relora_opt_cli.progress import Progress
from relora_opt_cli.record import read_record

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


def taken(trained: Trained, progress: Progress) -> Snapshot:
    model, optimizer = trained
    return snapshot(model, optimizer.state_dict(), progress, {"rank": 4, "betas": (0.9, 0.95)})


def save(run: Path, trained: Trained, update: int, *, keep: int = 2, **options: Any) -> Path:
    return save_checkpoint(run, taken(trained, replace(PROGRESS, update=update)), keep=keep, **options)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- saving and loading


@pytest.mark.parametrize("num_updates", [0, 1, 2, 3, 5, 6])
def test_what_is_loaded_is_what_was_saved_and_goes_on_bitwise(num_updates: int, tmp_path: Path) -> None:
    model, optimizer = build(num_updates)
    progress = replace(PROGRESS, update=num_updates)
    folder = save_checkpoint(tmp_path, taken((model, optimizer), progress), keep=2)
    assert folder == latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / f"{num_updates:08d}"
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    other, fresh = build(seed=1)
    assert load_checkpoint(folder, other, fresh) == progress
    assert not differences(moment(other, fresh), moment(model, optimizer))
    train(model, optimizer, 4)
    train(other, fresh, 4)
    assert not differences(moment(other, fresh), moment(model, optimizer))


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
    assert not differences(moment(*trained), moment(*plain))


@pytest.mark.parametrize(
    "progress", [PROGRESS, Progress(0, 0, 0.0), replace(PROGRESS, is_finished=True, val_loss=None)]
)
def test_progress_is_read_back_as_it_was(progress: Progress, tmp_path: Path) -> None:
    assert read_progress(save_checkpoint(tmp_path, taken(build(), progress), keep=1)) == progress


def test_a_loss_that_is_not_finite_does_not_spoil_a_checkpoint(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, taken(build(), replace(PROGRESS, val_loss=float("inf"))), keep=1)
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


@pytest.mark.parametrize(("every", "kept"), [(10, [0, 10, 20, 25, 30]), (7, [0, 25, 30]), (None, [25, 30]), (1, None)])
def test_those_of_every_so_many_updates_are_kept_too(every: int | None, kept: list[int] | None, tmp_path: Path) -> None:
    trained, updates = build(), [0, 5, 10, 15, 20, 25, 30]
    for update in updates:
        save(tmp_path, trained, update, keep_every=every)
    assert names(tmp_path) == [f"{update:08d}" for update in kept or updates]


def test_the_progress_of_a_checkpoint_can_be_written_anew(tmp_path: Path) -> None:
    trained = build(3)
    folder = save(tmp_path, trained, 3)
    before = contents(folder)
    save_progress(folder, replace(PROGRESS, update=3, is_finished=True), {"rank": 5})
    assert names(tmp_path) == ["00000003"]
    assert read_progress(folder).is_finished
    assert read_config(folder) == {"rank": 5}
    assert {name for name, data in contents(folder).items() if data != before[name]} == {"state.json"}
    assert damage_of(folder) is None
    load_checkpoint(folder, *build(seed=1))


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    drawn()
    folder = save(tmp_path, build(3), 3)
    expected = drawn()
    load_checkpoint(folder, *build(seed=1))
    assert drawn() == expected


def test_what_is_saved_is_the_moment_at_which_it_was_taken(tmp_path: Path) -> None:
    """Training goes on while a snapshot is written."""
    trained = build(4)
    image, then = taken(trained, replace(PROGRESS, update=4)), moment(*build(4))
    train(*trained, 3)
    loaded = build(seed=1)
    load_checkpoint(save_checkpoint(tmp_path, image, keep=1), *loaded)
    assert not differences(moment(*loaded), then)


@pytest.mark.parametrize("name", ["00000009.damaged", "00000009.partial", "notes", ".DS_Store", "9.5"])
def test_what_is_no_checkpoint_is_never_the_latest_and_stays(name: str, tmp_path: Path) -> None:
    trained = build()
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    save(tmp_path, trained, 3)
    assert latest_checkpoint(tmp_path).name == "00000003"
    save(tmp_path, trained, 4, keep=1)
    assert latest_checkpoint(tmp_path).name == "00000004"
    assert name in names(tmp_path)


@pytest.mark.parametrize("left", [".00000003.partial", ".00000007.partial", ".00000001.removed"])
def test_what_a_killed_save_left_goes_with_the_next(left: str, tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / left
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
        (checkpoint, "save_file", no_space),
        (checkpoint, "flushed", no_space),
        (checkpoint, "write_record", no_space),
        (os, "fsync", no_space),
        (os, "replace", no_space),
        (os, "replace", no_space_for_folders),
        (Path, "mkdir", no_space),
        (Path, "open", no_space),
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


def test_progress_that_cannot_be_written_leaves_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run writes the last update's progress again, as finished."""
    folder = save(tmp_path, build(3), 3, keep=1)
    before = contents(tmp_path)
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, no_space)
            with pytest.raises(UserError, match="earlier checkpoints are untouched"):
                save_progress(folder, replace(PROGRESS, update=3, is_finished=True), {})
        assert contents(tmp_path) == before
    assert damage_of(folder) is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_ends_a_save_otherwise_leaves_earlier_checkpoints(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = build(3)
    folder = save(tmp_path, trained, 1)

    def end(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", end)
        with pytest.raises(error):
            save(tmp_path, trained, 2)
    assert latest_checkpoint(tmp_path) == folder
    load_checkpoint(folder, *build(seed=1))


def test_the_folder_of_a_run_that_was_removed_does_not_come_back(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the folder .*run is gone"):
        save(tmp_path / "run", build(), 1)
    assert not (tmp_path / "run").exists()


def moments(run: Path, work: Callable[[], object]) -> list[dict[str, bytes]]:
    """Return what a kill would leave of a run's folder, before every line of what writes, copies or removes."""
    files = {module.__file__ for module in (checkpoint, disk, record, shutil)}
    found: list[dict[str, bytes]] = []

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        now = contents(run)
        if now not in found:
            found.append(now)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return found


@pytest.mark.parametrize("what", ["a checkpoint", "progress"])
def test_a_kill_before_any_line_leaves_whole_checkpoints_alone(what: str, tmp_path: Path) -> None:
    trained, run = build(3), tmp_path / "run"
    run.mkdir()
    for update in (1, 2):
        save(run, trained, update)
    if what == "progress":
        progress = replace(PROGRESS, update=2, is_finished=True)
        found = moments(run, lambda: save_progress(run / "checkpoints" / "00000002", progress, {}))
    else:
        image = taken(trained, replace(PROGRESS, update=3))
        found = moments(run, lambda: save_checkpoint(run, image, keep=2))
    assert len(found) > {"progress": 3, "a checkpoint": 10}[what]
    for number, files in enumerate(found):
        left = tmp_path / str(number)
        for name, data in files.items():
            (left / name).parent.mkdir(parents=True, exist_ok=True)
            (left / name).write_bytes(data)
        assert int(latest_checkpoint(left).name) >= 2
        assert [damage_of(path) for path in checkpoints(left)] == [None] * len(checkpoints(left))
        save(left, trained, 4)
        assert names(left)[-1] == "00000004"
        assert not [name for name in names(left) if name.startswith(".")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "320k") as disk:
        yield disk


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
@pytest.mark.parametrize("name", ["optimizer.safetensors", "model.safetensors", "state.json"])
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


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint, which stays as it is."""
    return save(tmp_path_factory.mktemp("good"), build(4), 4)


@contextmanager
def spoiled(good: Path, name: str, data: bytes) -> Iterator[Path]:
    """Give a copy of a checkpoint in which one file holds other bytes."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "checkpoints" / "00000004"
        shutil.copytree(good, folder)
        (folder / name).write_bytes(data)
        yield folder


FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_a_byte_that_has_changed_is_noticed(good: Path, name: str, place: float, flip: int) -> None:
    data = bytearray((good / name).read_bytes())
    data[int(place * len(data))] ^= flip
    with spoiled(good, name, bytes(data)) as folder:
        damage = damage_of(folder)
        assert damage is not None
        assert "\n" not in damage


def test_every_byte_of_a_record_counts_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    """The number of the format too: it would have ended the run for good, with a whole checkpoint beside it."""
    trained = build(3)
    newest = [save(tmp_path, trained, update) for update in (2, 3)][-1] / "state.json"
    data = newest.read_bytes()
    for place in (data.index(b'"format"') + 3, data.index(b'"format": 2') + len(b'"format": '), len(data) - 1):
        newest.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert "state.json is damaged" in str(damage_of(newest.parent))
    newest.write_bytes(data[:-1] + b" ")
    assert "state.json is damaged" in str(damage_of(newest.parent))
    newest.write_bytes(data.replace(b'"format": 2', b'"format": 3'))
    assert newest_whole(tmp_path, lambda _: None).name == "00000002"


@given(name=st.sampled_from(FILES), data=st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_whatever_stands_in_a_file_costs_one_sentence(good: Path, name: str, data: bytes) -> None:
    with spoiled(good, name, data) as folder, pytest.raises(UserError) as caught:
        load_checkpoint(folder, *build(seed=1))
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$dict", "$tuple", "$tensor", "$float", "update", "state", "1"]), inner)
    ),
    max_leaves=8,
)


def changed_record(folder: Path, **changes: Any) -> str:
    """Return a checkpoint's record with some of it changed, and the right checksum."""
    content = {**json.loads((folder / "state.json").read_text()), **changes}
    del content["crc32"]
    return json.dumps({**content, "crc32": zlib.crc32(json.dumps(content).encode())})


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"model.safetensors": {"bytes": 1, "crc32": 1}},
        {name: {"bytes": 1, "crc32": 1} for name in ("model.safetensors", "optimizer.safetensors", "../../../x")},
        {name: {"bytes": 0, "crc32": 0} for name in ("model.safetensors", "/dev/zero")},
    ],
    ids=str,
)
def test_a_record_names_its_two_files_and_no_other(files: dict[str, Any], good: Path) -> None:
    with spoiled(good, "state.json", changed_record(good, files=files).encode()) as folder:
        assert re.search(r"state\.json is damaged \(ValueError: it names the files \[", str(damage_of(folder)))


@given(key=st.sampled_from(["progress", "config", "identity", "optimizer", "random"]), value=JSON)
@settings(max_examples=40, deadline=None)
def test_values_that_make_no_sense_are_a_mistake_of_the_user_s_though_their_checksum_is_right(
    good: Path, key: str, value: Any
) -> None:
    with spoiled(good, "none", b"") as folder:
        whole = read_record(folder)
        (folder / "state.json").write_text(changed_record(folder, values={**whole.values, key: value}))
        state = torch.get_rng_state()
        with suppress(UserError):  # whatever else is raised fails the test; some values are as good as those that were
            load_checkpoint(folder, *build(seed=1))
            read_config(folder)
            read_identity(folder)
        torch.set_rng_state(state)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", "{}", '{"format": 2}', '{"format": 2, "files": {}, "values": {}}', "[" * 100_000],
    ids=lambda text: text[:40],
)
def test_a_record_that_makes_no_sense_is_one_sentence_with_the_remedy(text: str, good: Path) -> None:
    with (
        spoiled(good, "state.json", text.encode()) as folder,
        pytest.raises(UserError, match=r"state\.json is damaged \(.*\): delete the folder .*4") as caught,
    ):
        read_progress(folder)
    assert "\n" not in str(caught.value)


def test_a_record_of_unreasonable_size_is_not_read(good: Path) -> None:
    with spoiled(good, "state.json", b"") as folder:
        os.truncate(folder / "state.json", 1 << 40)  # a hole, which takes no room
        with pytest.raises(UserError, match="1,099,511,627,776 bytes, more than 67,108,864"):
            read_record(folder)


def test_another_format_names_both(good: Path) -> None:
    with (
        spoiled(good, "state.json", changed_record(good, format=9).encode()) as folder,
        pytest.raises(UserError, match="has format 9 and not 2: use the version of relora-opt that wrote it"),
    ):
        read_progress(folder)


def test_a_state_that_does_not_fit_is_one_sentence(good: Path) -> None:
    model = Llama(SHAPE)
    other = ReLoRAOptimizer(model, torch.optim.AdamW, rank=5, schedule=jagged_schedule(3, 1, 2))
    with pytest.raises(UserError, match=r"optimizer\.safetensors cannot be loaded: the saved state has rank \[4, 0\]"):
        load_checkpoint(good, model, other)
    other_shape = Llama(replace(SHAPE, hidden_size=32))
    with pytest.raises(UserError, match="00000004"):
        load_checkpoint(good, other_shape)


def test_tensors_are_loaded_where_fresh_ones_would_lie(good: Path) -> None:
    """A product's last bits may depend on the address, and a file's tensors lie anywhere."""
    _, optimizer = trained = build(seed=1)
    load_checkpoint(good, *trained)
    factors = [state[name] for state in optimizer.state.values() for name in ("A", "B") if name in state]
    assert factors
    assert all(tensor.data_ptr() % 64 == 0 for tensor in factors)


# ---- which one is used


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(name: str, tmp_path: Path) -> None:
    trained = build(3)
    for update in (1, 2, 3):
        save(tmp_path, trained, update, keep=9)
    damaged = tmp_path / "checkpoints" / "00000003" / name
    garbage(damaged)
    said: list[str] = []
    assert newest_whole(tmp_path, said.append).name == "00000002"
    assert len(said) == 1
    assert said[0].startswith(f"{damaged} is damaged (")
    assert said[0].endswith("; it is now 00000003.damaged, and the checkpoint before it is used")
    assert names(tmp_path) == ["00000001", "00000002", "00000003.damaged"]


def test_a_run_whose_checkpoints_are_all_damaged_says_so(tmp_path: Path) -> None:
    trained = build(3)
    for update in (1, 2):
        empty(save(tmp_path, trained, update) / "state.json")
    said: list[str] = []
    message = r"holds no checkpoint that is whole; of the newest, .*00000002.state\.json is damaged"
    with pytest.raises(UserError, match=message):
        newest_whole(tmp_path, said.append)
    assert not said
    assert names(tmp_path) == ["00000001", "00000002"]


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is away, say: nothing is set aside for that."""
    trained = build(3)
    for update in (1, 2):
        save(tmp_path, trained, update)

    def away(_: Path) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(record, "crc32", away)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read \(Input/output error\): see to its disk"):
        newest_whole(tmp_path, print)
    assert names(tmp_path) == ["00000001", "00000002"]


def test_a_checkpoint_of_a_later_format_is_not_called_damaged(tmp_path: Path) -> None:
    folder = save(tmp_path, build(3), 3)
    (folder / "state.json").write_text(changed_record(folder, format=3))
    with pytest.raises(UserError, match="has format 3 and not 2"):
        newest_whole(tmp_path, print)
    assert names(tmp_path) == ["00000003"]


# ---- format 1


def of_format_1(folder: Path, optimizer: Any, progress: Progress) -> None:
    """Make a checkpoint what the first version wrote."""
    torch.save(optimizer, folder / "optimizer.pt")
    values = {name: value for name, value in asdict(progress).items() if name not in ("skips", "skip_reason", "losses")}
    (folder / "progress.json").write_text(json.dumps({"format": 1, **values}) + "\n")
    for name in ("optimizer.safetensors", "state.json"):
        (folder / name).unlink()


def test_a_checkpoint_of_format_1_is_upgraded_in_place_bitwise(tmp_path: Path) -> None:
    model, optimizer = build(4)
    progress = replace(PROGRESS, update=4)
    folder = save(tmp_path, (model, optimizer), 4)
    of_format_1(folder, optimizer.state_dict(), progress)
    upgrade_checkpoint(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    other, fresh = build(seed=1)
    assert load_checkpoint(folder, other, fresh) == progress
    assert not differences(moment(other, fresh), moment(model, optimizer))
    before = contents(folder)
    upgrade_checkpoint(folder)
    assert contents(folder) == before


def test_a_checkpoint_of_format_1_runs_no_code_of_strangers(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "touched",))

    folder = save(tmp_path, build(), 3)
    of_format_1(folder, {"state": Evil()}, PROGRESS)
    before = contents(folder)
    with pytest.raises(UserError, match=r"progress\.json is damaged \(UnpicklingError of it or optimizer\.pt\)"):
        upgrade_checkpoint(folder)
    assert not (tmp_path / "touched").exists()
    assert contents(folder) == before
