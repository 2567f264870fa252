"""Writing a store, from where it was left.

Pieces are appended. Every few seconds both streams are flushed to the disk, and then the journal says so. Whoever was
stopped in between cuts the streams back to what the journal says, and goes on from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .disk import flush_folder, write_file
from .encoding import Encoded, chained
from .journal import JOURNAL, Entry, append_entry, begin_journal, key_of_journal, last_entry
from .store import (
    FORMAT,
    MANIFEST,
    SIDES,
    TOKENIZER,
    DamagedError,
    Manifest,
    blocks,
    id_dtype,
    is_store,
    key_of_store,
)

_SECONDS = 5.0  # between two lines of the journal


class StoreWriter:
    """Writes a store, from where it was left.

    Use as a context manager: whatever ends it early, what was appended is kept.

    Args:
        folder: must be there; what it holds of another store is removed.
        key: digest of everything that decides the streams.
        tokenizer: the contents of tokenizer.json.

    Raises:
        OSError: where the disk refuses.
    """

    def __init__(self, folder: Path, key: str, tokenizer: str, *, vocab_size: int) -> None:
        self._folder, self._key, self._tokenizer, self._vocab_size = folder, key, tokenizer, vocab_size
        self._dtype = id_dtype(vocab_size)
        self._flushed = time.monotonic()
        self._is_between_pieces = True
        self._files: dict[str, BinaryIO] = {}
        self._hashes = {side: hashlib.sha256() for side in SIDES}
        self._entry = Entry()
        if not self._continue():
            self.begin_anew()

    @property
    def num_pieces(self) -> int:
        return self._entry.num_pieces

    @property
    def chain(self) -> str:
        """The digest of all pieces that were appended."""
        return self._entry.chain

    def append(self, encoded: Encoded) -> None:
        """Append a piece."""
        self._is_between_pieces, entry = False, self._entry
        for side in SIDES:
            raw = encoded.ids[side].astype(self._dtype, casting="safe", copy=False).tobytes()
            self._files[side].write(raw)
            self._hashes[side].update(raw)
            entry.sizes[side] += len(raw)
            entry.num_documents[side] += encoded.num_documents[side]
            entry.num_bytes[side] += encoded.num_bytes[side]
        entry.num_pieces, entry.chain = entry.num_pieces + 1, chained(entry.chain, encoded.piece.digest)
        self._is_between_pieces = True
        if time.monotonic() - self._flushed >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Put all that was appended on the disk, and say so in the journal."""
        for side, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            self._entry.digests[side] = self._hashes[side].hexdigest()
        append_entry(self._folder, self._entry)
        self._flushed = time.monotonic()

    def finish(self) -> None:
        """Write the manifest: the store is whole."""
        self.flush()
        write_file(self._folder / MANIFEST, self._manifest().to_json().encode())
        for side in SIDES:
            self._stream(side).chmod(0o444)  # a run that has mapped it would not survive a change
        (self._folder / JOURNAL).unlink()
        flush_folder(self._folder)

    def begin_anew(self) -> None:
        """Begin with nothing. Files are removed and not cut: a run may have mapped the old ones."""
        self._close()
        for name in (MANIFEST, JOURNAL, TOKENIZER, *(f"{side}.bin" for side in SIDES)):
            (self._folder / name).unlink(missing_ok=True)
        write_file(self._folder / TOKENIZER, self._tokenizer.encode())
        begin_journal(self._folder, self._key)
        self._files = {side: self._stream(side).open("xb") for side in SIDES}
        self._hashes = {side: hashlib.sha256() for side in SIDES}
        self._entry = Entry()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            if self._is_between_pieces and not is_store(self._folder):
                self.flush()
        self._close()

    def _continue(self) -> bool:
        """Go on from the journal's last entry; False where there is none, or the streams do not bear it out."""
        entry = last_entry(self._folder, self._key)
        try:
            hashes = {side: self._hashed(side, entry.sizes[side]) for side in SIDES} if entry else {}
        except (OSError, DamagedError):
            return False
        if entry is None or any(hashes[side].hexdigest() != entry.digests[side] for side in SIDES):
            return False
        self._files = {side: self._stream(side).open("r+b") for side in SIDES}
        for side, file in self._files.items():
            file.truncate(entry.sizes[side])
            file.seek(entry.sizes[side])
        begin_journal(self._folder, self._key, entry)  # without half a line at its end
        self._entry, self._hashes = entry, hashes
        return True

    def _manifest(self) -> Manifest:
        entry, whole = self._entry, self._hashes["train"].copy()
        with self._stream("val").open("rb") as file:
            for raw in blocks(file, entry.sizes["val"]):
                whole.update(raw)
        return Manifest(
            format=FORMAT,
            key=self._key,
            fingerprint=whole.hexdigest(),
            tokenizer=hashlib.sha256(self._tokenizer.encode()).hexdigest(),
            vocab_size=self._vocab_size,
            num_train=entry.sizes["train"] // self._dtype.itemsize,
            num_val=entry.sizes["val"] // self._dtype.itemsize,
            num_train_documents=entry.num_documents["train"],
            num_val_documents=entry.num_documents["val"],
            num_train_bytes=entry.num_bytes["train"],
            num_val_bytes=entry.num_bytes["val"],
        )

    def _hashed(self, side: str, size: int) -> hashlib._Hash:
        whole = hashlib.sha256()
        with self._stream(side).open("rb") as file:
            for raw in blocks(file, size):
                whole.update(raw)
        return whole

    def _stream(self, side: str) -> Path:
        return self._folder / f"{side}.bin"

    def _close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):
                file.close()


def key_of(folder: Path) -> str | None:
    """Return the key of the store that is written, or was, to a folder; None where none is."""
    return key_of_store(folder) or key_of_journal(folder)


@contextmanager
def locked(folder: Path, *, waiting: Callable[[], None]) -> Iterator[None]:
    """Be the only process that writes to a folder; `waiting` is called where another one does.

    Raises:
        OSError: where the folder cannot be made, or locks are not to be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a store whose writing was stopped, or goes on."""
    names = (JOURNAL, *(f"{side}.bin" for side in SIDES))
    has_all = all(os.path.isfile(folder / name) for name in names)
    return has_all and not is_store(folder) and key_of_journal(folder) is not None
