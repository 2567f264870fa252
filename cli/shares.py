"""Files of sharded tensors: every process writes what it holds of them, and reads what it is to hold.

    write_shares   all write their parts, and the first one joins them: the file is as one process would have written it
    read_shares    fills tensors of any layout from such files

torch.distributed.checkpoint writes and reads the parts, by its storage for safetensors: nothing is pickled. Its own
joining (torch 2.13) makes zeros of tensors without dimensions, refuses those of whole numbers and leaves out the
format that transformers asks for; here bytes are copied, a megabyte at a time.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from .errors import UserError
from .parallel import World

_CHUNK = 1 << 20
_FILE = 1 << 26  # bytes that a process puts into one file: while it is written it is in memory once more
_LENGTH = struct.Struct("<Q")  # of a safetensors file's header, which it begins with


def write_shares(tensors: dict[str, Tensor], path: Path, processes: World) -> None:
    """Write a file of tensors of which every process holds a part: all must call, from a thread beside the training.

    What is not sharded is taken from the first process.

    Raises:
        OSError: where the disk refuses. UserError: where this process does not see the first one's folder.
    """
    parts = path.with_name(f"{path.name}.parts")
    if processes.is_main:
        parts.mkdir()
    dist.barrier(group=processes.beside)
    if not parts.is_dir():
        raise UserError(f"{parts}, which rank 0 has made, is not there: give all machines one folder, on a shared disk")
    held = {name: tensor for name, tensor in tensors.items() if processes.is_main or isinstance(tensor, DTensor)}
    files = _numbered(tensors, num_bytes=_FILE * processes.size)
    writer = HuggingFaceStorageWriter(str(parts), fqn_to_index_mapping=files, save_distributed=True)
    with _own_failures(processes.rank, processes.beside):
        save(held, storage_writer=writer, process_group=processes.beside)
    if processes.is_main:
        join(sorted(parts.iterdir()), path, {name: list(tensor.shape) for name, tensor in tensors.items()})
        shutil.rmtree(parts)


def read_shares(tensors: dict[str, Tensor], folder: Path, processes: World) -> None:
    """Fill tensors from the safetensors files of a folder, each process what it holds of them: all must call.

    Raises:
        OSError, SafetensorError: where the disk does not give what this process is to hold.
    """
    reader = HuggingFaceStorageReader(str(folder))
    with _own_failures(processes.rank, processes.patient):
        load(tensors, storage_reader=reader, process_group=processes.patient)


def join(files: list[Path], path: Path, shapes: dict[str, list[int]]) -> None:
    """Write tensors whose parts these files hold, whole, to one safetensors file.

    Raises:
        OSError: where parts of them are missing.
    """
    parts: defaultdict[str, list[_Part]] = defaultdict(list)
    for file in files:
        for name, part in _parts(file):
            parts[name].append(part)
    for name, shape in shapes.items():
        parts[name].sort(key=lambda part: part.offsets)
        if not _is_whole(parts[name], shape):
            raise OSError(f"parts of {name} are missing in {path}.parts: its disk does not show what was written there")
    names = sorted(shapes, key=lambda name: (-parts[name][0].width, name))  # as safetensors has them: wide ones aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + sum(part.num_bytes for part in parts[name])
        header[name] = {"dtype": parts[name][0].dtype, "shape": shapes[name], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as joined:
        joined.write(_LENGTH.pack(len(text)) + text)
        for name in names:
            for part in parts[name]:
                with part.file.open("rb", buffering=0) as source:  # there may be more files than may be open at once
                    _copy(part, source, joined)


def _numbered(tensors: dict[str, Tensor], *, num_bytes: int) -> dict[str, int]:
    """Share tensors out over files of so many bytes, numbered from 1."""
    numbers, begun = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + begun // num_bytes
        begun += tensor.numel() * tensor.element_size()
    return numbers


@contextmanager
def _own_failures(rank: int, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Raise what has failed in this process; of another one wait for the end, which it says the reason of."""
    try:
        yield
    except CheckpointException as error:
        if rank in error.failures:
            raise error.failures[rank][0] from None
        dist.barrier(group=group)  # raises when the other has left
        raise


@dataclass(frozen=True)
class _Part:
    """What one file holds of a tensor: where its bytes lie in the file, and its numbers in the tensor."""

    file: Path
    start: int
    num_bytes: int
    dtype: str
    offsets: list[int]
    shape: list[int]

    @property
    def width(self) -> int:
        """Bits a number, as the dtype's name has them; BOOL has none."""
        return int("".join(filter(str.isdigit, self.dtype)) or 8)


def _parts(file: Path) -> Iterator[tuple[str, _Part]]:
    with file.open("rb") as opened:
        (length,) = _LENGTH.unpack(opened.read(_LENGTH.size))
        header = json.loads(opened.read(length))
    places = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        offsets = places[name]["saved_offsets"]
        yield name, _Part(file, _LENGTH.size + length + start, end - start, entry["dtype"], offsets, entry["shape"])


def _is_whole(parts: list[_Part], shape: list[int]) -> bool:
    """Say whether parts make up a tensor; they follow each other along the first dimension, as `fully_shard` cuts."""
    num_rows, others = 0, shape[1:]
    for part in parts:
        if part.offsets != [num_rows, *[0] * len(others)][: len(shape)] or part.shape[1:] != others:
            return False
        num_rows += math.prod(part.shape[:1])
    return bool(parts) and [num_rows, *others][: len(shape)] == shape


def _copy(part: _Part, source: IO[bytes], target: IO[bytes]) -> None:
    source.seek(part.start)
    left = part.num_bytes
    while left:
        chunk = source.read(min(left, _CHUNK))
        if not chunk:
            raise OSError(f"{part.file} has become shorter")
        target.write(chunk)
        left -= len(chunk)
