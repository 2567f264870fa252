"""Which documents are held out, and a census of all documents, which that takes.

A document's side follows from the hash of its contents: it changes neither with the order nor with most additions, and
identical documents stay together. Where that holds out nothing, or more than half of the text, it is either the one
document nearest to `val_share` of the text, or of the documents that are no longer than that those with the smallest
hashes, as many as come nearest to it (but to no more than half of them): whichever is nearer. A single document (or
copies of one) is cut near its end.

Documents come in parts, are read once for the census and again for whatever is done with them, and never held.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from .errors import UserError
from .parts import Part

VAL_SHARE = 0.05
_SAMPLE = 64  # documents
_HEAD = 1 << 12  # characters of each
_LAST = b"\xff" * 33  # above every digest
_PREFIX = 2  # bytes of a digest, by which lengths are added up: memory is flat

Read = Callable[[], Iterable[Part]]


@dataclass(frozen=True, repr=False)
class Split:
    """The rule of one corpus.

    Args:
        val_share: a document is held out where its hash, as a number in [0, 1), is below.
        only: the digest of the one document that is held out instead.
        cut: of that document, where its held-out end begins, in characters: it is the only one there is.
        below: documents with smaller digests are held out instead.
        but: digests of those that are not, although they are smaller.
    """

    val_share: float
    only: bytes | None = None
    cut: int | None = None
    below: bytes | None = None
    but: tuple[bytes, ...] = ()

    def __repr__(self) -> str:
        """Return what stores and trained tokenizers are found by: what is not used is no part of it."""
        some = "" if self.below is None else f", below={self.below!r}, but={self.but!r}"
        return f"Split(val_share={self.val_share!r}, only={self.only!r}, cut={self.cut!r}{some})"

    def holds_out(self, digest: bytes) -> bool:
        """Tell from a document's SHA-256 whether it is held out, or, with `cut`, its end."""
        if self.below is not None:
            return digest < self.below and digest not in self.but
        return hash_share(digest) < self.val_share if self.only is None else digest == self.only


def hash_share(digest: bytes) -> float:
    """Return a number in [0, 1) that looks drawn at random and depends on the digest alone."""
    return int.from_bytes(digest[:6], "big") / 2.0**48


@dataclass(frozen=True)
class Census:
    """What one reading of a corpus finds.

    Args:
        digest: of all documents in order, hexadecimal.
        num_documents, num_characters, num_bytes: of all documents; bytes as UTF-8.
        split: which are held out.
        long: digests of the documents that come in several parts, in order.
        sample: the beginnings of up to 64 documents that look drawn at random.
    """

    digest: str
    num_documents: int
    num_characters: int
    num_bytes: int
    split: Split
    long: tuple[bytes, ...]
    sample: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SplitPart:
    """A part of a document, or of its training or held-out share, and where it goes."""

    text: str
    is_last: bool
    is_held_out: bool


def take_census(read: Read, *, val_share: float = VAL_SHARE, advance: Callable[[int], None] = lambda _: None) -> Census:
    """Read all documents once, or three times where their hashes hold out nothing or too much.

    Args:
        read: gives the documents anew at each call.
        advance: is told of every part's bytes.
    """
    whole, sample, count = hashlib.sha256(), _Sample(), _Count(val_share)
    for document in _documents(read(), advance):
        whole.update(document.digest)
        sample.add(document)
        count.add(document)
    return Census(
        digest=whole.hexdigest(),
        num_documents=count.documents,
        num_characters=count.characters,
        num_bytes=count.text_bytes,
        split=_split(count, read),
        long=tuple(count.long),
        sample=tuple(sample.texts.values()),
    )


def split_parts(read: Read, census: Census) -> Iterator[SplitPart]:
    """Yield all parts again with the sides that they are on.

    Raises:
        UserError: at the end at the latest, where the documents are not those of the census.
    """
    whole, document, long = hashlib.sha256(), hashlib.sha256(), iter(census.long)
    num_copies, start, side = 0, 0, None
    for part in read():
        document.update(part.text.encode())
        if side is None:
            side, start = document.digest() if part.is_last else next(long, b""), 0
        is_held_out = census.split.holds_out(side)
        if is_held_out and census.split.cut is not None:
            yield from _cut(part, start, census.split.cut, holds_out=num_copies == 0)
        else:
            yield SplitPart(part.text, part.is_last, is_held_out)
        start += len(part.text)
        if part.is_last:
            whole.update(document.digest())
            document, side, num_copies = hashlib.sha256(), None, num_copies + 1
    if whole.hexdigest() != census.digest:
        raise _changed()


def _changed() -> UserError:
    return UserError("the texts changed while they were read: leave them alone, and run it again")


