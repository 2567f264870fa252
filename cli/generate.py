"""Text from a trained model, a piece at a time.

The model reads the prompt once and then every token once: keys and values of what was read are kept. It sees at most
`max_position_embeddings` tokens, its window: of a longer prompt the last ones. When a text outgrows the window, the
older half of it is forgotten and the newer half read again, from position 0, so that a token costs the same on average
however long the text is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError
from .model import KeyValueCache, Llama
from .sampling import Sampling
from .trained import Trained, load_trained


def generate(
    folder: Path, prompt: str, *, max_new_tokens: int = 100, sampling: Sampling | None = None, device: str = "auto"
) -> Iterator[str]:
    """Return an iterator over the pieces of the text that continues a prompt; the prompt itself is not among them.

    It stops at the model's end of text. Pieces are whole characters: one that spans tokens comes with its last token.

    Args:
        folder: a run, an export, a checkpoint, or any Hugging Face Llama with a tokenizer.json: see trained.py.
        prompt: the text to go on from; empty starts a new text, after the end-of-text token. Special tokens that it
            spells out are read as such.
        max_new_tokens: tokens to generate at most, at least 1.
        sampling: how they are drawn; None is `Sampling()`.
        device: where the model runs, such as "cpu" or "cuda"; "auto" takes an accelerator where there is one.

    Raises:
        UserError: a value out of range, or a folder without a model; before the first piece.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    trained = load_trained(folder, device=device)
    ids = _prompt_ids(prompt, trained)
    reader = Reader(trained.model, most=len(ids) + max_new_tokens)
    tokens = _tokens(trained, ids, reader, sampling or Sampling())
    return _pieces(islice(tokens, min(max_new_tokens, sys.maxsize)), ids, trained)


class Reader:
    """A model that reads a text which grows at its end, to at most `most` tokens.

    `start` is the token that the model's window begins with.
    """

    def __init__(self, model: Llama, *, most: int) -> None:
        self._model = model
        self._window = model.config.max_position_embeddings
        self._capacity = min(most, self._window)
        self._forget(0)

    def _forget(self, start: int) -> None:
        """Let the text begin at token `start`: what was read is of no use then, every token has another position."""
        self.start = start
        self._cache = KeyValueCache(self._model.config, capacity=self._capacity)

    @torch.inference_mode()
    def read(self, ids: list[int]) -> Tensor:
        """Return the logits (vocab,) of the token after `ids`, a text that begins with the one of the last call.

        Raises:
            UserError: where they are not finite.
        """
        if len(ids) - self.start > self._window:
            is_prompt = self._cache.length == 0
            self._forget(len(ids) - (self._window if is_prompt else max(1, self._window // 2)))
        new = torch.tensor([ids[self.start + self._cache.length :]], device=self._model.lm_head.weight.device)
        logits = self._model.next_token_logits(new, self._cache)[0].float().cpu()
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: its training diverged, use an earlier checkpoint")
        return logits


def _prompt_ids(prompt: str, trained: Trained) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no text in its encoding
        raise UserError(f"prompt={prompt!r} is not Unicode text ({error.reason}): correct it") from error
    ids: list[int] = trained.tokenizer.encode(prompt).ids or list(trained.ends[:1])
    if not ids:
        raise UserError(f"prompt={prompt!r} needs a model with eos_token_id in its config.json: give a prompt")
    return ids


def _tokens(trained: Trained, ids: list[int], reader: Reader, sampling: Sampling) -> Iterator[int]:
    """Yield token after token, until the end of text, which is not yielded."""
    ids, generator = list(ids), sampling.generator()
    while (token := sampling.draw(reader.read(ids), generator)) not in trained.ends:
        ids.append(token)
        yield token


def _pieces(tokens: Iterator[int], ids: list[int], trained: Trained) -> Iterator[str]:
    """Yield the text of the tokens as soon as its characters are whole.

    Bytes that are no whole character yet decode to U+FFFD at the end: they wait. What still waits at the end is half a
    character, and is dropped. The prompt is decoded along, because some decoders strip a text's first space.
    """
    ids, decode = list(ids), trained.tokenizer.decode
    num_shown = len(decode(ids))
    for token in tokens:
        ids.append(token)
        text = decode(ids).rstrip("\ufffd")
        if len(text) > num_shown:
            yield text[num_shown:]
            num_shown = len(text)
