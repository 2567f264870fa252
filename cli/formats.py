"""Files of text: what each kind of file holds, as documents.

    .txt                  one document; also .txt.zst and .txt.gz
    .jsonl                one a line, under `text_field`; also .jsonl.zst and .jsonl.gz
    .parquet              one a row, in the column `text_field`

Files are read a block, line or group of rows at a time: none has to fit into memory, and a line of more than
MOST_BYTES is refused. Whatever is wrong with a file is a UserError that names the place.
"""

from __future__ import annotations

import codecs
import io
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from .errors import UserError
from .parts import Part, parts

MOST_BYTES = 1 << 26
_BLOCK = 1 << 20
_ROWS = 64  # of a parquet file at a time
_COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}


def kind_of(path: Path) -> str | None:
    """Return which of KINDS a file's name says it is, or None."""
    name = path.name.lower()
    return next((kind for kind in KINDS if name.endswith(kind) and name != kind), None)


def read_file(path: Path, text_field: str) -> Iterator[Part]:
    """Yield a file's documents in parts, without empty ones.

    Raises:
        UserError: naming file and place, for what cannot be read or is not as its name says.
    """
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"data={str(path)!r} is neither {' nor '.join(KINDS)}: convert it to one of these")
    if path.exists() and not path.is_file():
        raise UserError(f"data={str(path)!r} is no regular file: give one")
    try:
        yield from KINDS[kind](path, text_field)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError, MemoryError) as error:  # pyarrow's are these
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or "out of memory"
        raise UserError(f"data={str(path)!r} cannot be read ({reason}): mend, replace or remove it") from error


def text_of(value: Any, place: str, text_field: str) -> str:
    """Return what stands under `text_field`, or say why it is no text."""
    if not isinstance(value, str):
        raise UserError(f"{place} has {reprlib.repr(value)} under text_field={text_field!r}: text goes there")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        raise UserError(f"{place} has text that is not Unicode ({error.reason}): correct or remove it") from error
    return value


def check_column(names: Iterable[str], place: str, text_field: str) -> None:
    """Refuse a table without the column `text_field`, or with several of that name."""
    names = list(names)
    if names.count(text_field) > 1:
        raise UserError(f"{place} has {names.count(text_field)} columns text_field={text_field!r}: rename all but one")
    if text_field not in names:
        raise UserError(f"{place} has no column text_field={text_field!r} but {_listed(names)}: name one of them")


def read_column(column: Any, first: int, place: str, text_field: str) -> Iterator[Part]:
    """Yield the documents of a pyarrow column whose first row has the number `first`."""
    for number, value in enumerate(column, first):
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise UserError(f"{place}, row {number} is not UTF-8 text: convert or remove it") from error
        yield from parts([text_of(text, f"{place}, row {number}", text_field)])


def _read_text(path: Path, _: str) -> Iterator[Part]:
    with _opened(path) as file:
        yield from parts(_decoded_blocks(file, str(path)))


def _decoded_blocks(file: io.BufferedReader, place: str) -> Iterator[str]:
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    for raw in chain(iter(lambda: file.read(_BLOCK), b""), [b""]):
        held = len(decoder.getstate()[0])
        skipped = len(codecs.BOM_UTF8) if start == 0 and raw.startswith(codecs.BOM_UTF8) else 0
        if b"\0" in raw:
            raise UserError(f"{place} is not text, it holds a NUL byte: give UTF-8 text")
        try:
            yield decoder.decode(raw[skipped:], final=not raw)
        except UnicodeDecodeError as error:
            wrong = start - held + skipped + error.start
            raise UserError(f"{place} is not UTF-8 text, byte {wrong} is wrong: convert or remove it") from error
        start += len(raw)


def _read_lines(path: Path, text_field: str) -> Iterator[Part]:
    with _opened(path) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MOST_BYTES + 1), b""), 1):
            place = f"{path}, line {number}"
            if len(line) > MOST_BYTES:
                raise UserError(f"{place} is longer than {MOST_BYTES >> 20} MB: give so long a text as a .txt file")
            if not line.isspace():
                yield from parts([_text_of_line(line, place, text_field)])


def _opened(path: Path) -> Any:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression, buffer_size=0), _BLOCK)


def _text_of_line(line: bytes, place: str, text_field: str) -> str:
    if b"\0" in line:
        raise UserError(f"{place} is not text, it holds a NUL byte: give UTF-8 text")
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=partial(_object, text_field))
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 text, byte {error.start} is wrong: convert or remove it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}): correct or remove it") from error
    if not isinstance(record, dict) or text_field not in record:
        keys = f"an object with {_listed(record)}" if isinstance(record, dict) else "no object"
        raise UserError(f"{place} has no text under text_field={text_field!r} but is {keys}: name the right key")
    return text_of(record[text_field], place, text_field)


def _object(text_field: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, whose last text would silently replace one under the same key."""
    record = dict(pairs)
    if len(record) < len(pairs) and [key for key, _ in pairs].count(text_field) > 1:
        raise ValueError(f"{text_field!r} is there twice")
    return record


def _read_parquet(path: Path, text_field: str) -> Iterator[Part]:
    from pyarrow import parquet

    number = 0
    with parquet.ParquetFile(path, buffer_size=_BLOCK, pre_buffer=False) as file:
        check_column(file.schema_arrow.names, str(path), text_field)
        for batch in file.iter_batches(batch_size=_ROWS, columns=[text_field]):
            yield from read_column(batch.column(text_field), number, str(path), text_field)
            number += len(batch)


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:10] + ["..."] * (len(shown) > 10)) or "none at all"


KINDS: dict[str, Callable[[Path, str], Iterator[Part]]] = {
    ".txt": _read_text,
    ".txt.zst": _read_text,
    ".txt.gz": _read_text,
    ".jsonl": _read_lines,
    ".jsonl.zst": _read_lines,
    ".jsonl.gz": _read_lines,
    ".parquet": _read_parquet,
}
