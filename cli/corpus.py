"""A corpus: what sources, a tokenizer and a few settings become, kept on the disk.

Texts are read whenever a run begins or goes on, and a store is found by the digest of what was read: a changed text
or tokenizer never meets old tokens, whatever a file's date and size say. Where there is no store yet, the texts are
read once more and tokenized, from where an earlier try was stopped. After that they are not needed any more: a run
reads its store alone. A folder that `tokenize` made is taken as it is, after a look at its checksums.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from rich.console import Console
from tokenizers import Tokenizer

from .config import Config
from .data import check_length
from .encoding import JOINT, PIECE, chained, cut_pieces, encode_pieces
from .errors import UserError
from .pace import Advance, Pace
from .parts import MOST_CHARACTERS
from .sources import find_sources, left_out, read_sources
from .split import VAL_SHARE, Census, Read, SplitPart, split_parts, take_census
from .store import FORMAT, DamagedError, Stream, is_store, open_store
from .store_writer import StoreWriter, is_unfinished, key_of, locked
from .tokens import (
    cached_tokenizer,
    check_round_trip,
    default_cache_folder,
    end_of_text_id,
    ends_beside,
    is_same,
    load_tokenizer,
    usual_end,
    vocabulary_size,
    without_template,
)


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: two packed streams of token ids, the tokenizer, and how many documents went into each.

    `fingerprint` is what both streams hold: a hexadecimal digest of one after the other, and how many tokens the first
    has. `num_val_bytes` is of the held-out text, as UTF-8.
    """

    train: Stream
    val: Stream
    tokenizer: Tokenizer
    num_train_documents: int
    num_val_documents: int
    num_val_bytes: int
    fingerprint: str

    @property
    def eos_id(self) -> int:
        """The token that ends every document, the last held-out one among them."""
        return int(self.val[-1])

    @property
    def vocab_size(self) -> int:
        """The smallest number of embeddings that serves every id: the tokenizer's, not the one asked for."""
        return vocabulary_size(self.tokenizer)

    def is_known_as(self, fingerprint: str) -> bool:
        """Tell whether a fingerprint is this corpus's; runs that were begun earlier have the digest alone."""
        return fingerprint in (self.fingerprint, self.fingerprint.partition("-")[0])


@dataclass(frozen=True)
class Settings:
    """What decides a corpus, beside its texts.

    Args:
        vocab_size: tokens to train; ignored where `tokenizer` is given.
        tokenizer: a tokenizer.json, or a folder with one; None trains one.
        text_field: where texts stand in lines and tables.
        val_share: of the documents, to hold out.
        allow_lossy: take a tokenizer that does not give every text back.
    """

    vocab_size: int = 4096
    tokenizer: str | Path | None = None
    text_field: str = "text"
    val_share: float = VAL_SHARE
    allow_lossy: bool = False

    @classmethod
    def of(cls, config: Config, **changes: Any) -> Settings:
        """Return what a configuration says."""
        names = {field.name for field in fields(cls)}
        given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
        return cls(**{**given, **changes})


def prepare(
    sources: Sequence[str],
    settings: Settings,
    *,
    seq_len: int,
    cache_folder: Path | None = None,
    pace: Pace | None = None,
) -> Corpus:
    """Return the corpus of some sources for training: from a folder that `tokenize` made, from the cache, or made now.

    Args:
        sources: see sources.py, or one folder that `tokenize` made; empty means the State of the Union messages.
        seq_len: tokens in a sequence; both streams must hold at least one.
        cache_folder: None means `default_cache_folder()`.

    Raises:
        UserError: for sources or a tokenizer that cannot be read, and for a corpus shorter than one sequence.
    """
    stores = [source for source in sources if is_store(Path(source))]
    for source in sources:
        if is_unfinished(Path(source)):
            raise UserError(f"data={source!r} is a corpus that relora-opt tokenize has not finished: run that again")
    if stores and len(sources) > 1:
        raise UserError(f"data={stores[0]!r} is a tokenized corpus and goes alone: give it, or texts")
    if stores:
        corpus = _opened(Path(stores[0]), settings)
    else:
        corpus = _cached(sources, settings, cache_folder or default_cache_folder(), pace or _silent())
    check_length("training", corpus.train, seq_len)
    check_length("held-out", corpus.val, seq_len)
    return corpus


def tokenize(sources: Sequence[str], settings: Settings, out: Path, *, pace: Pace | None = None) -> Corpus:
    """Write the corpus of some sources to a folder; what is there of the same corpus already is kept.

    Raises:
        UserError: as `prepare` does, and where `out` holds anything else or cannot be written.
    """
    pace = pace or _silent()
    _check_out(out, None)
    plan = _plan(sources, settings, default_cache_folder(), pace)
    _check_out(out, plan.key)
    return _stored(plan, out, pace)