def _cut(part: Part, start: int, cut: int, *, holds_out: bool) -> Iterator[SplitPart]:
    """Cut a part, which begins at `start`, of the only document: what lies before `cut` is for training.

    The rest of one copy is held out.
    """
    at = max(0, cut - start)
    if at > 0 or start == 0:
        yield SplitPart(part.text[:at], is_last=at <= len(part.text), is_held_out=False)
    if holds_out and at < len(part.text):
        yield SplitPart(part.text[at:], is_last=part.is_last, is_held_out=True)


@dataclass(frozen=True, slots=True)
class _Document:
    digest: bytes
    num_characters: int
    num_bytes: int
    is_long: bool
    head: str


def _documents(parts: Iterable[Part], advance: Callable[[int], None]) -> Iterator[_Document]:
    digest, num_characters, num_bytes, head = hashlib.sha256(), 0, 0, None
    for part in parts:
        raw = part.text.encode()
        digest.update(raw)
        advance(len(raw))
        is_long = head is not None or not part.is_last
        head = part.text[:_HEAD] if head is None else head
        num_characters, num_bytes = num_characters + len(part.text), num_bytes + len(raw)
        if part.is_last:
            yield _Document(digest.digest(), num_characters, num_bytes, is_long, head)
            digest, num_characters, num_bytes, head = hashlib.sha256(), 0, 0, None


@dataclass
class _Count:
    """Adds documents up."""

    val_share: float
    documents: int = 0
    characters: int = 0
    text_bytes: int = 0
    held_out: int = 0  # characters
    first: _Document | None = None
    are_alike: bool = True
    long: list[bytes] = field(default_factory=list)

    def add(self, document: _Document) -> None:
        self.first = self.first or document
        self.are_alike = self.are_alike and document.digest == self.first.digest
        self.documents += 1
        self.characters += document.num_characters
        self.text_bytes += document.num_bytes
        self.held_out += document.num_characters * (hash_share(document.digest) < self.val_share)
        if document.is_long:
            self.long.append(document.digest)


class _Sample:
    """Keeps the beginnings of the documents with the smallest digests."""

    def __init__(self) -> None:
        self.texts: dict[bytes, str] = {}
        self._largest = _LAST

    def add(self, document: _Document) -> None:
        if document.digest < self._largest:
            self.texts[document.digest] = document.head
        if len(self.texts) > _SAMPLE:
            del self.texts[max(self.texts)]
            self._largest = max(self.texts)


def _split(count: _Count, read: Read) -> Split:
    if count.first is None:
        return Split(count.val_share)
    if count.are_alike:
        length = count.first.num_characters
        return Split(count.val_share, count.first.digest, length - max(1, round(count.val_share * length)))
    if 0 < count.held_out <= count.characters / 2:
        return Split(count.val_share)
    return _nearest(count, read)


def _nearest(count: _Count, read: Read) -> Split:
    """Return the split that comes nearest to the share that is wanted, of one document or of some."""
    wanted = count.val_share * count.characters
    by_prefix = array("q", bytes(8 << 8 * _PREFIX))  # characters of the documents that are not too long
    best, copies = (True, float("inf"), b"", 0), 0
    for document in _documents(read(), lambda _: None):
        is_most = document.num_characters > count.characters / 2
        own = (is_most, abs(document.num_characters - wanted), document.digest, document.num_characters)
        best, copies = (own, 1) if own < best else (best, copies + (own == best))
        if document.num_characters <= wanted:
            by_prefix[_prefix(document.digest)] += document.num_characters
    if copies == 0:
        raise _changed()
    *_, digest, length = best
    splits = [(copies * length, Split(count.val_share, digest)), *_smallest(count, read, by_prefix, wanted)]
    return min(splits, key=lambda sized: abs(sized[0] - wanted))[1]


def _smallest(count: _Count, read: Read, by_prefix: array[int], wanted: float) -> Iterator[tuple[int, Split]]:
    """Yield how many characters the smallest hashes hold out, and that split, unless all documents are too long."""
    limit, before, prefix = min(wanted, sum(by_prefix) / 2), 0, 0
    if limit == 0:
        return
    while before + by_prefix[prefix] < limit:
        before, prefix = before + by_prefix[prefix], prefix + 1
    lengths: defaultdict[bytes, int] = defaultdict(int)  # of the documents with the prefix where the limit is reached
    long = set()
    for document in _documents(read(), lambda _: None):
        if document.num_characters > wanted and _prefix(document.digest) <= prefix:
            long.add(document.digest)
        elif _prefix(document.digest) == prefix:
            lengths[document.digest] += document.num_characters
    digests = sorted(lengths)
    sizes = accumulate((lengths[digest] for digest in digests), initial=before)
    ends = zip(sizes, [*digests, prefix.to_bytes(_PREFIX, "big") + _LAST], strict=True)
    if not digests:
        raise _changed()
    size, below = min((end for end in ends if end[0]), key=lambda end: abs(end[0] - limit))
    yield size, Split(count.val_share, below=below, but=tuple(sorted(digest for digest in long if digest < below)))


def _prefix(digest: bytes) -> int:
    return int.from_bytes(digest[:_PREFIX], "big")
