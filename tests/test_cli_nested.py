"""What is packed is unpacked as it was, type for type and bit for bit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relora_opt_cli.nested import pack, unpack
from safetensors.torch import load_file, save_file

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int64,
    torch.int32,
    torch.bool,
]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(draw(st.sampled_from(DTYPES)))


KEYS = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["$dict", "$tensor", "a.b"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS | st.tuples(KEYS, KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


def is_same(ours: Any, theirs: Any) -> bool:
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        pairs = zip(ours.items(), theirs.items(), strict=True) if len(ours) == len(theirs) else [(0, 1)]
        return all(is_same(mine, other) for mine, other in pairs)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(is_same, ours, theirs))
    if isinstance(ours, float):
        return math.isnan(ours) == math.isnan(theirs) and (
            math.isnan(ours) or (ours == theirs and math.copysign(1, ours) == math.copysign(1, theirs))
        )
    return bool(ours == theirs)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_a_value_comes_back_from_json_and_safetensors_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    plain, held = pack(value)
    path: Path = tmp_path_factory.getbasetemp() / "nested.safetensors"
    save_file(held, path)
    assert is_same(unpack(json.loads(json.dumps(plain, allow_nan=False)), load_file(path)), value)


def test_keys_that_are_spelled_alike_are_kept_apart() -> None:
    value = {1: torch.tensor(1), "1": torch.tensor(2), "a": {"b": torch.tensor(3)}, "a.b": torch.tensor(4)}
    plain, held = pack(value)
    assert sorted(int(tensor) for tensor in held.values()) == [1, 2, 3, 4]
    assert is_same(unpack(plain, held), value)


@pytest.mark.parametrize("value", [object(), {"a": [{1, 2}]}, b"bytes", 1j, torch.float32, len])
def test_what_could_not_be_read_back_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(TypeError, match="which a checkpoint cannot hold"):
        pack(value)


@pytest.mark.parametrize(
    "plain",
    [
        {"$tensor": "none"},
        {"$tensor": []},
        {"$float": "1.5"},
        {"$float": None},
        {"$tuple": 3},
        {"$dict": [[1]]},
        {"$dict": [[[], 1]]},
        {"$dict": 7},
        {"$code": "os.system"},
        {"$tuple": [], "$dict": []},
        [{"a": {"$tuple": [{"$tensor": "0"}]}}],
    ],
    ids=json.dumps,
)
def test_what_was_not_packed_is_refused(plain: Any) -> None:
    with pytest.raises(ValueError, match=r"makes no sense|no kind of value"):
        unpack(plain, {})
