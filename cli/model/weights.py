"""The weights of a Llama: drawn from a seed, or copied from safetensors files.

Keys are Hugging Face's. Everything is checked before anything is copied.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError
from .network import Llama
from .shape import read_json

_DTYPES = ("F64", "F32", "F16", "BF16")  # numbers of other kinds mean something with a scale only


@torch.no_grad()
def init_weights(model: Llama, *, seed: int) -> None:
    """Draw every matrix from normal(0, initializer_range), set norms to 1 and biases to 0.

    One generator on the CPU, in the order of the parameters' names: the same on every device, no global randomness.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 2:
            drawn = torch.empty(parameter.shape, dtype=torch.float32)
            drawn.normal_(0.0, model.config.initializer_range, generator=generator)
            parameter.copy_(_cut(drawn, parameter))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


@torch.no_grad()
def load_weights(model: Llama, folder: Path | str) -> None:
    """Copy model.safetensors, or the shards of its index, into `model` in place, one file at a time.

    Keys must match exactly and shapes too; floating dtypes are converted, and quantized weights refused. A tied weight
    may be stored under either name or both.
    Raises UserError for missing or unreadable files, missing or unexpected keys, different shapes and other dtypes, all
    before anything is copied, and for tied names with different values.
    """
    folder = Path(folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    files = weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _opened(file) as weights:
            for key in weights.keys():  # noqa: SIM118
                stored = weights.get_slice(key)
                _check_dtype(key, stored.get_dtype(), file)
                shapes[key] = tuple(stored.get_shape())
    _check_keys(parameters, shapes, folder)
    copied: set[int] = set()
    for file in files:
        with _opened(file) as weights:
            for key in sorted(parameters.keys() & set(weights.keys())):
                parameter = parameters[key]
                value = _cut(weights.get_tensor(key), parameter)  # read from the disk where it is touched
                if id(parameter) in copied and not torch.equal(parameter, value.to(parameter)):
                    raise UserError(
                        f"{folder} holds two different values for {key!r}: set tie_word_embeddings to false"
                    )
                parameter.copy_(value)
                copied.add(id(parameter))


@torch.no_grad()
def check_finite(model: Llama, folder: Path | str) -> None:
    """Refuse weights that hold nan or infinity: no update would mend them. Of a sharded model, this part is looked at.

    Args:
        folder: whose weights they are.

    Raises:
        UserError: names the first of them.
    """
    for name, parameter in model.named_parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not own.isfinite().all():
            raise UserError(f"{folder} holds nan or infinity in {name!r}: give weights that are finite")


def weight_files(folder: Path | str) -> list[Path]:
    """Return model.safetensors of a folder, or the shards of its index.

    Raises:
        UserError: for neither, or an index that is none.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{folder} holds neither {single.name} nor {index.name}: give a folder of safetensors weights")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} has no 'weight_map' from keys to file names: download or export it again")
    for name in sorted(set(names.values())):
        if name in ("", "..") or name != Path(name).name or not name.isprintable():
            raise UserError(f"{index} names {reprlib.repr(name)}, which is no file of its folder: correct it")
    return [folder / name for name in sorted(set(names.values()))]


def _cut(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a whole tensor, the same in every process, laid out as a parameter: of a sharded one, this part of it."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _check_dtype(key: str, dtype: str, file: Path) -> None:
    if dtype not in _DTYPES:
        raise UserError(
            f"{file} holds {key!r} as {dtype}, and weights are {', '.join(_DTYPES)}: export the model "
            "without quantization"
        )


def _check_keys(parameters: dict[str, nn.Parameter], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    remedy = "use the config.json and the tokenizer that belong to these weights"
    # Llama exports of 2023 also hold the rotary frequencies, which are computed here.
    stored = {key: shape for key, shape in shapes.items() if not key.endswith("rotary_emb.inv_freq")}
    for key in sorted(stored.keys() - parameters.keys()):
        raise UserError(f"{folder} holds {key!r} of shape {stored[key]}, which the model does not have: {remedy}")
    for key in sorted(stored):
        shape = tuple(parameters[key].shape)
        if stored[key] != shape:
            raise UserError(f"{key!r} has shape {stored[key]} in {folder} but {shape} in the model: {remedy}")
    given = {id(parameters[key]) for key in stored}
    for key, parameter in parameters.items():
        if id(parameter) not in given:
            raise UserError(f"{folder} lacks {key!r} of shape {tuple(parameter.shape)}: {remedy}")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(str(file), framework="pt") as weights:
            yield weights
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist although the index lists it: download or export it again") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}): download or export it again") from error
