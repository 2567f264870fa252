"""Proves how text is made with a model: what it reads, that reading once is enough, and that characters come whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import CONFIG, WINDOW, small_model, write_export, write_run
from relora_opt_cli.errors import UserError
from relora_opt_cli.generate import Reader, generate
from relora_opt_cli.model import KeyValueCache, Llama
from relora_opt_cli.sampling import Sampling
from safetensors.torch import save_file
from tokenizer import END, byte_tokenizer
from torch import Tensor

GREEDY = Sampling(temperature=0)
WIDE = dataclasses.replace(CONFIG, max_position_embeddings=64, num_hidden_layers=2, num_key_value_heads=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an export of a small Llama with random weights."""
    return write_export(tmp_path / "model")


def text(folder: Path, prompt: str = "x", *, max_new_tokens: int = 20, sampling: Sampling = GREEDY) -> str:
    return "".join(generate(folder, prompt, max_new_tokens=max_new_tokens, sampling=sampling))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], list[list[int]]]:
    """Make models say given bytes and then END; return a list that collects what they are given to read."""

    def say(text: bytes) -> list[list[int]]:
        seen: list[list[int]] = []

        def next_token_logits(self: Llama, input_ids: Tensor, cache: KeyValueCache) -> Tensor:
            token = text[len(seen)] if len(seen) < len(text) else END
            cache.advance(input_ids.shape[1])
            seen.append(input_ids[0].tolist())
            return torch.nn.functional.one_hot(torch.tensor([token]), CONFIG.vocab_size) * 10.0

        monkeypatch.setattr(Llama, "next_token_logits", next_token_logits)
        return seen

    return say


def test_characters_that_span_tokens_come_whole(folder: Path, script: Callable[[bytes], Any]) -> None:
    text = "naïve 世界 🌍!"
    script(text.encode())
    assert list(generate(folder, "x", sampling=GREEDY)) == list(text)


def test_bytes_that_are_no_text_do_not_hold_up_what_follows(folder: Path, script: Callable[[bytes], Any]) -> None:
    script(b"a\xff\x80b\xe4\xb8c")
    assert text(folder) == "a\ufffd\ufffdb\ufffdc"


def test_half_a_character_at_the_end_is_dropped(folder: Path, script: Callable[[bytes], Any]) -> None:
    script("ab世".encode())
    assert text(folder, max_new_tokens=4) == "ab"


def test_it_stops_at_the_end_of_text_and_at_max_new_tokens(folder: Path, script: Callable[[bytes], Any]) -> None:
    seen = script(b"abc")
    assert text(folder) == "abc"
    assert len(seen) == 4
    seen = script(b"abc")
    assert text(folder, max_new_tokens=2) == "ab"
    assert len(seen) == 2


def test_more_tokens_than_can_be_counted_are_as_many_as_come(folder: Path, script: Callable[[bytes], Any]) -> None:
    script(b"abc")
    assert text(folder, max_new_tokens=10**30) == "abc"


def test_pieces_come_one_by_one(folder: Path, script: Callable[[bytes], Any]) -> None:
    seen = script(b"abc")
    assert next(generate(folder, "x", sampling=GREEDY)) == "a"
    assert len(seen) == 1


def test_an_empty_prompt_starts_from_the_end_of_text(folder: Path, script: Callable[[bytes], Any]) -> None:
    seen = script(b"abc")
    assert text(folder, "") == "abc"
    assert seen[0] == [END]


def test_an_empty_prompt_needs_an_end_of_text(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "model", dataclasses.replace(CONFIG, eos_token_id=None))
    with pytest.raises(UserError, match="prompt='' needs a model with eos_token_id"):
        generate(folder, "")


def test_every_token_is_read_once_while_the_window_has_room(folder: Path, script: Callable[[bytes], Any]) -> None:
    seen = script(b"01234")
    text(folder, "abc")
    assert seen == [list(b"abc"), *([byte] for byte in b"01234")]


def test_past_the_window_the_newer_half_is_read_again(folder: Path, script: Callable[[bytes], Any]) -> None:
    assert WINDOW == 8
    seen = script(b"0123456789")
    text(folder, "abcdef")
    assert b" ".join(map(bytes, seen)) == b"abcdef 0 1 f012 3 4 5 6 4567 8 9"


def test_of_a_prompt_longer_than_the_window_the_end_is_read(folder: Path, script: Callable[[bytes], Any]) -> None:
    seen = script(b"01")
    text(folder, "abcdefghijkl")
    assert [bytes(read) for read in seen] == [b"efghijkl", b"jkl0", b"1"]


def test_a_window_of_one_token_is_enough(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "model", dataclasses.replace(CONFIG, max_position_embeddings=1))
    model, ids = small_model(), list(b"a")
    while len(ids) < 6:
        ids.append(int(model(torch.tensor([ids[-1:]]))[0, -1].argmax()))
    assert text(folder, "a", max_new_tokens=5) == byte_tokenizer().decode(ids).rstrip("\ufffd")[1:]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prompt_length", [1, 5, 8, 13])
@torch.no_grad()
def test_logits_are_those_of_reading_the_window_anew(seed: int, prompt_length: int) -> None:
    model = small_model(dataclasses.replace(CONFIG, num_hidden_layers=2), seed=seed).double()
    ids = torch.randint(256, (30,), generator=torch.Generator().manual_seed(seed)).tolist()
    reader = Reader(model, most=len(ids))
    starts = []
    for end in range(prompt_length, len(ids) + 1):
        read = reader.read(ids[:end])
        starts.append(reader.start)
        assert 0 < end - reader.start <= WINDOW
        # float32's rounding, in which logits are handed out
        torch.testing.assert_close(read, model(torch.tensor([ids[reader.start : end]]))[0, -1].float())
    assert len(set(starts)) > 4


@pytest.mark.parametrize("prompt", ["We the people", "a", "Tell me, O muse"])
def test_greedy_tokens_are_those_of_transformers(prompt: str, tmp_path: Path) -> None:
    folder = write_export(tmp_path / "model", WIDE)
    other = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([list(prompt.encode())])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    theirs = other.generate(ids, **options)
    assert len(set(theirs[0].tolist())) > 15  # a text that repeats itself would prove little
    expected = byte_tokenizer().decode(theirs[0].tolist()).rstrip("\ufffd")
    assert prompt + text(folder, prompt, max_new_tokens=40) == expected


def test_the_seed_decides_and_global_randomness_does_not(folder: Path) -> None:
    def drawn(seed: int) -> str:
        return text(folder, max_new_tokens=40, sampling=Sampling(temperature=1.0, seed=seed))

    torch.manual_seed(1)
    first = drawn(3)
    torch.manual_seed(2)
    assert first == drawn(3) != drawn(4)


def test_a_run_needs_no_export(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    expected = text(run / "export")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (run / "export" / name).unlink()
    assert text(run) == expected != ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"device": "abacus"}, "device='abacus' is not to be had here"),
        ({"prompt": "na\udcffve"}, r"prompt='na\\udcffve' is not Unicode text"),
    ],
)
def test_bad_values_are_errors_at_once(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(**{"folder": folder, "prompt": "x"} | options)


def test_a_diverged_model_is_an_error(folder: Path) -> None:
    weights = {name: torch.full_like(W, torch.nan) for name, W in small_model().state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="logits are not finite"):
        text(folder)
