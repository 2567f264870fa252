"""One path stands for one model: a run for its newest checkpoint, any other folder for what lies in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import CONFIG, small_model, write_export, write_run
from relora_opt_cli.errors import UserError
from relora_opt_cli.place import find_trained
from relora_opt_cli.trained import load_trained
from tokenizer import byte_tokenizer


def seed_of(folder: Path) -> int:
    """Return the seed that drew the weights of the model that a folder stands for."""
    found = load_trained(folder, device="cpu").model.lm_head.weight
    return next(seed for seed in range(5) if torch.equal(found, small_model(seed=seed).lm_head.weight))


def test_a_run_means_its_newest_checkpoint_and_not_its_export(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", checkpoints=3)
    shutil.rmtree(run / "export")
    write_export(run / "export", seed=4)
    assert seed_of(run) == 2
    assert seed_of(run / "export") == 4
    assert find_trained(run).run == run


def test_a_checkpoint_means_itself_with_the_shape_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", checkpoints=3)
    assert seed_of(run / "checkpoints" / "00000100") == 1
    monkeypatch.chdir(run / "checkpoints" / "00000000")
    assert seed_of(Path()) == 0
    assert find_trained(Path()).run == run


def test_a_run_that_lost_its_checkpoints_means_its_export(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert seed_of(run) == 1
    shutil.rmtree(run / "export")
    with pytest.raises(UserError, match=r"run .*run has no checkpoint yet"):
        find_trained(run)


def test_shards_are_a_model_too(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": dict.fromkeys(small_model().state_dict(), "one.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert seed_of(folder) == 0


def test_folders_without_a_model_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        find_trained(tmp_path)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        find_trained(tmp_path / "nowhere")


def test_a_tokenizer_that_is_missing_torn_or_too_large_is_an_error(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "model")
    file = folder / "tokenizer.json"
    larger = byte_tokenizer()
    larger.add_tokens(["more"])
    larger.save(str(file))
    with pytest.raises(UserError, match="has 258 tokens, the model vocab_size=257"):
        load_trained(folder, device="cpu")
    file.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer=.*tokenizer\.json' cannot be read"):
        load_trained(folder, device="cpu")
    file.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist: copy"):
        load_trained(folder, device="cpu")


def test_a_device_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"device='abacus' is not to be had here: "):
        load_trained(write_export(tmp_path / "model"), device="abacus")


def test_the_model_is_ready_to_be_asked(tmp_path: Path) -> None:
    trained = load_trained(write_export(tmp_path / "model"), device="cpu")
    assert not trained.model.training
    assert trained.ends == (CONFIG.eos_token_id,)
