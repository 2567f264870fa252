"""An export holds the model's own keys and values, tied weights once, in the same bytes, whole or not at all."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DTYPES, PATHS, batch, differences, jagged_schedule, mlp, relora, stepper
from relora_opt_cli.model import Llama, LlamaConfig, init_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM

from relora_opt import export, save_merged


class Everything(nn.Module):
    """Tied weights, a view, buffers of several kinds, an empty tensor and one that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(5, 4, _weight=torch.randn(5, 4, generator=generator))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.turned = nn.Parameter(torch.randn(3, 4, generator=generator).t())
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("ids", torch.arange(3))
        self.register_buffer("empty", torch.zeros(0, 2))
        self.register_buffer("also_empty", torch.zeros(0, 2))
        self.register_buffer("row", self.embedding.weight.detach()[1])
        self.register_buffer("hidden", torch.ones(2), persistent=False)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def small_llama() -> Llama:
    shape = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, eos_token_id=0
    )
    model = Llama(shape)
    init_weights(model, seed=1)
    return model


def test_keys_and_values_are_the_models_own_and_the_metadata_says_pt(tmp_path: Path) -> None:
    model = Everything()
    path = tmp_path / "model.safetensors"
    assert save_merged(model, path) == [path]
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
    assert not differences(load_file(path), expected)
    assert metadata(path) == {"format": "pt"}
    assert files_of(tmp_path) == ["model.safetensors"]


def test_an_export_loads_into_the_model_it_came_from(tmp_path: Path) -> None:
    save_merged(Everything(), tmp_path / "m.safetensors")
    other = Everything()
    with torch.no_grad():
        other.turned.zero_()
    result = other.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=False)
    assert result.missing_keys == ["head.weight"]
    assert not result.unexpected_keys
    assert torch.equal(other.turned, Everything().turned)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch.compile's own, on import
def test_wrappers_leave_no_trace_in_keys_or_bytes(tmp_path: Path) -> None:
    save_merged(mlp(), tmp_path / "plain.safetensors")
    model = mlp()
    model.first = checkpoint_wrapper(model.first)
    wrapped = torch.compile(nn.DataParallel(model))
    assert "_orig_mod.module.stem.weight" in wrapped.state_dict()
    save_merged(wrapped, tmp_path / "wrapped.safetensors")  # type: ignore[arg-type]
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "wrapped.safetensors").read_bytes()


