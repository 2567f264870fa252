"""Text on the standard output, as it comes: in any encoding, whoever stops reading, whatever breaks in between."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .config import UserError


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


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _forget_output() -> None:
    """Keep what could not be written from being tried again, and complained of, when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