def train_tokenizer(sources: Sequence[str], settings: Settings, *, pace: Pace | None = None) -> Tokenizer:
    """Return the tokenizer that `tokenize` trains: on the training documents of some sources."""
    return _plan(sources, settings, default_cache_folder(), pace or _silent()).tokenizer


def encode_sources(
    sources: Sequence[str], tokenizer: Tokenizer, *, text_field: str, end: int, pace: Pace | None = None
) -> tuple[Stream, int, int]:
    """Return all documents of some sources as one stream, in memory, how many they are, and their bytes as UTF-8.

    Args:
        end: the token behind every document.
        pace: says which files are not read.

    Raises:
        UserError: for sources that cannot be read, or hold no text.
    """
    pace = pace or _silent()
    for line in left_out(sources):
        pace.say(line)
    parts = (SplitPart(part.text, part.is_last, False) for part in read_sources(find_sources(sources), text_field))
    streams, num_documents, num_bytes = [], 0, 0
    for encoded in encode_pieces(cut_pieces(parts), tokenizer, end=end):
        streams.append(encoded.ids["train"])
        num_documents += encoded.num_documents["train"]
        num_bytes += encoded.num_bytes["train"]
    if not streams:
        raise UserError(f"data={', '.join(sources)} holds no text: give sources with at least one document")
    return np.concatenate(streams), num_documents, num_bytes


def gives_back(sources: Sequence[str], tokenizer: Tokenizer, *, text_field: str) -> bool:
    """Tell whether a tokenizer gives back samples of the documents of some sources."""
    read = partial(read_sources, find_sources(sources), text_field)
    with suppress(UserError):
        check_round_trip(tokenizer, take_census(read).sample)
        return True
    return False


@dataclass(frozen=True)
class _Plan:
    """What is to be tokenized, by what, and the digest of both."""

    read: Read
    census: Census
    tokenizer: Tokenizer
    end: int
    key: str


def _plan(sources: Sequence[str], settings: Settings, folder: Path | None, pace: Pace) -> _Plan:
    for source in sources:
        if is_store(Path(source)):
            raise UserError(f"data={source!r} is tokenized already: give texts, or give it to pretrain --data as it is")
    given, end = None, 0
    if settings.tokenizer is not None:
        given = load_tokenizer(settings.tokenizer)
        end = end_of_text_id(given, ends_beside(settings.tokenizer))
    read = partial(read_sources, find_sources(sources), settings.text_field)
    for line in left_out(sources):
        pace.say(line)
    with pace.stage("reading", total=None) as advance:
        census = take_census(read, val_share=settings.val_share, advance=advance)
    if census.num_documents == 0:
        raise UserError(f"data={', '.join(sources)} holds no text: give sources with at least one document")
    tokenizer = given or _trained(read, census, settings.vocab_size, folder, pace)
    end = end if given else end_of_text_id(tokenizer)
    if not settings.allow_lossy:
        check_round_trip(tokenizer, census.sample)
    return _Plan(read, census, tokenizer, end, _key(census, tokenizer, end))


def _trained(read: Read, census: Census, vocab_size: int, folder: Path | None, pace: Pace) -> Tokenizer:
    def texts() -> Iterator[str]:
        for part in split_parts(read, census):
            advance(len(part.text.encode()))
            if not part.is_held_out:
                yield part.text

    with pace.stage("training a tokenizer", total=census.num_bytes) as advance:
        return cached_tokenizer(texts, vocab_size=vocab_size, digest=_digest(census), folder=folder)


def _digest(census: Census) -> str:
    """Return a digest of the documents and of which are held out."""
    return _hashed(census.digest, repr(census.split))


def _key(census: Census, tokenizer: Tokenizer, end: int) -> str:
    """Return a digest of everything that decides the streams; an end by another name is a part of it where it is."""
    cuts = f"{FORMAT} {MOST_CHARACTERS} {PIECE} {JOINT}"
    other = [] if end == usual_end(tokenizer) else [str(end)]
    return _hashed(_digest(census), without_template(tokenizer).to_str(), tokenizers.__version__, cuts, *other)


def _hashed(*decisive: str) -> str:
    return hashlib.sha256("\0".join(decisive).encode()).hexdigest()


