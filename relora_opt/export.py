"""Merged weights as safetensors, for inference.

The model's parameters are the effective weights already, so there is nothing to merge: this file names, deduplicates
and writes them. Keys are the model's own without wrappers' prefixes, tied weights are written once (under the first
name), the metadata says {"format": "pt"}, and the same weights give the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor, nn

from .select import canonical_name, parallel_paths
from .sharding import is_sharded

_METADATA = {"format": "pt"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def save_merged(
    model: nn.Module,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    max_shard_size: int | str = "5GB",
) -> list[Path]:
    """Write a model's weights and buffers to one safetensors file, or to shards with an index.

    Args:
        model: any module; its state dictionary is what is written.
        path: the file, "model.safetensors" say. Shards are named model-00001-of-00003.safetensors beside it, and their
            index model.safetensors.index.json.
        dtype: floating-point tensors are cast to it; None keeps their own.
        max_shard_size: bytes, or "5GB", "200MB"; a larger single tensor has a shard of its own.

    Returns:
        The files written, the index last.

    Raises:
        ValueError: for an unreadable size, a dtype that is not floating or too narrow for a weight, tensors that are
            sharded, on the meta device or nothing that safetensors holds (sparse, quantized), or a model without any.
        OSError: where the folder does not exist, or the disk refuses.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: save_merged(model, path) takes the module first")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path={path!r} must name the file to write: 'model.safetensors', say")
    path = Path(path)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r} cannot hold weights: give torch.float32, torch.bfloat16 or torch.float16")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={path}: there is no folder {path.parent} to write into")
    if path.is_dir():
        raise IsADirectoryError(f"path={path} is a folder: name the file in it, {path / 'model.safetensors'} say")
    tensors = _merged(model, dtype)
    if not tensors:
        raise ValueError(f"{type(model).__name__} has no parameters or buffers to save")
    shards = _shards(tensors, _num_bytes(max_shard_size))
    index = path.with_name(f"{path.name}.index.json")
    if len(shards) == 1:
        _write(tensors, path)
        index.unlink(missing_ok=True)  # an older export's, of whatever form, must not stand beside the newer one
        return [path]
    files, weight_map = [], {}
    for number, names in enumerate(shards, start=1):
        file = path.with_name(f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}")
        _write({name: tensors[name] for name in names}, file)
        files.append(file)
        weight_map.update(dict.fromkeys(names, file.name))
    content = {"metadata": {"total_size": sum(map(_size, tensors.values()))}, "weight_map": weight_map}
    _replace(index, lambda file: file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n"))
    path.unlink(missing_ok=True)
    return [*files, index]


def _merged(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors to write, by canonical name, each piece of memory once."""
    written: set[tuple[object, ...]] = set()
    tensors: dict[str, Tensor] = {}
    parallel = parallel_paths(model)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if is_sharded(tensor):
            raise ValueError(
                f"{name} is sharded: gather the weights with get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True)) of torch.distributed.checkpoint, and load them into a model that is not sharded"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device and has no values: load some first, by load_state_dict(..., assign=True)"
            )
        _check_plain(name, tensor)
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() > 0 and place in written:
            continue
        written.add(place)
        held = tensor.detach().cpu()
        cast = held if dtype is None or not held.is_floating_point() else _cast(name, held, dtype)
        tensors[canonical_name(name, parallel)] = cast.contiguous()
    return tensors


def _check_plain(name: str, tensor: Tensor) -> None:
    """Refuse what safetensors cannot hold: tensors made of others, without memory of their own, are among it."""
    if hasattr(tensor, "__tensor_flatten__"):
        what = f"tensor of type {type(tensor).__name__}"
    elif tensor.layout is not torch.strided or tensor.is_nested:
        what = "nested tensor" if tensor.is_nested else f"{tensor.layout} tensor"
    elif not _is_known(tensor.dtype):
        what = f"tensor of {tensor.dtype}"
    else:
        return
    raise ValueError(
        f"{name} is a {what}, which safetensors cannot hold: put a plain tensor there (its dequantize() or to_dense(), "
        "say), or leave a buffer out of the state by persistent=False"
    )


def _is_known(dtype: torch.dtype) -> bool:
    try:
        save({"": torch.empty(0, dtype=dtype, device="cpu")})
    except (KeyError, RuntimeError):
        return False
    return True


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor; refuse a dtype in which a finite value would be infinite, or none."""
    cast = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        lost = tensor.isfinite() & ~cast.to(tensor.dtype).isfinite()
        if lost.any():
            raise ValueError(
                f"{name} holds {tensor[lost].abs().max().item():.6g}, and dtype={dtype} ends at "
                f"{torch.finfo(dtype).max:.6g}: give a wider one, or None to keep each tensor's own"
            )
    return cast


def _shards(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + _size(tensor) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _size(tensor)
    return shards


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    owned = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses tensors that share memory
    _replace(path, lambda file: save_file(owned, file, metadata=_METADATA))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file and move it into place, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the user's umask has it; safetensors makes its own file, for the owner alone
        try:
            write(partial)
        except SafetensorError as error:  # of a full disk, say; callers expect what files raise
            raise OSError(f"{path} could not be written: {error}") from error
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _num_bytes(size: int | str) -> int:
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ValueError(f"max_shard_size={size!r} is not a size: write bytes, or '5GB', '200MB'")
    if isinstance(size, str):
        number, unit = size[:-2].strip(), size[-2:].upper()
        if unit not in _UNITS or not number.replace(".", "", 1).isdigit():
            raise ValueError(f"max_shard_size={size!r} is not a size: write bytes, or '5GB', '200MB'")
        size = int(float(number) * _UNITS[unit])
    if size <= 0:
        raise ValueError(f"max_shard_size={size} must be positive")
    return size
