"""Proves how text is drawn from a model, from a folder to whole characters."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from relora_opt_cli.config import UserError
from relora_opt_cli.generate import find_export, generate, sample
from relora_opt_cli.model import Llama, LlamaConfig, init_weights
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

END, WINDOW = 256, 8
CONFIG = LlamaConfig(257, 16, 32, 1, 2, max_position_embeddings=WINDOW, eos_token_id=END)
OPTIONS: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.0, "top_k": 0, "seed": 0, "device": "cpu"}


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with a token a byte, whose id is the byte, and END."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    printable = [b for b in range(256) if chr(b) in alphabet]
    others = [b for b in range(256) if b not in printable]
    characters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=characters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an export of a small Llama with random weights."""
    return write_export(tmp_path / "model")


def write_export(folder: Path, config: LlamaConfig = CONFIG) -> Path:
    folder.mkdir(parents=True)
    model = Llama(config)
    init_weights(model, seed=0)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], list[list[int]]]:
    """Make models say given bytes and then END; return a list that collects what they are given to read."""

    def say(text: bytes) -> list[list[int]]:
        seen: list[list[int]] = []

        def forward(self: Llama, input_ids: Tensor) -> Tensor:
            token = text[len(seen)] if len(seen) < len(text) else END
            seen.append(input_ids[0].tolist())
            logits = torch.zeros(*input_ids.shape, CONFIG.vocab_size)
            logits[0, -1, token] = 10.0
            return logits

        monkeypatch.setattr(Llama, "forward", forward)
        return seen

    return say


def test_characters_that_span_tokens_come_whole(folder: Path, script: Callable[[bytes], Any]) -> None:
    text = "naïve 世界 🌍!"
    script(text.encode())
    assert list(generate(folder, "x", **OPTIONS | {"max_new_tokens": 100})) == list(text)


def test_bytes_that_are_no_text_do_not_hold_up_what_follows(folder: Path, script: Callable[[bytes], Any]) -> None:
    script(b"a\xff\x80b\xe4\xb8c")
    assert "".join(generate(folder, "x", **OPTIONS)) == "a\ufffd\ufffdb\ufffdc"


def test_half_a_character_at_the_end_is_dropped(folder: Path, script: Callable[[bytes], Any]) -> None:
    script("ab世".encode())
    assert "".join(generate(folder, "x", **OPTIONS | {"max_new_tokens": 4})) == "ab"


def test_it_stops_at_the_end_of_text_and_at_max_new_tokens(folder: Path, script: Callable[[bytes], Any]) -> None:
    seen = script(b"abc")
    assert "".join(generate(folder, "x", **OPTIONS)) == "abc"
    assert len(seen) == 4
    seen = script(b"abc")
    assert "".join(generate(folder, "x", **OPTIONS | {"max_new_tokens": 2})) == "ab"
    assert len(seen) == 2


def test_pieces_come_one_by_one(folder: Path, script: Callable[[bytes], Any]) -> None:
    seen = script(b"abc")
    assert next(generate(folder, "x", **OPTIONS)) == "a"
    assert len(seen) == 1


def test_an_empty_prompt_starts_from_the_end_of_text(folder: Path, script: Callable[[bytes], Any]) -> None:
    seen = script(b"abc")
    assert "".join(generate(folder, "", **OPTIONS)) == "abc"
    assert seen[0] == [END]


def test_an_empty_prompt_needs_an_end_of_text(tmp_path: Path) -> None:
    config = LlamaConfig(257, 16, 32, 1, 2)
    with pytest.raises(UserError, match="prompt='' needs a model with eos_token_id"):
        generate(write_export(tmp_path / "model", config), "", **OPTIONS)


def test_the_model_reads_a_sliding_window(folder: Path, script: Callable[[bytes], Any]) -> None:
    seen = script(b"0123456789")
    list(generate(folder, "abcdef", **OPTIONS))
    text = list(b"abcdef0123456789")
    assert seen == [text[max(0, end - WINDOW) : end] for end in range(6, 17)]


