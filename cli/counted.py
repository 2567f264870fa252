"""Numbers of things, as they are said: 1 document, 2,000 documents."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """Return a number and the word for so many things.

    >>> counted(1, "update"), counted(2000, "update")
    ('1 update', '2,000 updates')
    """
    return f"{number:,} {thing}{'s' * (number != 1)}"