def _cached(sources: Sequence[str], settings: Settings, folder: Path | None, pace: Pace) -> Corpus:
    """Return a corpus by way of the cache; where that cannot be written, by way of a folder that is removed again."""
    plan = _plan(sources, settings, folder, pace)
    if folder is not None:
        place = folder / f"corpus-{plan.key[:32]}"
        with suppress(DamagedError):
            return _found(plan, place)
        if _is_writable(place):
            return _stored(plan, place, pace)
        pace.say(f"the cache {folder} cannot be written: the tokens are kept for this run alone")
    with tempfile.TemporaryDirectory(prefix="relora-opt-") as scratch:  # what is mapped stays until the process ends
        return _stored(plan, Path(scratch), pace)


def _is_writable(place: Path) -> bool:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(place, os.W_OK | os.X_OK)


def _stored(plan: _Plan, place: Path, pace: Pace) -> Corpus:
    """Return a plan's corpus from the store at a place, which is made, or finished, where it is not there."""

    def waiting() -> None:
        pace.say(f"waiting for another process that writes to {place}")

    try:
        with locked(place, waiting=waiting):
            with suppress(DamagedError):
                return _found(plan, place)
            with pace.stage("tokenizing", total=plan.census.num_bytes) as advance:
                _write(plan, place, advance)
            return _found(plan, place)
    except OSError as error:
        raise UserError(
            f"the tokens cannot be written to {place}: {error.strerror or error}; make room there, or let "
            "XDG_CACHE_HOME or --out name another place, and run it again: it goes on where it stopped"
        ) from error


def _write(plan: _Plan, place: Path, advance: Advance) -> None:
    vocab_size = vocabulary_size(plan.tokenizer)
    with StoreWriter(place, plan.key, plan.tokenizer.to_str(), vocab_size=vocab_size) as writer:
        pieces = cut_pieces(split_parts(plan.read, plan.census))
        chain = ""
        for piece in islice(pieces, writer.num_pieces):
            chain = chained(chain, piece.digest)
            advance(piece.num_bytes)
        if chain != writer.chain:  # the texts changed while they were tokenized, and were changed back
            writer.begin_anew()
            pieces = cut_pieces(split_parts(plan.read, plan.census))
        for encoded in encode_pieces(pieces, plan.tokenizer, end=plan.end):
            writer.append(encoded)
            advance(encoded.piece.num_bytes)
        writer.finish()


def _found(plan: _Plan, place: Path) -> Corpus:
    """Return a plan's corpus from its store. Raises DamagedError where it is not there, or not whole."""
    corpus, key = _read_corpus(place, plan.tokenizer)
    if key != plan.key:
        raise DamagedError(f"key={key}")
    return corpus


def _opened(folder: Path, settings: Settings) -> Corpus:
    """Return the corpus in a folder that `tokenize` made."""
    tokenizer = load_tokenizer(folder)
    if settings.tokenizer is not None and not is_same(load_tokenizer(settings.tokenizer), tokenizer):
        raise UserError(
            f"tokenizer={str(settings.tokenizer)!r} is not the one that made data={str(folder)!r}: leave it out, or "
            "tokenize again"
        )
    try:
        return _read_corpus(folder, tokenizer)[0]
    except DamagedError as error:
        raise UserError(f"data={str(folder)!r} is damaged ({error}): delete the folder and tokenize again") from error


def _read_corpus(folder: Path, tokenizer: Tokenizer) -> tuple[Corpus, str]:
    manifest, streams = open_store(folder)
    if manifest.vocab_size != vocabulary_size(tokenizer):
        raise DamagedError(f"vocab_size={manifest.vocab_size}")
    corpus = Corpus(
        **streams,
        tokenizer=tokenizer,
        num_train_documents=manifest.num_train_documents,
        num_val_documents=manifest.num_val_documents,
        num_val_bytes=manifest.num_val_bytes,
        fingerprint=f"{manifest.fingerprint}-{manifest.num_train}",
    )
    return corpus, manifest.key


def _check_out(out: Path, key: str | None) -> None:
    """Refuse a folder that cannot be written, or holds anything but a store; with a key, any other store."""
    try:
        nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
        if nearest != out and not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
            why = "may not be written into" if nearest.is_dir() else "is in the way"
            raise UserError(f"out={str(out)!r} cannot be written, {nearest} {why}: give another folder")
        is_used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise UserError(f"out={str(out)!r} cannot be read: {error.strerror or error}") from error
    if is_used and (key_of(out) is None or key not in (None, key_of(out))):
        raise UserError(
            f"out={str(out)!r} is not empty, and not of these texts, tokenizer and settings: give a folder that is new "
            "or empty"
        )


def _silent() -> Pace:
    return Pace(Console(quiet=True))
