"""The numbers that torchrun hands over in the environment; without torch, so that a mistake there is found at once."""

from __future__ import annotations

import os

from .errors import UserError


def launched(name: str, default: int = 1) -> int:
    """Return a number of torchrun's, or what holds where it has started nothing.

    Raises:
        UserError: for what is no number.
    """
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name}={text!r} in the environment is no number: unset it, or start with torchrun")
    return int(text)
