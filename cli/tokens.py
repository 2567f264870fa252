"""Text to tokens: the tokenizer, the packed stream of token ids, and the cache of both.

A stream is every document's tokens followed by end-of-text, one document after another, in one array. Special tokens
spelled out in a document are ordinary text: only packing writes an end-of-text.

The cache is keyed by what goes in (texts, vocabulary size, the tokenizer's contents, a format number), so a changed
text or tokenizer finds nothing. Entries appear whole or not at all and carry a checksum, and whatever is wrong
with an entry, or with the cache's folder, means building again and never an error.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .config import UserError

Stream = npt.NDArray[np.integer[Any]]
END_OF_TEXT = "<|endoftext|>"
_FOREIGN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")
_FORMAT = "1"
_GROUP = 1 << 22  # characters encoded at a time: encodings take some hundred bytes a token until they are arrays


def fit_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with the one special token `END_OF_TEXT`.

    Any text can be encoded and decodes to itself. Short texts may give fewer than `vocab_size` tokens:
    `vocabulary_size` tells.

    >>> tokenizer = fit_tokenizer(["to be or not to be"], vocab_size=300)
    >>> tokenizer.decode(tokenizer.encode("be or not").ids)
    'be or not'
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(f"vocab_size={vocab_size} must be at least {len(alphabet) + 1}: every byte and the end of text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.json, without its padding and truncation. Raises UserError for anything else."""
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"tokenizer={str(path)!r} does not exist: give a tokenizer.json") from error
    except Exception as error:  # tokenizers raises bare Exception for what it cannot parse
        raise UserError(f"tokenizer={str(path)!r} cannot be read ({error}): give a tokenizer.json") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends a document. Raises UserError when the tokenizer has none that we know."""
    for token in _FOREIGN_ENDS:
        found: int | None = tokenizer.token_to_id(token)
        if found is not None:
            return found
    raise UserError(f"tokenizer has none of {', '.join(_FOREIGN_ENDS)}: add one of them as its end-of-text token")


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return one more than the largest id, which exceeds the number of tokens where ids have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def encode_stream(texts: Iterable[str], tokenizer: Tokenizer) -> Stream:
    """Pack all texts, each followed by end-of-text, as uint16 where the vocabulary fits and as int32 otherwise."""
    return np.concatenate(_encode_documents(texts, tokenizer))


def cached_tokenizer(texts: list[str], *, vocab_size: int, folder: Path | None) -> Tokenizer:
    """Return `fit_tokenizer`'s answer, from the cache in `folder` where it is there. None: no cache."""
    if folder is None:
        return fit_tokenizer(texts, vocab_size=vocab_size)
    path = folder / f"tokenizer-{fingerprint([_FORMAT, tokenizers.__version__, str(vocab_size), *texts])}"
    cached = _load_tokenizer(path)
    if cached is not None:
        return cached
    tokenizer = fit_tokenizer(texts, vocab_size=vocab_size)
    contents = tokenizer.to_str()
    _publish(path, lambda new: new.write_text(f"{fingerprint([contents])}\n{contents}", encoding="utf-8"))
    return tokenizer


def cached_stream(texts: list[str], tokenizer: Tokenizer, *, folder: Path | None) -> Stream:
    """Return `encode_stream`'s answer, from the cache in `folder` where it is there. None: no cache."""
    if folder is None:
        return encode_stream(texts, tokenizer)
    path = folder / f"stream-{fingerprint([_FORMAT, tokenizer.to_str(), *texts])}"
    cached = _load_stream(path) if path.exists() else None
    if cached is not None:
        return cached
    documents = _encode_documents(texts, tokenizer)
    stream = np.concatenate(documents)
    _publish(path, lambda new: _save_stream(new, documents, checksum=_checksum(stream)))
    return stream


def default_cache_folder() -> Path | None:
    """Return $XDG_CACHE_HOME/relora-opt or ~/.cache/relora-opt, or None where neither is an absolute path."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return root / "relora-opt" if root.is_absolute() else None


def fingerprint(parts: Iterable[str]) -> str:
    """Return a hexadecimal digest of the parts, their order and their boundaries."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part.encode()).digest())
    return whole.hexdigest()


@contextmanager
def quiet_datasets() -> Iterator[Any]:
    """Import `datasets`, which takes half a second, and lend it without its progress bars, logs and warnings."""
    import datasets

    had_bars = not datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield datasets
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def _encode_documents(texts: Iterable[str], tokenizer: Tokenizer) -> list[Stream]:
    end = end_of_text_id(tokenizer)
    dtype = np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.int32
    documents: list[Stream] = []
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True  # a document that spells a special token does not get to write one
    try:
        for group in _groups(texts):
            encodings = tokenizer.encode_batch_fast(group, add_special_tokens=False)
            documents += [np.array([*encoding.ids, end], dtype=dtype) for encoding in encodings]
    finally:
        tokenizer.encode_special_tokens = before
    return documents


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _checksum(stream: Stream) -> str:
    return hashlib.sha256(stream.tobytes()).hexdigest()


def _load_tokenizer(path: Path) -> Tokenizer | None:
    try:
        checksum, _, contents = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return Tokenizer.from_str(contents) if checksum == fingerprint([contents]) else None


def _save_stream(path: Path, documents: list[Stream], *, checksum: str) -> None:
    """Write one row a document."""
    with quiet_datasets() as datasets:
        kind = datasets.Features({"ids": datasets.Sequence(datasets.Value(str(documents[0].dtype)))})
        dataset = datasets.Dataset.from_dict({"ids": documents}, features=kind)
        dataset.info.description = checksum
        dataset.save_to_disk(str(path))


def _load_stream(path: Path) -> Stream | None:
    try:
        with quiet_datasets() as datasets:
            dataset = datasets.load_from_disk(str(path))
            rows = dataset.with_format("arrow")[:].column("ids")
            stream = np.concatenate([chunk.flatten().to_numpy() for chunk in rows.chunks])
            return stream if dataset.info.description == _checksum(stream) else None
    except Exception:  # a damaged entry fails in any way it likes, and the remedy is always to build it again
        return None


def _publish(path: Path, write: Callable[[Path], object]) -> None:
    """Put what `write` makes at `path`, whole or not at all. An unwritable cache is no cache."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as scratch:
            new = Path(scratch) / "new"
            write(new)
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(new, path)
