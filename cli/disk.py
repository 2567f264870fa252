"""Writing such that a kill, a full disk or a power cut leaves the old or the new, never half of either.

What is new is written beside its place, flushed to the disk, and moved into place, which is one step of the file
system's. Names that begin with a dot are of things that are not in their place: the next write removes what a killed
one has left.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 1 << 20
_PARTIAL, _REMOVED = ".partial", ".removed"


def write_file(path: Path, data: bytes) -> None:
    """Write a file, or replace it.

    Raises:
        OSError: where the disk refuses; the old file stays.
    """
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        with partial.open("wb", buffering=0) as file:
            view = memoryview(data)
            while view:  # a disk that runs full takes a part, and refuses the rest
                view = view[file.write(view) or 0 :]
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder beside its place, to be filled with flushed files; it takes its place when all went well.

    Raises:
        OSError: where the disk refuses; nothing is left.
    """
    if not folder.parent.exists():
        folder.parent.mkdir()
        flush_folder(folder.parent.parent)
    partial = partial_of(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        flush_folder(partial)
        os.replace(partial, folder)
        flush_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_of(folder: Path) -> Path:
    """Return where `new_folder` fills a folder."""
    return folder.with_name(f".{folder.name}{_PARTIAL}")


def remove_folder(folder: Path) -> None:
    """Remove a folder: it has left its place before the first of its files is gone."""
    removed = folder.with_name(f".{folder.name}{_REMOVED}")
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(folder, removed)
    shutil.rmtree(removed)


def sweep(parent: Path) -> None:
    """Remove what killed processes have left halfway in a folder."""
    for ending in (_PARTIAL, _REMOVED):
        for left in parent.glob(f".*{ending}"):
            shutil.rmtree(left, ignore_errors=True)


def flushed(path: Path) -> tuple[int, int]:
    """Flush a file to the disk, and return its size in bytes and its CRC-32."""
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
    return path.stat().st_size, crc32(path)


def flush_folder(folder: Path) -> None:
    """Flush a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> int:
    """Return a file's CRC-32: for accidents, at a quarter of the time of SHA-256."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value
