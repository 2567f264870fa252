"""The tokenizer: one that is given, or one trained on the texts, and where trained ones are kept.

A tokenizer that is given has to give every text back: `decode(encode(text)) == text` is tried on a sample. The trained
ones do so for any text.

The cache is keyed by what goes in (the texts' digest, vocabulary size, the versions), so a changed text finds
nothing. Entries appear whole or not at all and carry a checksum, and whatever is wrong with an entry, or with the
cache's folder, means training again and never an error.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .disk import new_folder, write_file
from .errors import UserError
from .store import TOKENIZER

END_OF_TEXT = "<|endoftext|>"
MOST_TRAINED_ON = 1 << 26  # characters
_FOREIGN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")
_MOST_BYTES = 1 << 28  # of a tokenizer.json; those of models with 256,000 tokens have some 30 MB
_FORMAT = "2"
_PANIC = "PanicException"  # of pyo3, a BaseException that cannot be imported


def fit_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with the one special token `END_OF_TEXT`.

    Any text can be encoded and decodes to itself. Short texts may give fewer than `vocab_size` tokens:
    `vocabulary_size` tells.

    >>> tokenizer = fit_tokenizer(["to be or not to be"], vocab_size=300)
    >>> tokenizer.decode(tokenizer.encode("be or not").ids)
    'be or not'
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(f"vocab_size={vocab_size} must be at least {len(alphabet) + 1}: every byte and the end of text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def training_sample(texts: Iterable[str], *, most: int = MOST_TRAINED_ON) -> list[str]:
    """Return what a tokenizer is trained on: all texts, in order, up to `most` characters.

    Of more it takes those with the smallest hashes, as many as fit: they look drawn at random, and do not depend on the
    order of the texts. Memory is bounded by `most`.
    """
    kept: list[tuple[int, int, str]] = []  # negative, so that the heap gives the largest hash first
    size, least = 0, (-(1 << 256), 0)
    for number, text in enumerate(texts):
        place = (-int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"), -number)
        if place <= least:
            continue
        heapq.heappush(kept, (*place, text))
        size += len(text)
        while size > most and len(kept) > 1:
            digest, count, dropped = heapq.heappop(kept)
            least, size = (digest, count), size - len(dropped)
    return [text for *_, text in sorted(kept, key=lambda entry: -entry[1])]


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.json, or the one in a folder, without its padding and truncation.

    Raises:
        UserError: for anything else.
    """
    file = Path(path) / TOKENIZER if os.path.isdir(path) else Path(path)
    remedy = f"give a {TOKENIZER}, or a folder with one"
    if not os.path.lexists(file):
        raise UserError(f"tokenizer={str(file)!r} does not exist: {remedy}")
    with refusing(f"tokenizer={str(path)!r} cannot be read", remedy):
        if file.exists() and not file.is_file():
            raise UserError(f"tokenizer={str(path)!r} is no regular file: {remedy}")
        if file.stat().st_size > _MOST_BYTES:
            raise UserError(f"tokenizer={str(path)!r} has more than {_MOST_BYTES >> 20} MB: {remedy}")
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary_size(tokenizer)
        if getattr(tokenizer.model, "dropout", None):
            raise UserError(
                f"tokenizer={str(path)!r} has dropout={tokenizer.model.dropout:g}, with which a text has other tokens "
                "every time: set it to null"
            )
    return tokenizer


