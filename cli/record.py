"""state.json: all of a checkpoint that is not a tensor, and the checksums of the files that hold the tensors.

    {"format": 2,
     "files": {"model.safetensors": {"bytes": 21000000, "crc32": 3735928559}, ...},
     "values": {"progress": ..., "config": ..., "identity": ..., "optimizer": ..., "random": ...},  see nested.py
     "crc32": 3405691582}                                                             of all the above

A checkpoint whose record is right and whose files agree with it is whole. Any format is to have its checksum in this
way, so that a damaged record is not taken for one of another format.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .disk import crc32, write_file
from .errors import UserError

RECORD = "state.json"
WEIGHTS, TENSORS = "model.safetensors", "optimizer.safetensors"
FORMAT = 2
_MOST_BYTES = 1 << 26  # a thousand parameters take half a megabyte


class DamagedError(UserError):
    """A file of a checkpoint is not what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        self.damage = f"{path} is damaged ({reason})"
        super().__init__(f"{self.damage}: delete the folder {path.parent} to use an earlier one")


@dataclass(frozen=True)
class Record:
    """What state.json says.

    Args:
        files: (bytes, CRC-32) by name.
        values: progress, config, identity, optimizer and random, each as `nested.pack` returns it.
    """

    files: dict[str, tuple[int, int]]
    values: dict[str, Any]


def write_record(checkpoint: Path, record: Record) -> None:
    """Write state.json, or replace it, whole or not at all."""
    files = {name: {"bytes": size, "crc32": check} for name, (size, check) in record.files.items()}
    content = {"format": FORMAT, "files": files, "values": record.values}
    text = json.dumps({**content, "crc32": _check(content)}, allow_nan=False)
    write_file(checkpoint / RECORD, text.encode() + b"\n")


def read_record(checkpoint: Path) -> Record:
    """Read state.json.

    Raises:
        DamagedError: for a missing one, or one that is not what was written.
        UserError: for one of another format, or that the disk does not give.
    """
    path = checkpoint / RECORD
    try:
        content = _read(path)
        version = content["format"]
        if version == FORMAT:
            return _decoded(content)
    except OSError as error:
        raise unread(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(path, f"{type(error).__name__}: {str(error)[:80]}") from error
    raise UserError(f"{path} has format {version} and not {FORMAT}: use the version of relora-opt that wrote it")


def check_files(checkpoint: Path, record: Record) -> None:
    """Hold the files of a checkpoint against its record, byte for byte.

    Raises:
        DamagedError: names the first one that differs. UserError: names one that the disk does not give.
    """
    for name, (size, check) in record.files.items():
        path = checkpoint / name
        try:
            found = path.stat().st_size
            if found != size:
                raise DamagedError(path, f"{found:,} bytes where {size:,} were written")
            if crc32(path) != check:
                raise DamagedError(path, "its checksum is another than when it was written")
        except OSError as error:
            raise unread(path, error) from error


def unread(path: Path, error: OSError) -> UserError:
    """Return the error of a file that is missing, which is damage, or that cannot be read now, which is none."""
    if isinstance(error, FileNotFoundError):
        return DamagedError(path, str(error.strerror))
    return UserError(f"{path} cannot be read ({error.strerror or error}): see to its disk, or its permissions")


def _read(path: Path) -> dict[str, Any]:
    """Return what a record of any format says, where its checksum is right."""
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path.stat().st_size:,} bytes, more than {_MOST_BYTES:,}")
    data = path.read_bytes()
    content: dict[str, Any] = json.loads(data)
    is_plain = data.rstrip(b"\n") == json.dumps(content).encode()  # spelled as it was written
    if content.pop("crc32", None) != _check(content) or not is_plain:
        raise ValueError("its checksum is another than when it was written")
    return content


def _decoded(content: dict[str, Any]) -> Record:
    files = {name: (entry["bytes"], entry["crc32"]) for name, entry in content["files"].items()}
    if files.keys() != {WEIGHTS, TENSORS}:
        raise ValueError(f"it names the files {sorted(files)}")
    return Record(files, dict(content["values"]))


def _check(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())
