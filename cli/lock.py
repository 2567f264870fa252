"""One process at a time trains a run: a lock on a file in its folder, which the kernel releases when the holder ends.

Linux holds it across machines on NFS too. Where a file system has no locks, that is said, and nobody is kept out.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .errors import UserError

LOCK = "lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Lock:
    """The lock of a run's folder, as it is held."""

    path: Path
    file: IO[str]

    def check(self) -> None:
        """Refuse to go on where the file that is held is not the one in the folder any more.

        Raises:
            UserError: the folder was removed, or another run has taken its place.
        """
        try:
            is_ours = os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except OSError:
            is_ours = False
        if not is_ours:
            raise UserError(
                f"{self.path} is not the one that this run holds: the folder, or the lock alone, was removed or "
                "replaced, and nothing more is written there"
            )


@contextmanager
def locked(folder: Path, said: Callable[[str], None]) -> Iterator[Lock]:
    """Hold the lock of a run's folder.

    Args:
        said: takes a sentence where there is no lock to be had.

    Raises:
        UserError: where another process holds it, or the folder cannot be written.
    """
    path = folder / LOCK
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    with file:
        _lock(file, folder, said)
        _sign(file)
        yield Lock(path, file)


def _lock(file: IO[str], folder: Path, said: Callable[[str], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read(200).strip() or "another one"
        raise UserError(f"{folder} is being trained by process {holder}: wait for it, or end it") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UserError(f"{folder / LOCK} cannot be locked: {error.strerror or error}") from error
        said(f"{folder} cannot be locked ({error.strerror}): see that no other process trains this run")


def _sign(file: IO[str]) -> None:
    """Write who holds the lock; a disk without room for that is found out later, where it matters."""
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
    except OSError:
        os.ftruncate(file.fileno(), 0)
