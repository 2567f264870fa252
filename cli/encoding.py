"""Documents to token ids, piece by piece, on all cores.

A piece is some 262,144 characters of consecutive documents; where pieces begin depends on the documents alone, so that
work can be taken up at any piece. Every core has a thread that encodes a piece by itself, without Python's lock but
for its ids at the end. The threads of `tokenizers` are left out: they take longer (bench/README.md).
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
from tokenizers import Encoding, Tokenizer

from .machine import num_cores
from .split import SplitPart
from .store import SIDES, Stream, id_dtype
from .tokens import end_of_text_id, literal, prepends_space, refusing, vocabulary_size

PIECE = 1 << 18  # characters; until it is an array, a token takes about 150 bytes
JOINT = 1  # the number of the rule by which the parts of a document are joined: see `_texts`
_OWN_THREADS = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class Piece:
    """Some consecutive parts of documents; `goes_on` tells whether the first goes on with the document before."""

    parts: list[SplitPart]
    goes_on: bool = False

    @cached_property
    def num_bytes(self) -> int:
        """Of the text, as UTF-8."""
        return sum(len(part.text.encode()) for part in self.parts)

    @cached_property
    def digest(self) -> str:
        """Of the parts, their order and their ends."""
        whole = hashlib.sha256()
        for part in self.parts:
            raw = part.text.encode()
            whole.update(f"{len(raw)} {part.is_last} {part.is_held_out}\n".encode() + raw)
        return whole.hexdigest()


@dataclass(frozen=True)
class Encoded:
    """What a piece became.

    Args:
        ids: token ids of each side; every document ends with the end-of-text token.
        num_documents: how many end here, on each side.
        num_bytes: of the text, as UTF-8, on each side.
    """

    piece: Piece
    ids: dict[str, Stream]
    num_documents: dict[str, int]
    num_bytes: dict[str, int]


def cut_pieces(parts: Iterable[SplitPart], *, size: int = PIECE) -> Iterator[Piece]:
    """Group consecutive parts into pieces of at least `size` characters."""
    held: list[SplitPart] = []
    count, goes_on = 0, False
    for part in parts:
        held.append(part)
        count += len(part.text)
        if count >= size:
            yield Piece(held, goes_on)
            held, count, goes_on = [], 0, not part.is_last
    if held:
        yield Piece(held, goes_on)


def chained(chain: str, digest: str) -> str:
    """Return the digest of all pieces up to one, given that of all before and its own."""
    return hashlib.sha256(f"{chain} {digest}".encode()).hexdigest()


def encode_pieces(pieces: Iterable[Piece], tokenizer: Tokenizer, *, end: int | None = None) -> Iterator[Encoded]:
    """Encode pieces, in order. Special tokens spelled out in a document are ordinary text.

    Args:
        end: the token behind every document; None is the one that the tokenizer has for it.

    Raises:
        UserError: where the tokenizer cannot encode a text, or has no end-of-text token.
    """
    encode, num_threads = _Encoder(tokenizer, end_of_text_id(tokenizer) if end is None else end), num_cores()
    pieces, waiting = iter(pieces), deque[Future[Encoded]]()
    with _without_threads_of_tokenizers(), ThreadPoolExecutor(num_threads) as threads:
        try:
            waiting.extend(threads.submit(encode, piece) for piece in islice(pieces, 2 * num_threads))
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(threads.submit(encode, piece) for piece in islice(pieces, 1))
                yield done
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _without_threads_of_tokenizers() -> Iterator[None]:
    before = os.environ.get(_OWN_THREADS)
    os.environ[_OWN_THREADS] = "false"
    try:
        yield
    finally:
        del os.environ[_OWN_THREADS]
        os.environ.update({} if before is None else {_OWN_THREADS: before})


class _Encoder:
    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self._tokenizer = literal(tokenizer)
        self._prepends_space = prepends_space(tokenizer)
        self._dtype = id_dtype(vocabulary_size(tokenizer))
        self._end = np.array([end], self._dtype)

    def __call__(self, piece: Piece) -> Encoded:
        ids: dict[str, list[Stream]] = {side: [np.empty(0, self._dtype)] for side in SIDES}
        num_documents, num_bytes = dict.fromkeys(SIDES, 0), dict.fromkeys(SIDES, 0)
        for part, encoding in zip(piece.parts, self._encoded(self._texts(piece)), strict=True):
            side = SIDES[part.is_held_out]
            ids[side].append(np.array(encoding.ids, self._dtype))
            num_bytes[side] += len(part.text.encode())
            if part.is_last:
                ids[side].append(self._end)
                num_documents[side] += 1
        return Encoded(piece, {side: np.concatenate(ids[side]) for side in SIDES}, num_documents, num_bytes)

    def _texts(self, piece: Piece) -> list[str]:
        """Return what is to be encoded: where the tokenizer adds a space, a part that goes on with one has none."""
        texts = [part.text for part in piece.parts]
        if self._prepends_space:
            goes_on = [piece.goes_on, *(not part.is_last for part in piece.parts[:-1])]
            return [text.removeprefix(" ") or text if on else text for text, on in zip(texts, goes_on, strict=True)]
        return texts

    def _encoded(self, texts: list[str]) -> Sequence[Encoding]:
        with refusing("tokenizer cannot encode the texts", "give another one"):
            encoded: Sequence[Encoding] = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return encoded
