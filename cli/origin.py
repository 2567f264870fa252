"""What a new run begins with: a model's weights, a tokenizer, texts or tokens. They must agree about what an id means.

A tokenizer comes with the weights or with tokenized texts, or is named; where there is none, one is trained. Options
that would not count beside what is there are refused, and those that count are recorded. A run that goes on has its own
tokenizer, and of this nothing is asked again but whether options that are given count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .config import Config, Options
from .corpus import Settings
from .errors import UserError
from .export import TOKENIZER
from .output import quoted
from .place import find_trained
from .sources import located_sources
from .store import is_store
from .tokens import is_same, load_tokenizer, vocabulary_size

_OF_TEXTS = ("text_field", "val_share", "allow_lossy")


def located(config: Config) -> Config:
    """Return the options with texts and weights by names that hold in any current folder.

    Weights to go on from are the very ones, where a run stands for its newest.
    """
    config = replace(config, data=located_sources(config.data))
    if config.init_from is None:
        return config
    return replace(config, init_from=str(find_trained(Path(config.init_from)).weights.absolute()))


def tokenizer_file(config: Config) -> Path | None:
    """Return the tokenizer of texts that need none trained: the one named, or the one beside the weights."""
    if config.tokenizer is not None:
        return Path(config.tokenizer)
    return None if config.init_from is None else find_trained(Path(config.init_from)).shape / TOKENIZER


def agreed(config: Config, *, vocab_size: int) -> Config:
    """Return the options of a new run with those that its texts are read by.

    Args:
        vocab_size: the model's, for which a tokenizer is trained unless the options give a size.

    Raises:
        UserError: for tokenizers that differ or are to be too large, and options that would not count.
    """
    store = _store(config.data)
    _check_ids(config, store)
    _check_apart(config)
    known = store or tokenizer_file(config)
    if known is None:
        if config.preset is None and config.vocab_size is not None and config.vocab_size > vocab_size:
            raise too_many_tokens(config.vocab_size, vocab_size)
        config = replace(config, vocab_size=config.vocab_size or vocab_size)
    else:
        check_vocabulary(config.vocab_size, known)
    if store is None:
        settings = Settings.of(config)
        return replace(config, text_field=settings.text_field, val_share=settings.val_share)
    _check_of_texts({name: getattr(config, name) for name in _OF_TEXTS}, store)
    return config


def check_given_again(options: Options, config: Config) -> None:
    """Refuse options of texts that are given to a run that goes on, where it has tokens instead.

    Raises:
        UserError: names the first of them.
    """
    store = _store(config.data)
    if store is not None:
        _check_of_texts(options, store)


def check_vocabulary(vocab_size: int | None, known: Path) -> None:
    """Refuse a size that is given beside a tokenizer of another."""
    if vocab_size is None:
        return
    size = vocabulary_size(load_tokenizer(known))
    if vocab_size != size:
        raise UserError(
            f"vocab_size={vocab_size}, but the tokenizer {str(known)!r} has {size} tokens: leave out vocab_size, which "
            "is of a tokenizer to train"
        )


def too_many_tokens(size: int, vocab_size: int) -> UserError:
    """Return what is wrong with a tokenizer of so many tokens for a model that has embeddings for fewer."""
    return UserError(
        f"the tokenizer has {size} tokens, and the model embeddings for vocab_size={vocab_size}: give a tokenizer of "
        f"no more, a --vocab-size of at most {vocab_size} to train one, or another --model"
    )


def _check_of_texts(options: Options, store: Path) -> None:
    """Refuse what would say how texts are read, where they are tokenized already."""
    for name in _OF_TEXTS:
        value = options.get(name)
        if value not in (None, False):
            raise UserError(
                f"{name}={value!r} is of texts, and data={str(store)!r} is tokenized already: leave it out, or "
                "tokenize again with it"
            )


def _store(sources: Sequence[str]) -> Path | None:
    """Return the folder that `tokenize` made, where that is what there is to read."""
    return Path(sources[0]) if len(sources) == 1 and is_store(Path(sources[0])) else None


def _check_apart(config: Config) -> None:
    """Refuse a run in the folder of its texts, which would be among them when it is to go on."""
    out = Path(config.out).resolve()
    for source in config.data:
        folder = Path(source).resolve()
        if folder.is_dir() and (out == folder or folder in out.parents):
            raise UserError(
                f"out={config.out!r} lies in data={source!r}, so that what the run writes would be read as texts: give "
                "another folder"
            )


def _check_ids(config: Config, store: Path | None) -> None:
    """Refuse tokens whose ids do not mean to a model what they meant when it was trained."""
    if config.init_from is None:
        return
    own = find_trained(Path(config.init_from)).shape / TOKENIZER
    if not own.is_file():
        return
    known = load_tokenizer(own)
    if config.tokenizer is not None and not is_same(load_tokenizer(config.tokenizer), known):
        raise UserError(
            f"tokenizer={config.tokenizer!r} is not the one of init_from={config.init_from!r}, whose weights know the "
            "ids of their own alone: leave it out"
        )
    if store is not None and not is_same(load_tokenizer(store), known):
        raise UserError(
            f"data={str(store)!r} was tokenized by another tokenizer than that of init_from={config.init_from!r}: "
            f"tokenize again with --tokenizer {quoted(own)}"
        )