@contextmanager
def refusing(what: str, remedy: str) -> Iterator[None]:
    """Say in one sentence what `tokenizers` raises: bare Exceptions, and panics of its Rust code, which are none.

    Raises:
        UserError: with the reason.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError) or not (isinstance(error, Exception) or type(error).__name__ == _PANIC):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what} ({reason or type(error).__name__}): {remedy}") from error


def check_new(out: Path) -> None:
    """Refuse a folder that holds something."""
    try:
        is_used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise UserError(f"out={str(out)!r} cannot be read: {error.strerror or error}") from error
    if is_used:
        raise UserError(f"out={str(out)!r} is not empty: give a folder that is new or empty")


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write a tokenizer to a folder, new or empty, that `load_tokenizer` and transformers' AutoTokenizer load.

    Raises:
        UserError: where it cannot be written.
    """
    end = tokenizer.id_to_token(end_of_text_id(tokenizer))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": end}
    try:
        with new_folder(out.absolute()) as folder:  # "." has no name
            write_file(folder / TOKENIZER, tokenizer.to_str(pretty=True).encode())
            write_file(folder / "tokenizer_config.json", (json.dumps(kind, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"out={str(out)!r} cannot be written: {error.strerror or error}") from error


def check_round_trip(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Refuse a tokenizer that does not give texts back as they were.

    Raises:
        UserError: with the first place that differs.
    """
    for text, back in zip(texts, _there_and_back(literal(tokenizer), texts), strict=True):
        if back != text:
            at = next(at for at in range(len(text) + 1) if text[: at + 1] != back[: at + 1])
            raise UserError(
                f"tokenizer does not give the texts back, {_excerpt(text, at)} comes back as {_excerpt(back, at)}: "
                "give another one, or accept what it loses with --allow-lossy"
            )


def _there_and_back(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    with refusing("tokenizer cannot encode the texts", "give another one"):
        ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        return list(tokenizer.decode_batch(ids, skip_special_tokens=False))


def literal(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy to which special tokens are ordinary text where a text spells them out."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy


def prepends_space(tokenizer: Tokenizer) -> bool:
    """Tell whether a text begins as if a space stood before it, as with Llama 2's normalizer, whatever it begins with.

    Metaspace adds none to a text that has one.
    """
    if tokenizer.normalizer is None:
        return False
    with refusing("tokenizer cannot encode the texts", "give another one"):
        whole, *words = (tokenizer.normalizer.normalize_str(text) for text in ("a b", "a", "b"))
    return bool(whole == "".join(words))


def _excerpt(text: str, at: int) -> str:
    return repr(text[max(0, at - 10) : at + 20])


def end_of_text_id(tokenizer: Tokenizer, own: Iterable[int] = ()) -> int:
    """Return the id of the token that ends a document.

    Args:
        own: what a model ends its texts with, whose tokenizer this is; the one of them that we know by its name, or the
            first.

    Raises:
        UserError: where there is none, and the tokenizer has none that we know.
    """
    ends, known = own_ends(tokenizer, own), _known_ends(tokenizer)
    for number in (*(number for number in known if number in ends), *ends, *known):
        return number
    raise UserError(f"tokenizer has none of {', '.join(_FOREIGN_ENDS)}: add one of them as its end-of-text token")


def own_ends(tokenizer: Tokenizer, ends: Iterable[int]) -> list[int]:
    """Return those of a model's ends that are special tokens of this tokenizer: others belong to another one."""
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return [number for number in ends if number in special]


def usual_end(tokenizer: Tokenizer) -> int | None:
    """Return the token that ends a document where no model says otherwise; None where there is none that we know."""
    return next(iter(_known_ends(tokenizer)), None)


def _known_ends(tokenizer: Tokenizer) -> list[int]:
    return [number for name in _FOREIGN_ENDS if (number := tokenizer.token_to_id(name)) is not None]


def ends_beside(path: Path | str) -> tuple[int, ...]:
    """Return what ends the texts of the model whose tokenizer this is: what the config.json beside it says, if any."""
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    try:
        ends = json.loads((folder / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    except (OSError, ValueError, LookupError, TypeError):  # no model's
        return ()
    return tuple(end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int)


def is_same(tokenizer: Tokenizer, other: Tokenizer) -> bool:
    """Tell whether two tokenizers give a text the same ids, whatever they put around it."""
    return without_template(tokenizer).to_str() == without_template(other).to_str()


def without_template(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer that puts no token before or behind a text, as none stands there in training."""
    if not tokenizer.encode("").ids:
        return tokenizer
    return Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "post_processor": None}))


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return one more than the largest id, which exceeds the number of tokens where ids have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def cached_tokenizer(
    texts: Callable[[], Iterable[str]], *, vocab_size: int, digest: str, folder: Path | None
) -> Tokenizer:
    """Return a tokenizer trained on `training_sample(texts())`, from the cache in `folder` where it is there.

    Args:
        texts: gives the texts; is not called where the tokenizer is there.
        digest: of the texts.
        folder: None means no cache.
    """
    path = folder and folder / f"tokenizer-{_key(digest, vocab_size)}"
    cached = path and _load_tokenizer(path)
    if cached:
        return cached
    tokenizer = fit_tokenizer(training_sample(texts()), vocab_size=vocab_size)
    if path:
        _publish(path, tokenizer.to_str())
    return tokenizer


def _key(digest: str, vocab_size: int) -> str:
    decisive = [_FORMAT, tokenizers.__version__, str(MOST_TRAINED_ON), str(vocab_size), digest]
    return hashlib.sha256("\n".join(decisive).encode()).hexdigest()


def default_cache_folder() -> Path | None:
    """Return $XDG_CACHE_HOME/relora-opt or ~/.cache/relora-opt, or None where neither is an absolute path."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return root / "relora-opt" if root.is_absolute() else None


def _load_tokenizer(path: Path) -> Tokenizer | None:
    try:
        checksum, _, contents = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return Tokenizer.from_str(contents) if checksum == _checksum(contents) else None


def _publish(path: Path, contents: str) -> None:
    """Put a tokenizer into the cache, whole or not at all. An unwritable cache is no cache."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as scratch:
            new = Path(scratch) / "new"
            new.write_text(f"{_checksum(contents)}\n{contents}", encoding="utf-8")
            os.replace(new, path)


def _checksum(contents: str) -> str:
    return hashlib.sha256(contents.encode()).hexdigest()
