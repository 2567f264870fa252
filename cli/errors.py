"""What the user can mend."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can mend: one sentence with the value and the remedy. The command ends with status 2."""


@contextmanager
def short_paths() -> Iterator[None]:
    """Refuse paths that no file system takes, wherever they are met first.

    Raises:
        UserError: names the path.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{str(error.filename)!r} is longer than names of files may be: give another path") from error
