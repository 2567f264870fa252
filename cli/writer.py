"""Writing beside the training: one piece of work at a time, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Writer:
    """Does what it is given in a thread; what that raises is raised by the next call.

    As a context manager it waits in the end.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        else:
            self._join()

    def start(self, work: Callable[[], object]) -> None:
        """Begin some work, once the work before is done."""
        self.wait()
        self._thread = threading.Thread(target=self._do, args=(work,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when all work is done."""
        self._join()
        self.check()

    def abandon(self) -> None:
        """Leave the work where it is: it ends with the process."""
        self._thread = None

    def check(self) -> None:
        """Raise what the work has raised, if it has."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # for the thread that trains
            self._error = error
