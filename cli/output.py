"""Text on the standard output, as it comes: in any encoding, whoever stops reading, whatever breaks in between.

streamed_output    of commands whose text is what they are for: without a reader they end
enduring_output    of commands that work for days and say how it goes: without a reader they work on
forgiving_output   of all commands: no character ends them
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError


@contextmanager
def streamed_output() -> Iterator[Callable[[str], None]]:
    """Lend a function that shows text at once; end the line when all is written, or what comes in between ends it.

    What the output's encoding lacks is shown as "?". A reader that goes away (`| head`) ends the program quietly, as a
    closed pipe ends others, with status 1.

    Raises:
        UserError: where the output refuses, such as a full disk.
    """
    if sys.stdout is None:
        raise UserError("the standard output is closed: open it, or send it to a file")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            yield _write
        finally:
            _write("\n")
    except OSError as error:
        _forget_output()
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from error
        raise UserError(f"the text cannot be written: {error.strerror or error}") from error


def quoted(path: Path) -> str:
    """Return a path as a shell takes it, for commands that are printed to be copied."""
    return shlex.quote(str(path))


def forgiving_output() -> None:
    """Show what the standard output's encoding lacks, in a path say, as "?": nothing ends for that."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def enduring_output() -> Iterator[None]:
    """Work on where nobody can be told: what neither output takes (no reader, no terminal, no room) is dropped."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _enduring(sys.stdout), _enduring(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _EnduringFile(io.FileIO):
    def write(self, raw: Any) -> int:
        try:
            count: int | None = super().write(raw)
        except OSError:
            count = None
        return memoryview(raw).nbytes if count is None else count  # None: it would block, as after a stop of the reader


def _enduring(stream: Any) -> Any:
    """Return a stream that writes where another does, and never raises OSError; one without a file is itself."""
    try:
        file = _EnduringFile(stream.fileno(), "w", closefd=False)
    except (AttributeError, OSError, ValueError):
        return stream
    return io.TextIOWrapper(io.BufferedWriter(file), stream.encoding, stream.errors, line_buffering=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _forget_output() -> None:
    """Keep what could not be written from being tried again, and complained of, when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
