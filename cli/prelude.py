"""The second in which a command imports what it needs, before its work begins: Ctrl-C ends it at once, and quietly.

A KeyboardInterrupt would be a traceback there, or be lost in a compiled module that is being imported.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def prelude() -> Iterator[None]:
    """End the process at Ctrl-C, with its status, until `work_begins`; where SIGINT is ignored, it stays so."""
    before = signal.getsignal(signal.SIGINT)
    is_usual = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if is_usual:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        if is_usual:
            signal.signal(signal.SIGINT, before)


def work_begins() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, for what has something to put in order."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    os._exit(128 + signal.SIGINT)
