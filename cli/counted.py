"""Numbers of things, as they are said: 1 document, 2,000 documents."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """Return a number and the word for so many things.

    >>> counted(1, "update"), counted(2000, "update"), counted(0, "matrix")
    ('1 update', '2,000 updates', '0 matrices')
    """
    many = thing[:-2] + "ices" if thing.endswith("ix") else thing + "s"
    return f"{number:,} {thing if number == 1 else many}"
