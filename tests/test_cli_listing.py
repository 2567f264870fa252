"""`relora-opt checkpoints RUN` says of every checkpoint what it is and whether it is whole."""

import io
import json
import re
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from relora_opt_cli import listing, train
from relora_opt_cli.checkpoint import checkpoints
from relora_opt_cli.errors import UserError
from relora_opt_cli.listing import list_checkpoints, print_checkpoints
from relora_opt_cli.record import read_record, write_record
from rich.console import Console
from tiny import rows
from tiny import train as run_tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr(train, "plot_runs", lambda *_: None)
        return run_tiny(tmp_path_factory.mktemp("finished"), save_every=6, keep=9)


def printed(run: Path, width: int = 100) -> list[str]:
    stream = io.StringIO()
    print_checkpoints(list_checkpoints(run), console=Console(file=stream, width=width))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_every_checkpoint_has_a_line_with_update_loss_size_and_state(finished: Path) -> None:
    lines = printed(finished)
    assert lines[0].split() == ["update", "val", "loss", "size", "state"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "6", "12", "18", "20"]
    assert all(line.endswith("whole") for line in lines[1:])
    last = list_checkpoints(finished)[-1]
    assert f"{last.val_loss:.4f}" in lines[-1]
    assert last.size == sum(path.stat().st_size for path in checkpoints(finished)[-1].iterdir())


def test_a_loss_that_was_measured_earlier_says_when(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, save_every=5, keep=9)
    loss = {row.update: f"{row.val_loss:.4f}" for row in rows(run) if row.val_loss is not None}
    found = [re.split("  +", line.strip())[1] for line in printed(run)[1:]]
    assert found == ["-", f"{loss[4]} at 4", f"{loss[6]} at 6", f"{loss[12]} at 12", loss[20]]


def test_a_loss_of_an_older_run_that_does_not_say_when_makes_no_claim(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    last = checkpoints(run)[-1]
    record = read_record(last)
    progress = {name: value for name, value in record.values["progress"].items() if name != "val_update"}
    write_record(last, replace(record, values={**record.values, "progress": progress}))
    assert f"{list_checkpoints(run)[-1].val_loss:.4f} at ?" in printed(run)[-1]


def test_a_damaged_one_says_what_is_wrong_with_it(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (checkpoints(run)[1] / "model.safetensors").write_bytes(b"")
    content = {"format": 7}
    content["crc32"] = zlib.crc32(json.dumps(content).encode())
    (checkpoints(run)[2] / "state.json").write_text(json.dumps(content))
    (checkpoints(run)[3] / "optimizer.safetensors").unlink()
    states = [line.damage for line in list_checkpoints(run)]
    assert states[0] is states[4] is None
    assert "model.safetensors is damaged (0 bytes where" in str(states[1])
    assert "has format 7 and not 2" in str(states[2])
    assert "optimizer.safetensors is damaged (No such file or directory)" in str(states[3])
    assert "whole" in printed(run, 60)[1]


@pytest.mark.parametrize("moment", ["checkpoints", "damage_of", "read_progress"])
def test_what_a_run_removes_meanwhile_is_left_out(
    moment: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    work, first = getattr(listing, moment), checkpoints(run)[0]

    def removing(path: Path) -> Any:
        result = work(path) if moment == "checkpoints" else None
        if path in (run, first):
            shutil.rmtree(first, ignore_errors=True)
        return result if moment == "checkpoints" else work(path)

    monkeypatch.setattr(listing, moment, removing)
    assert [line.update for line in list_checkpoints(run)] == [6, 12, 18, 20]


def test_what_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint: give the folder of a run that has saved one"):
        list_checkpoints(tmp_path)
