"""SIGINT and SIGTERM while a run trains."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the update; the second one stops at once."""

    def __init__(self) -> None:
        self.is_stopped = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: object) -> None:
        if self.is_stopped:
            raise KeyboardInterrupt
        self.is_stopped = True
