"""Two processes, gloo: what each holds of a tensor goes into one file, as one process would write it, and back."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from relora_opt_cli import shares
from relora_opt_cli.checkpoint import write_whole
from relora_opt_cli.errors import UserError
from relora_opt_cli.model import Llama, LlamaConfig, init_weights, load_weights
from relora_opt_cli.parallel import World
from relora_opt_cli.shard import shard
from relora_opt_cli.shares import join, read_shares, write_shares
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor, init_device_mesh

SIZE = 2


def world(rank: int) -> World:
    group = dist.group.WORLD
    return World(rank, rank, SIZE, group, patient=group, beside=group)


def tensors() -> dict[str, tuple[Tensor, Placement | None]]:
    """Return tensors with how they lie: None for those that are not sharded."""
    numbers = torch.arange(1.0, 61.0)
    given = {
        "rows": (numbers.view(5, 12), Shard(0)),
        "one row": (numbers[:12].view(1, 12), Shard(0)),
        "vector": (numbers[:7], Shard(0)),
        "stack": (numbers.view(3, 4, 5), Shard(0)),
        "everywhere": (numbers.view(12, 5).bfloat16(), Replicate()),
        "whole": (numbers[:3], None),
        "counter": (torch.tensor(7.0), None),
        "step": (torch.tensor(7), None),
        "random": (torch.arange(11, dtype=torch.uint8), None),
        "ünï": (numbers[:6].view(2, 3), Shard(0)),
        "nothing": (torch.empty(0, 3), None),
    }
    return {name: (tensor.clone(), placement) for name, (tensor, placement) in given.items()}


def laid_out(tensor: Tensor, placement: Placement | None) -> Tensor:
    if placement is None:
        return tensor
    return distribute_tensor(tensor, init_device_mesh("cpu", (SIZE,)), [placement], src_data_rank=None)


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("a tensor was gathered")


def write(rank: int, path: str, num_bytes: int) -> tuple[int, list[int]]:
    """Write; return the number of files, and the bytes of every process's part, as the first one has found them."""
    sizes = [0] * SIZE
    num_files = 0

    def joining(files: list[Path], whole: Path, shapes: dict[str, list[int]]) -> None:
        nonlocal num_files
        num_files = len(files)
        for file in files:
            sizes[int(file.name.split("-")[1]) - 1] += file.stat().st_size - _header(file)
        join(files, whole, shapes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", never)
        patch.setattr(DTensor, "redistribute", never)
        patch.setattr(shares, "join", joining)
        patch.setattr(shares, "_FILE", num_bytes)
        own = {name: laid_out(*given) for name, given in tensors().items()}
        own["counter"] = own["counter"] + rank  # the first process's counts
        write_shares(own, Path(path), world(rank))
    return num_files, sizes


def read(rank: int, folder: str) -> None:
    """Read what a process is to hold, and hold it against the whole."""
    for name, (tensor, placement) in tensors().items():
        expected = laid_out(tensor, placement)
        own = expected.new_zeros(expected.shape) if placement is None else torch.zeros_like(expected)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DTensor, "full_tensor", never)
            read_shares({name: own}, Path(folder), world(rank))
        mine, theirs = ((t.to_local() if isinstance(t, DTensor) else t) for t in (own, expected))
        assert torch.equal(mine, theirs), name
        assert placement is None or own.placements == (placement,)


def _header(file: Path) -> int:
    return 8 + int(struct.unpack("<Q", file.read_bytes()[:8])[0])