def test_two_weights_are_never_written_as_one(tmp_path: Path) -> None:
    """A layer may be called `module` without being a wrapper's."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.module = nn.Linear(2, 2, bias=False)

    model, path = Model(), tmp_path / "m.safetensors"
    try:
        save_merged(model, path)
    except ValueError:
        return  # refused aloud is as good
    assert len(load_file(path)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_reaches_floating_tensors_only(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Everything()
    save_merged(model, tmp_path / "m.safetensors", dtype)
    saved = load_file(tmp_path / "m.safetensors")
    for name, tensor in saved.items():
        own = model.state_dict()[name]
        assert torch.equal(tensor, own.to(dtype) if own.is_floating_point() else own)
        assert tensor.dtype == (dtype if own.is_floating_point() else own.dtype)
    assert model.turned.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, "bfloat16", torch.complex64], ids=str)
def test_a_dtype_that_cannot_hold_weights_is_refused_by_name(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match="dtype="):
        save_merged(mlp(), tmp_path / "m.safetensors", dtype)
    assert not files_of(tmp_path)


@pytest.mark.parametrize("size", ["5GB", 200])
def test_the_same_weights_give_the_same_bytes(size: int | str, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files = save_merged(Everything(), tmp_path / name / "m.safetensors", max_shard_size=size)
        contents.append([(file.name, file.read_bytes()) for file in files])
    assert contents[0] == contents[1]


def test_shards_hold_every_tensor_once_within_the_limit_and_the_index_finds_them(tmp_path: Path) -> None:
    model = mlp()
    files = save_merged(model, tmp_path / "model.safetensors", max_shard_size=200)
    shards, index = files[:-1], json.loads(files[-1].read_text())
    assert [file.name for file in files] == files_of(tmp_path)[: len(files)]
    assert files[-1].name == "model.safetensors.index.json"
    assert [file.name for file in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    loaded: dict[str, Tensor] = {}
    for shard in shards:
        part = load_file(shard)
        size = sum(t.numel() * t.element_size() for t in part.values())
        assert size <= 200 or len(part) == 1
        assert not loaded.keys() & part.keys()
        assert {index["weight_map"][name] for name in part} == {shard.name}
        assert metadata(shard) == {"format": "pt"}
        loaded |= part
    state = model.state_dict()
    assert loaded.keys() == state.keys() == index["weight_map"].keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in state.values())


@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_transformers_reads_one_file_and_shards_alike(max_shard_size: str, tmp_path: Path) -> None:
    model = small_llama().eval()
    files = save_merged(model, tmp_path / "model.safetensors", max_shard_size=max_shard_size)
    assert (len(files) == 1) == (max_shard_size == "5GB")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, model(tokens), atol=1e-5)  # the bound, float32


@pytest.mark.parametrize(
    ("spelling", "num_bytes"),
    [(10**3, 1000), ("1KB", 1000), ("1 kb", 1000), ("0.001MB", 1000), ("0.000001gb", 1000)],
)
def test_a_size_may_be_spelled_in_several_ways(spelling: int | str, num_bytes: int, tmp_path: Path) -> None:
    model = nn.ParameterList(nn.Parameter(torch.zeros(125)) for _ in range(4))  # 500 bytes each
    files = save_merged(model, tmp_path / "m.safetensors", max_shard_size=spelling)
    assert len(files) == 4 * 500 // num_bytes + 1


@pytest.mark.parametrize("size", [0, -1, "0KB", "100", "5TB", "GB", "-5MB", "1.2.3MB", "infGB", "nanGB", ""])
def test_a_size_that_is_none_is_refused_with_the_value(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_size="):
        save_merged(mlp(), tmp_path / "m.safetensors", max_shard_size=size)
    assert not files_of(tmp_path)


def test_a_missing_folder_and_a_model_without_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_merged(mlp(), tmp_path / "nowhere" / "m.safetensors")
    with pytest.raises(ValueError, match="ReLU has no parameters or buffers to save"):
        save_merged(nn.ReLU(), tmp_path / "m.safetensors")
    assert not files_of(tmp_path)


@pytest.mark.parametrize("is_half_written", [False, True])
def test_a_failing_write_leaves_the_file_that_was_there(
    is_half_written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    save_merged(mlp(), path)
    before = path.read_bytes()

    def refuse(_: Any, file: Path, **__: Any) -> None:
        if is_half_written:
            Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "save_file", refuse)
    with pytest.raises(OSError, match="No space left"):
        save_merged(mlp(seed=1), path)
    assert path.read_bytes() == before
    assert files_of(tmp_path) == ["m.safetensors"]


def test_a_path_may_be_a_string_and_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for seed in (0, 1):
        assert save_merged(mlp(seed=seed), str(path)) == [path]
        assert torch.equal(load_file(path)["stem.weight"], mlp(seed=seed).stem.weight)


def test_an_export_in_shards_leaves_no_older_file_that_readers_would_prefer(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_merged(mlp(seed=0), path)
    try:
        save_merged(mlp(seed=1), path, max_shard_size=200)
    except (ValueError, FileExistsError):
        return  # refused aloud is as good
    assert not path.exists()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_after_restarts_the_export_is_the_parameters_and_the_model_is_the_exports(
    path: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = mlp(dtype)
    optimizer = relora(model, schedule=jagged_schedule(4, 1, 3))
    step = stepper(path, optimizer, model)
    for u in range(13):
        step(*batch(u, dtype))
    assert optimizer.num_restarts == 2
    save_merged(model, tmp_path / "m.safetensors")
    saved = load_file(tmp_path / "m.safetensors")
    assert saved.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(saved[name], p) for name, p in model.named_parameters())
    fresh = mlp(dtype, seed=1)
    fresh.load_state_dict(saved)
    x, _ = batch(99, dtype)
    assert torch.equal(fresh(x), model(x))


ODD = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "torch.sparse_coo tensor"),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), "torch.sparse_csr tensor"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex128), "tensor of torch.complex128"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "tensor of torch.quint8"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested tensor"),
    "made of others": (lambda: TwoTensor(torch.ones(3), torch.ones(3)), "tensor of type TwoTensor"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")  # torch's: that some of these are prototypes, or deprecated
def test_what_safetensors_cannot_hold_is_refused_by_name_and_may_be_left_out(kind: str, tmp_path: Path) -> None:
    make, what = ODD[kind]
    model = nn.Linear(2, 2)
    model.register_buffer("odd", make())
    with pytest.raises(ValueError, match=rf"^odd is a {what}, which safetensors cannot hold: .* by persistent=False$"):
        save_merged(model, tmp_path / "m.safetensors")
    assert not files_of(tmp_path)
    model.register_buffer("odd", make(), persistent=False)
    save_merged(model, tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == {"weight", "bias"}


@pytest.mark.parametrize(
    ("own", "dtype", "value"),
    [
        (torch.float32, torch.float16, -1e6),
        (torch.bfloat16, torch.float16, 1e5),
        (torch.float64, torch.float32, 1e300),
        (torch.float32, torch.bfloat16, torch.finfo(torch.float32).max),
    ],
    ids=str,
)
def test_a_cast_that_would_make_a_finite_value_infinite_is_refused_by_name(
    own: torch.dtype, dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    model = nn.Linear(2, 2).to(own)
    with torch.no_grad():
        model.bias.fill_(torch.inf)  # not of the cast's making
        model.weight[0, 1] = value
    with pytest.raises(ValueError, match=rf"^weight holds .*, and dtype={dtype} ends at .*: give a wider one, or None"):
        save_merged(model, tmp_path / "m.safetensors", dtype)
    assert not files_of(tmp_path)
    save_merged(model, tmp_path / "m.safetensors")
    with torch.no_grad():
        model.weight[0, 1] = 1
    save_merged(model, tmp_path / "m.safetensors", dtype)
