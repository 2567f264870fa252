"""bench/saving_shares.py weighs what it says: both ways write the checkpoint, and the first process gathers in one."""

from pathlib import Path

import pytest
from relora_opt_cli.checkpoint import damage_of, latest_checkpoint
from relora_opt_cli.model import LlamaConfig
from safetensors.torch import load_file

from bench import saving_shares


@pytest.mark.slow
def test_both_ways_save_the_same_and_gathering_takes_the_memory_of_all(tmp_path: Path) -> None:
    shape = LlamaConfig(8000, 512, 800, 1, 4, max_position_embeddings=16)  # 10 million parameters, 40 MB
    rows = {row.way: row for row in saving_shares.measure(shape, tmp_path, rank=32, size=2, repeats=2)}
    assert all(0 < row.stall <= row.whole for row in rows.values())
    saved = [latest_checkpoint(tmp_path / way) for way in rows]
    assert [damage_of(folder) for folder in saved] == [None, None]
    weights = [load_file(folder / "model.safetensors") for folder in saved]
    assert weights[0].keys() == weights[1].keys()
    assert rows["gathered"].memory[0] > max(rows["in shares"].memory)
    assert "in shares" in saving_shares.table(list(rows.values()))
