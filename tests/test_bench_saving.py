"""bench/saving.py times what it says: the stall within the whole save, beside a copy of the same bytes."""

from pathlib import Path

import pytest
from relora_opt_cli.model import LlamaConfig

from bench import saving


def test_a_save_and_a_copy_of_its_bytes_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(saving.PRESETS, "5m", LlamaConfig(64, 32, 48, 1, 2, max_position_embeddings=16))
    monkeypatch.setitem(saving._RANKS, "5m", 4)
    row = saving.measure("5m", tmp_path, repeats=3)
    saved = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "00000003").iterdir())
    assert row.num_bytes == saved > 50_000
    assert 0 < row.stall[1] <= row.whole[1]
    assert row.ratio == row.stall[1] / row.copy[1]
    assert not (tmp_path / "copy").exists()
    assert f"{row.ratio:.2f}" in saving.table([row])
