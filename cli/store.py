"""A store: a tokenized corpus in a folder, two streams of token ids that are memory-mapped.

    train.bin, val.bin   token ids, uint16 or uint32, little-endian, in one sequence each
    tokenizer.json       what made them
    corpus.json          what they are, and a digest of that: written last (store_writer.py), so that a folder with it
                         is whole

Opening one looks at every byte: a store is whole and unchanged, or it is refused. After that the files may be removed,
but must not be changed in place.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

import numpy as np
import numpy.typing as npt

from .errors import UserError

Stream = npt.NDArray[np.integer[Any]]
SIDES = ("train", "val")
TOKENIZER, MANIFEST = "tokenizer.json", "corpus.json"
FORMAT = 2
DIGEST = "digest"  # the name, in what is written as JSON, of a digest of everything else there
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Args:
        key: digest of text, tokenizer and settings.
        fingerprint: SHA-256 of both streams, the training one first.
        tokenizer: SHA-256 of tokenizer.json.
        vocab_size: one more than the largest id; ids are uint16 up to 65,536 and uint32 above.
        num_train, num_val: tokens.
        num_train_documents, num_val_documents: documents; of a document that was cut, each side counts its share.
        num_train_bytes, num_val_bytes: of their text, as UTF-8.
    """

    format: int
    key: str
    fingerprint: str
    tokenizer: str
    vocab_size: int
    num_train: int
    num_val: int
    num_train_documents: int
    num_val_documents: int
    num_train_bytes: int
    num_val_bytes: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return id_dtype(self.vocab_size)

    def to_json(self) -> str:
        """Return the contents of corpus.json."""
        content = asdict(self)
        return json.dumps({**content, DIGEST: digest_of(content)}, indent=2) + "\n"


class DamagedError(ValueError):
    """A store is not what it says it is."""


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of token ids: little-endian, as small as the vocabulary allows."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def is_store(folder: Path) -> bool:
    return os.path.isfile(folder / MANIFEST)


def open_store(folder: Path) -> tuple[Manifest, dict[str, Stream]]:
    """Return what a store holds, after a look at every byte: its manifest, and both streams, memory-mapped.

    Raises:
        DamagedError: where a file is missing, cut or changed.
    """
    manifest = _read_manifest(folder)
    whole = hashlib.sha256()
    try:
        for side, count in zip(SIDES, (manifest.num_train, manifest.num_val), strict=True):
            size, expected = (folder / f"{side}.bin").stat().st_size, count * manifest.dtype.itemsize
            if size != expected or not size:
                raise DamagedError(f"{side}.bin has {size} bytes and not {expected}")
            with (folder / f"{side}.bin").open("rb") as file:
                for raw in blocks(file, expected):
                    whole.update(raw)
                    if np.frombuffer(raw, manifest.dtype).max() >= manifest.vocab_size:
                        raise DamagedError(f"{side}.bin has ids that are not below vocab_size={manifest.vocab_size}")
        if whole.hexdigest() != manifest.fingerprint:
            raise DamagedError("train.bin or val.bin was changed")
        if hashlib.sha256((folder / TOKENIZER).read_bytes()).hexdigest() != manifest.tokenizer:
            raise DamagedError(f"{TOKENIZER} was changed")
        return manifest, {side: _mapped(folder / f"{side}.bin", manifest.dtype) for side in SIDES}
    except OSError as error:
        raise DamagedError(f"{error.filename}: {error.strerror}") from error


def check_mapped(stream: Stream) -> None:
    """Refuse to read a stream whose file was cut since: the system would end the process without a word."""
    file = stream.base.obj if isinstance(stream.base, memoryview) else None
    if isinstance(file, mmap.mmap) and file.size() < stream.nbytes:
        raise UserError(
            f"the file of the tokens was cut to {file.size()} of {stream.nbytes} bytes while the run read it: leave "
            "stores alone; to go on, --resume the run, which makes the tokens again"
        )


def _read_manifest(folder: Path) -> Manifest:
    try:
        content = dict(json.loads(_read_small(folder / MANIFEST)))
        if content.get("format") != FORMAT:
            raise DamagedError(f"{MANIFEST} has format={content.get('format')!r:.50} and not {FORMAT}")
        if content.pop(DIGEST, None) != digest_of(content):
            raise DamagedError(f"{MANIFEST} was changed")
        manifest = Manifest(**content)
    except DamagedError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST}: {error}") from error
    for name, kind in get_type_hints(Manifest).items():
        if type(getattr(manifest, name)) is not kind:
            raise DamagedError(f"{MANIFEST} has {name}={getattr(manifest, name)!r:.50}")
    return manifest


def digest_of(content: dict[str, Any]) -> str:
    """Return a digest of what JSON spells."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _mapped(path: Path, dtype: np.dtype[Any]) -> Stream:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def key_of_store(folder: Path) -> str | None:
    """Return the key of the store in a folder; None where none is."""
    with suppress(DamagedError):
        return _read_manifest(folder).key
    return None


def _read_small(path: Path) -> str:
    """Return what a small file says; nothing where there is none, or it is none of ours."""
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= _BLOCK else ""
    except (OSError, UnicodeDecodeError):
        return ""


def blocks(file: BinaryIO, count: int) -> Iterator[bytes]:
    """Yield the next `count` bytes of a file. Raises DamagedError where there are fewer."""
    while count > 0:
        raw = file.read(min(count, _BLOCK))
        if not raw:
            raise DamagedError(f"{file.name} was cut")
        yield raw
        count -= len(raw)