def test_greedy_text_is_the_argmax_of_the_model(folder: Path) -> None:
    model = Llama(CONFIG)
    init_weights(model, seed=0)
    ids = list(b"We the")
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids[-WINDOW:]]))[0, -1].argmax()))
    expected = byte_tokenizer().decode(ids).rstrip("\ufffd")
    text = "We the" + "".join(generate(folder, "We the", **OPTIONS | {"max_new_tokens": 6}))
    assert text == expected


def test_the_seed_decides_and_global_randomness_does_not(folder: Path) -> None:
    def text(seed: int) -> str:
        options = OPTIONS | {"temperature": 1.0, "seed": seed, "max_new_tokens": 40}
        return "".join(generate(folder, "x", **options))

    torch.manual_seed(1)
    first = text(3)
    torch.manual_seed(2)
    assert first == text(3) != text(4)


def draws(logits: list[float], *, temperature: float, top_k: int) -> Tensor:
    """Return how often each token came in 4,000 draws, as shares."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "generator": generator}
    tokens = torch.tensor([sample(torch.tensor(logits), **options) for _ in range(4000)])
    return torch.bincount(tokens, minlength=len(logits)) / 4000


@pytest.mark.parametrize(("temperature", "top_k"), list(itertools.product([0.5, 1.0, 2.0], [0, 2, 100])))
def test_draws_follow_the_tempered_softmax_over_the_top_k(temperature: float, top_k: int) -> None:
    logits = [0.0, 2.0, 1.0, -1.0]
    kept = torch.tensor(logits)
    if top_k == 2:
        kept[[0, 3]] = -torch.inf
    shares = draws(logits, temperature=temperature, top_k=top_k)
    # Three standard deviations of a share of 4,000 draws are at most 0.024.
    torch.testing.assert_close(shares, (kept / temperature).softmax(0), atol=0.024, rtol=0)
    assert (shares[kept == -torch.inf] == 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_no_temperature_and_nearly_none_take_the_likeliest(temperature: float) -> None:
    assert draws([0.0, 2.0, 1.0], temperature=temperature, top_k=0).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1 must be a number of at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"device": "abacus"}, r"device='abacus' cannot be used \(.*\): choose another"),
    ],
)
def test_bad_values_are_errors_at_once(folder: Path, option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(folder, "x", **OPTIONS | option)


def test_a_run_means_its_export(tmp_path: Path) -> None:
    export = write_export(tmp_path / "run" / "export")
    (tmp_path / "run" / "config.toml").touch()
    (tmp_path / "run" / "config.json").touch()
    assert find_export(tmp_path / "run") == export
    assert find_export(export) == export


def test_a_run_without_an_export_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(UserError, match=f"has no export yet: make one with relora-opt export {tmp_path} --out DIR"):
        find_export(tmp_path)


def test_folders_without_a_model_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        find_export(tmp_path)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        find_export(tmp_path / "nowhere")


def test_a_tokenizer_that_is_missing_torn_or_too_large_is_an_error(folder: Path) -> None:
    file = folder / "tokenizer.json"
    larger = byte_tokenizer()
    larger.add_tokens(["more"])
    larger.save(str(file))
    with pytest.raises(UserError, match="has 258 tokens, the model vocab_size=257"):
        generate(folder, "x", **OPTIONS)
    file.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a readable tokenizer"):
        generate(folder, "x", **OPTIONS)
    file.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        generate(folder, "x", **OPTIONS)


def test_a_diverged_model_is_an_error(folder: Path) -> None:
    model = Llama(CONFIG)
    save_file(
        {name: torch.full_like(W, torch.nan) for name, W in model.state_dict().items()}, folder / "model.safetensors"
    )
    with pytest.raises(UserError, match="logits are not finite"):
        list(generate(folder, "x", **OPTIONS))
