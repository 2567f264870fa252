"""Text from a trained model, a piece at a time.

Every token is drawn from softmax(logits / temperature) over the top_k likeliest tokens; temperature 0 takes the
likeliest. There is no key-value cache: each token costs a forward pass over at most the last `max_position_embeddings`
tokens, and what is older is cut off (a sliding window, whose first token is at position 0 again).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .config import UserError
from .model import Llama, load_config, load_weights


def generate(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    device: str,
) -> Iterator[str]:
    """Return an iterator over the pieces of the text that continues a prompt; the prompt itself is not among them.

    It stops at the model's end of text. Pieces are whole characters: one that spans tokens comes with its last token.

    Args:
        folder: an export, any Hugging Face Llama with a tokenizer.json, or a run folder that has its export/.
        prompt: the text to go on from; empty starts a new text, after the end-of-text token.
        max_new_tokens: tokens to generate at most, at least 1.
        temperature: at least 0; 0 is greedy.
        top_k: choose among that many tokens; 0 means all.
        seed: of the draws, which are made on the CPU: the same on every device.
        device: where the model runs, such as "cpu" or "cuda".

    Raises:
        UserError: a value out of range, or a folder without a model; before the first piece.
    """
    _check(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    model, tokenizer = _load(find_export(folder), device=device)
    ids = _prompt_ids(prompt, tokenizer, model)
    generator = torch.Generator().manual_seed(seed)
    tokens = _tokens(model, ids, temperature=temperature, top_k=top_k, generator=generator)
    return _pieces(tokens, ids, tokenizer, max_new_tokens=max_new_tokens)


def find_export(folder: Path) -> Path:
    """Return the folder itself where it holds a model's weights, or the export/ of a run.

    Raises:
        UserError: neither; for a run without an export, with the command that makes one.
    """
    for candidate in (folder, folder / "export"):
        if any((candidate / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
            return candidate
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give an export or a run")
    if (folder / "config.toml").is_file():
        raise UserError(f"run {folder} has no export yet: make one with relora-opt export {folder} --out DIR")
    raise UserError(f"{folder} holds no model.safetensors: give an export, or a run folder")


def sample(logits: Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Return a token drawn from softmax(logits / temperature) over the top_k likeliest.

    Args:
        logits: (vocab,), finite, on the generator's device.
        temperature: at least 0; 0 takes the likeliest token.
        top_k: 0, or more than there are, means all.
        generator: the only source of randomness.
    """
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.double().topk(min(top_k or len(logits), len(logits)))
    # Relative to the largest, so that a tiny temperature gives -inf and not nan.
    shares = ((values - values[0]) / temperature).softmax(0)
    return int(tokens[torch.multinomial(shares, 1, generator=generator)])


def _check(*, max_new_tokens: int, temperature: float, top_k: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature={temperature} must be a number of at least 0: 0 takes the likeliest token")
    if top_k < 0:
        raise UserError(f"top_k={top_k} must be at least 0: 0 means all tokens")


def _load(folder: Path, *, device: str) -> tuple[Llama, Tokenizer]:
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise UserError(f"{tokenizer_file} does not exist: export the model again, or copy its tokenizer there")
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"{tokenizer_file} is not a readable tokenizer ({error}): export the model again") from error
    model = Llama(load_config(folder / "config.json"))
    load_weights(model, folder)
    size, vocab_size = tokenizer.get_vocab_size(), model.config.vocab_size
    if size > vocab_size:
        raise UserError(f"{tokenizer_file} has {size} tokens, the model vocab_size={vocab_size}: use the model's own")
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise UserError(f"device={device!r} cannot be used ({str(error).splitlines()[0]}): choose another") from error


def _ends(model: Llama) -> tuple[int, ...]:
    end = model.config.eos_token_id
    return end if isinstance(end, tuple) else () if end is None else (end,)


def _prompt_ids(prompt: str, tokenizer: Tokenizer, model: Llama) -> list[int]:
    ids: list[int] = tokenizer.encode(prompt).ids
    if not ids:
        ids = list(_ends(model)[:1])
    if not ids:
        raise UserError("prompt='' needs a model with eos_token_id in its config.json: give a prompt")
    return ids


def _tokens(
    model: Llama, ids: list[int], *, temperature: float, top_k: int, generator: torch.Generator
) -> Iterator[int]:
    """Yield token after token, until the end of text, which is not yielded."""
    window, device = model.config.max_position_embeddings, model.lm_head.weight.device
    ids = list(ids)
    while True:
        with torch.inference_mode():
            logits = model(torch.tensor([ids[-window:]], device=device))[0, -1].float().cpu()
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: its training diverged, use an earlier checkpoint")
        token = sample(logits, temperature=temperature, top_k=top_k, generator=generator)
        if token in _ends(model):
            return
        ids.append(token)
        yield token


def _pieces(tokens: Iterator[int], ids: list[int], tokenizer: Tokenizer, *, max_new_tokens: int) -> Iterator[str]:
    """Yield the text of the tokens as soon as its characters are whole.

    Bytes that are no whole character yet decode to U+FFFD at the end: they wait. What still waits at the end is half a
    character, and is dropped. The prompt is decoded along, because some decoders strip a text's first space.
    """
    ids = list(ids)
    num_shown = len(tokenizer.decode(ids))
    for token in islice(tokens, max_new_tokens):
        ids.append(token)
        text = tokenizer.decode(ids).rstrip("\ufffd")
        if len(text) > num_shown:
            yield text[num_shown:]
            num_shown = len(text)
