"""Documents in parts: a long one is read, hashed and tokenized a part at a time, so that memory stays flat.

A document of more than MOST_CHARACTERS is cut before a space between two letters. Tokenizers that split a text into
words first, as those of GPT-2, Llama 3 and this project do, cut there too: the tokens are those of the whole
document; encoding.py sees to those that put a space before every text. Where no such space is near, the cut is at the
last white space, or else right at the limit. A cut depends on the text alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MOST_CHARACTERS = 1 << 18


@dataclass(frozen=True, slots=True)
class Part:
    """A document, or a part of a long one; the parts of a document follow each other."""

    text: str
    is_last: bool = True


def parts(blocks: Iterable[str], *, most: int = MOST_CHARACTERS) -> Iterator[Part]:
    """Yield the document that some blocks of text make up in parts of at most `most` characters, however it is blocked.

    A document of white space alone has no parts, where it is no longer than one.

    >>> [part.text for part in parts(["one two", " three"], most=9)]
    ['one two', ' three']
    """
    held, is_first = "", True
    for block in blocks:
        held, start = held + block, 0
        while len(held) - start > most:
            cut = _cut(held, start, most)
            yield Part(held[start:cut], is_last=False)
            start, is_first = cut, False
        held = held[start:]  # once a block: at every cut, a long block would be copied over and over
    if not is_first or (held and not held.isspace()):
        yield Part(held)


def _cut(text: str, start: int, most: int) -> int:
    """Return where to cut a text of more than `most` characters from `start`, 1 to `most` after it."""
    least, end = start + 1, start + most
    space = text.rfind(" ", least, end)
    while space > 0:
        if text[space - 1].isalpha() and text[space + 1].isalpha():
            return space
        space = text.rfind(" ", least, space)
    white = max(text.rfind(character, least, end) for character in " \n\t")
    return white if white > 0 else end
