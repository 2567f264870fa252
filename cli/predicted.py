"""The text that an evaluation predicts, and the sequences that it is cut into.

As in training, documents follow each other, each with its end of text. Every token is predicted once, ends of text
included: from those before it in its sequence, and the first of all from an end of text, as the first of every other
document is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .config import Config
from .corpus import Settings, encode_sources, gives_back, prepare
from .data import Batches
from .errors import UserError
from .export import TOKENIZER
from .pace import Pace
from .store import Stream, is_store
from .tokens import end_of_text_id

VALIDATION_SEQUENCES = 256  # that a run draws, once, from its held-out documents


@dataclass(frozen=True)
class Text:
    """Documents as one stream of tokens.

    Args:
        tokens: (n,), each document's and its end of text.
        end: the end-of-text token.
        num_documents: how many they are.
        num_bytes: of their text, as UTF-8; None where the tokens do not hold all of it.
        name: what to call them.
    """

    tokens: Stream
    end: int
    num_documents: int
    num_bytes: int | None
    name: str


def given_text(
    sources: Sequence[str], tokenizer: Tokenizer, *, text_field: str, ends: Sequence[int] = (), pace: Pace | None = None
) -> Text:
    """Return all documents of some sources.

    Args:
        ends: what the model ends its texts with.
        pace: says which files are not read.

    Raises:
        UserError: where they cannot be read.
    """
    for source in sources:
        if is_store(Path(source)):
            raise UserError(f"data={source!r} is a tokenized corpus, training texts included: give texts to evaluate")
    end = end_of_text_id(tokenizer, ends)
    tokens, num_documents, num_bytes = encode_sources(sources, tokenizer, text_field=text_field, end=end, pace=pace)
    is_whole = gives_back(sources, tokenizer, text_field=text_field)
    return Text(tokens, end, num_documents, num_bytes if is_whole else None, ", ".join(sources))


def held_out_text(run: Path, config: Config, *, fingerprint: str, pace: Pace | None = None) -> Text:
    """Return the documents that a run holds out.

    Args:
        run, config: its folder, and what it says.
        fingerprint: of the texts that the evaluated checkpoint was trained on.
        pace: shows how far reading and tokenizing is.

    Raises:
        UserError: where the texts cannot be read, or are others.
    """
    settings = Settings.of(config, tokenizer=run / TOKENIZER, allow_lossy=True)
    try:
        corpus = prepare(config.data, settings, seq_len=config.seq_len, pace=pace)
    except UserError as error:
        raise UserError(f"the texts of {run} cannot be had: {error}; or give others with --data") from error
    if not corpus.is_known_as(fingerprint):
        raise UserError(
            f"the texts are not those that {run} was trained on (data={list(config.data)}): restore them, or "
            "give --data"
        )
    num_bytes = None if config.allow_lossy else corpus.num_val_bytes
    return Text(corpus.val, corpus.eos_id, corpus.num_val_documents, num_bytes, f"held out by {run}")


def drawn_sequences(tokens: Stream, *, seq_len: int, num_sequences: int = VALIDATION_SEQUENCES) -> Tensor:
    """Return sequences (at most num_sequences, seq_len + 1) of a stream, always the same: a run's own."""
    count = min(Batches(tokens, seq_len=seq_len, batch_size=1).num_blocks, num_sequences)
    return Batches(tokens, seq_len=seq_len, batch_size=count).batch(0)


def all_sequences(text: Text, *, seq_len: int, batch_size: int) -> Iterator[Tensor]:
    """Yield batches (b, t + 1) that predict every token once; t is seq_len, but for the last one."""
    num_whole = len(text.tokens) // seq_len
    blocks = (_block(text, i * seq_len, seq_len) for i in range(num_whole))
    while batch := list(islice(blocks, batch_size)):
        yield torch.stack(batch)
    if len(text.tokens) % seq_len:
        yield _block(text, num_whole * seq_len, seq_len)[None]


def _block(text: Text, start: int, seq_len: int) -> Tensor:
    """Return the tokens from `start` on, at most seq_len of them, behind the one that precedes them."""
    before = text.tokens[start - 1] if start else text.end
    return torch.from_numpy(np.array([before, *text.tokens[start : start + seq_len]], dtype=np.int64))
