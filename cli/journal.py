"""The journal of a store that is being written: how far its streams are good.

Its first line says which store it is, and every other line how far that one had come when it was flushed to the disk.
Whoever was stopped goes on from the last whole line, if the streams bear it out.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .disk import write_file
from .store import DIGEST, FORMAT, SIDES, digest_of

JOURNAL = "journal.jsonl"
_TAIL = 1 << 16  # bytes at the end, more than a hundred lines: a journal grows as long as the work takes


@dataclass
class Entry:
    """How far a store has come.

    Args:
        num_pieces: pieces that were appended, and `chain` a digest of them all.
        num_documents, num_bytes: that end in them, and of their text as UTF-8, on each side.
        sizes: of the streams, in bytes, and `digests` their SHA-256.
    """

    num_pieces: int = 0
    chain: str = ""
    num_documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    num_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    digests: dict[str, str] = field(default_factory=lambda: dict.fromkeys(SIDES, ""))


def begin_journal(folder: Path, key: str, entry: Entry | None = None) -> None:
    """Write a journal with its first line, and an entry where there is one to go on from; whole or not at all."""
    lines = [_header(key), *([] if entry is None else [_line(entry)])]
    write_file(folder / JOURNAL, "".join(lines).encode())


def append_entry(folder: Path, entry: Entry) -> None:
    """Append an entry, flushed to the disk."""
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        journal.write(_line(entry))
        journal.flush()
        os.fsync(journal.fileno())


def last_entry(folder: Path, key: str) -> Entry | None:
    """Return the last entry of a store's journal; None where there is none, or the journal is another store's."""
    header, *lines = _lines(folder)
    for line in reversed(lines if header == _header(key) else []):
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            return _entry(dict(json.loads(line)))
    return None


def key_of_journal(folder: Path) -> str | None:
    """Return the key of the store whose journal lies in a folder; None where none does."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        return str(json.loads(_lines(folder)[0])["key"])
    return None


def _header(key: str) -> str:
    return json.dumps({"format": FORMAT, "key": key}) + "\n"


def _line(entry: Entry) -> str:
    content = asdict(entry)
    return json.dumps({**content, DIGEST: digest_of(content)}) + "\n"


def _entry(content: dict[str, Any]) -> Entry:
    if content.pop(DIGEST) != digest_of(content):
        raise ValueError("the line was changed")
    return Entry(
        num_pieces=int(content["num_pieces"]),
        chain=str(content["chain"]),
        num_documents={side: int(content["num_documents"][side]) for side in SIDES},
        num_bytes={side: int(content["num_bytes"][side]) for side in SIDES},
        sizes={side: int(content["sizes"][side]) for side in SIDES},
        digests={side: str(content["digests"][side]) for side in SIDES},
    )


def _lines(folder: Path) -> list[str]:
    """Return the whole lines of a journal, at least one; of a long one the first and the last."""
    try:
        with (folder / JOURNAL).open("rb") as file:
            header = file.readline(_TAIL)
            file.seek(max(len(header), file.seek(0, os.SEEK_END) - _TAIL))
            text = (header + file.read()).decode(errors="replace")
    except OSError:
        return [""]
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")] or [""]