@pytest.mark.parametrize("num_bytes", [1 << 26, 100])
def test_a_file_of_shares_is_what_one_process_would_have_written(ranks: Ranks, num_bytes: int, tmp_path: Path) -> None:
    """Whether a process puts all that it holds into one file on the way, or into several."""
    path, alone = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    ((num_files, (first, second)), _) = ranks.run(write, str(path), num_bytes)
    assert (num_files == SIZE) == (num_bytes > 100)
    write_whole({name: tensor for name, (tensor, _) in tensors().items()}, alone)
    assert path.read_bytes() == alone.read_bytes()
    assert path.stat().st_mode == alone.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [path, alone]  # the parts are gone
    whole = alone.stat().st_size - _header(alone)
    assert first + second == whole  # nothing is written twice
    assert max(first, second) < 0.7 * whole


def test_what_is_read_is_what_a_process_is_to_hold(ranks: Ranks, tmp_path: Path) -> None:
    write_whole({name: tensor for name, (tensor, _) in tensors().items()}, tmp_path / "a.safetensors")
    ranks.run(read, str(tmp_path))


def test_parts_are_copied_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors larger than what is copied at once are whole, and files that end too early are noticed."""
    monkeypatch.setattr(shares, "_CHUNK", 16)
    info = '{"x": {"saved_offsets": [%d, 0]}}'
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    numbers = torch.randn(5, 3)
    for file, start, end in zip(reversed(files), (0, 2), (2, 5), strict=True):
        save_file({"x": numbers[start:end].clone()}, file, metadata={"DCP_SHARDING_INFO": info % start})
    shapes = {"x": [5, 3]}
    for some in ([], files[:1], files[1:]):  # a disk that does not show all that another machine has written
        with pytest.raises(OSError, match=r"parts of x are missing in .*x.safetensors.parts"):
            join(some, tmp_path / "x.safetensors", shapes)
    assert not (tmp_path / "x.safetensors").exists()
    join(files, tmp_path / "x.safetensors", shapes)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], numbers)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    os.truncate(files[0], files[0].stat().st_size - 1)
    with pytest.raises(OSError, match=r"1.safetensors has become shorter"):
        join(files, tmp_path / "x.safetensors", shapes)


def write_apart(rank: int, folder: str) -> str:
    """Write from another folder than the first process's."""
    place = Path(folder) / str(rank)
    place.mkdir()
    if rank == 0:  # the others leave before the parts are written
        (place / "a.safetensors.parts").mkdir()
        dist.barrier()
        return ""
    with pytest.raises(UserError, match="which rank 0 has made, is not there: give all machines one folder") as caught:
        write_shares({}, place / "a.safetensors", world(rank))
    return str(caught.value)


def test_machines_without_a_shared_disk_are_told(ranks: Ranks, tmp_path: Path) -> None:
    _, message = ranks.run(write_apart, str(tmp_path))
    assert message.startswith(f"{tmp_path}/1/a.safetensors.parts, which")


def weigh(rank: int, tied: bool, set_weights: Callable[[Llama], None]) -> None:
    """Set the weights of a sharded model; hold what this process has of them against the whole one's."""
    config = LlamaConfig(40, 16, 24, 1, 2, tie_word_embeddings=tied)
    whole = Llama(config)
    set_weights(whole)
    model = shard(config, torch.device("cpu"), world(rank), compile=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", never)
        set_weights(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    own = dict(model.named_parameters())
    assert own.keys() == dict(whole.named_parameters()).keys()
    for name, weight in whole.named_parameters():
        assert torch.equal(own[name].to_local(), weight.detach().chunk(SIZE)[rank]), name


def draw(model: Llama) -> None:
    init_weights(model, seed=3)


class Load:
    """Loads the weights of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, model: Llama) -> None:
        load_weights(model, self.folder)


@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_model_has_the_weights_of_a_whole_one(ranks: Ranks, tied: bool, tmp_path: Path) -> None:
    ranks.run(weigh, tied, draw)
    model = Llama(LlamaConfig(40, 16, 24, 1, 2, tie_word_embeddings=tied))
    draw(model)
    save_file({name: weight.detach() for name, weight in model.named_parameters()}, tmp_path / "model.safetensors")
    ranks.run(weigh, tied, Load(tmp_path))
