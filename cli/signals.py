"""SIGINT (Ctrl-C), SIGTERM, and SIGHUP (a terminal that is closed) while a run trains."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

from .parallel import World

_ORDER = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # the first that any process has received is the run's
_ECHO = 0.5  # seconds; a terminal's Ctrl-C reaches the processes of torchrun twice, from it and from torchrun


class Interrupts:
    """Turns the first signal into a request to stop after the update; a second Ctrl-C stops at once.

    SIGHUP stays ignored where `nohup` ignores it.

    Raises:
        KeyboardInterrupt: wherever the program is, at the second Ctrl-C.
    """

    def __init__(self, processes: World) -> None:
        self._processes = processes
        self._echo = _ECHO if processes.size > 1 else 0.0
        self._number = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            is_kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            caught = [number for number in _ORDER if not (is_kept and number == signal.SIGHUP)]
            self._before = {number: signal.signal(number, self._stop) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> int:
        """Return the signal that any process has received, the first of _ORDER; 0 for none: all must call."""
        counts = self._processes.sum(*(float(self._number == number) for number in _ORDER))
        return next((int(number) for number, count in zip(_ORDER, counts, strict=True) if count), 0)

    def _stop(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self._number and number == signal.SIGINT and now - self._since >= self._echo:
            raise KeyboardInterrupt
        if not self._number:
            self._number, self._since = number, now
