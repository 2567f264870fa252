"""Proves the spectra of a weight change against changes whose singular values are known."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from relora_opt_cli.disk import flushed
from relora_opt_cli.errors import UserError
from relora_opt_cli.record import TENSORS, WEIGHTS, Record, write_record
from relora_opt_cli.spectrum import KindSpectrum, left_out, plot_spectrum, print_spectrum, spectrum
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

Q = "model.layers.{}.self_attn.q_proj.weight"
UP = "model.layers.{}.mlp.up_proj.weight"


def orthogonal(size: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def matrix(values: list[float], *, m: int, n: int, seed: int = 0) -> Tensor:
    """Return an (m, n) float64 matrix with the given singular values and zeros."""
    S = torch.zeros(m, n, dtype=torch.float64)
    S[range(len(values)), range(len(values))] = torch.tensor(values, dtype=torch.float64)
    return orthogonal(m, seed=seed) @ S @ orthogonal(n, seed=seed + 1)


def save(folder: Path, weights: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def pair(tmp_path: Path, changes: dict[str, Tensor]) -> tuple[Path, Path]:
    """Save weights and the same weights plus changes."""
    generator = torch.Generator().manual_seed(0)
    old = {name: torch.randn(D.shape, generator=generator).to(D.dtype) for name, D in changes.items()}
    return save(tmp_path / "old", old), save(tmp_path / "new", {name: old[name] + changes[name] for name in old})


def test_spectra_are_those_of_the_change_by_kind_over_the_layers(tmp_path: Path) -> None:
    changes = {
        Q.format(0): matrix([3.0, 0.2, 0.05], m=8, n=8),
        Q.format(11): matrix([1.0], m=8, n=8, seed=5),
        UP.format(0): matrix([2.0, 2.0, 2.0, 2.0], m=12, n=8),
        "model.norm.weight": torch.ones(8),
    }
    up, q = spectrum(*pair(tmp_path, changes))
    assert (up.kind, up.shape, up.num_matrices) == ("up_proj", (12, 8), 1)
    assert (q.kind, q.shape, q.num_matrices) == ("q_proj", (8, 8), 2)
    expected = torch.zeros(2, 8, dtype=torch.float64)
    expected[0, :3], expected[1, 0] = torch.tensor([3.0, 0.2, 0.05], dtype=torch.float64), 1.0
    torch.testing.assert_close(q.singular_values, expected, atol=1e-13, rtol=0)  # float64 throughout


def test_statistics_are_those_of_the_definitions() -> None:
    values = torch.tensor([[2.0, 2.0, 2.0, 2.0, 0.0], [3.0, 0.2, 0.1, 0.0, 0.0]], dtype=torch.float64)
    row = KindSpectrum("q_proj", (5, 5), values)
    assert row.num_above == (4 + 2) / 2  # 0.1 does not exceed 0.1
    shares = values[1, :3] / 3.3
    assert row.effective_rank == pytest.approx((4 + float((-shares * shares.log()).sum().exp())) / 2)
    assert row.stable_rank == pytest.approx((4 + (9 + 0.04 + 0.01) / 9) / 2)
    assert row.largest == 3.0
    assert row.frobenius == pytest.approx((4.0 + 9.05**0.5) / 2)


def test_no_change_has_rank_zero_and_can_be_shown(tmp_path: Path) -> None:
    rows = spectrum(*pair(tmp_path, {Q.format(0): torch.zeros(8, 8)}))
    assert (rows[0].effective_rank, rows[0].stable_rank, rows[0].num_above) == (0, 0, 0)
    print_spectrum(rows, console=Console(file=io.StringIO()))
    assert plot_spectrum(rows, tmp_path / "spectrum.png").is_file()


@pytest.mark.parametrize("given", ["folder", "file"])
def test_weights_of_a_damaged_checkpoint_are_not_read(given: str, tmp_path: Path) -> None:
    old, new = pair(tmp_path, {Q.format(0): matrix([1.0], m=8, n=8)})
    save_file({}, new / TENSORS)
    write_record(new, Record({name: flushed(new / name) for name in (WEIGHTS, TENSORS)}, {}))
    after = new if given == "folder" else new / WEIGHTS
    assert spectrum(old, after)
    flip_last_byte(new / WEIGHTS)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged \(its checksum is another"):
        spectrum(old, after)


def test_matrices_that_only_one_of_two_models_has_are_counted(tmp_path: Path) -> None:
    D = torch.ones(4, 4)
    first = save(tmp_path / "first", {Q.format(0): D, Q.format(1): D + 1, "norm": torch.ones(4)})
    second = save(tmp_path / "second", {Q.format(0): D, UP.format(0): D + 1, UP.format(1): D + 2})
    assert left_out(first, first) is None
    assert left_out(first, second) == f"left out, matrices: 1 that only {first} has, 2 that only {second} has"


def test_brackets_in_a_kind_are_shown_as_they_are() -> None:
    out = io.StringIO()
    print_spectrum([KindSpectrum("w[/b]", (4, 4), torch.ones(1, 4))], console=Console(file=out, width=100))
    assert "w[/b]" in out.getvalue()


def test_bfloat16_weights_are_subtracted_in_float32(tmp_path: Path) -> None:
    old = torch.full((4, 4), 1.0, dtype=torch.bfloat16)
    new = (torch.full((4, 4), 1.0) + torch.eye(4) * 2**-7).to(torch.bfloat16)
    rows = spectrum(save(tmp_path / "old", {"a.weight": old}), save(tmp_path / "new", {"a.weight": new}))
    torch.testing.assert_close(rows[0].singular_values, torch.full((1, 4), 2.0**-7, dtype=torch.float64))


def test_shards_and_single_files_read_alike(tmp_path: Path) -> None:
    before, after = pair(tmp_path, {Q.format(0): matrix([1.0], m=8, n=8), UP.format(0): matrix([2.0], m=8, n=8)})
    whole = spectrum(before, after / "model.safetensors")
    weights = {}
    for name, file in ((Q.format(0), "b.safetensors"), (UP.format(0), "a.safetensors")):
        from safetensors.torch import load_file

        save_file({name: load_file(after / "model.safetensors")[name]}, after / file)
        weights[name] = file
    (after / "model.safetensors").unlink()
    (after / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    for a, b in zip(whole, spectrum(before, after), strict=True):
        assert a.kind == b.kind
        assert torch.equal(a.singular_values, b.singular_values)


def test_kinds_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    names = ["h.0.attn.c_proj.weight", "h.1.attn.c_proj.weight", "h.0.mlp.c_proj.weight", "wte.weight"]
    rows = spectrum(*pair(tmp_path, {name: torch.eye(4) for name in names}))
    assert [(row.kind, row.num_matrices) for row in rows] == [("attn.c_proj", 2), ("mlp.c_proj", 1), ("wte", 1)]


def test_weights_of_one_kind_and_several_shapes_are_told_apart(tmp_path: Path) -> None:
    rows = spectrum(*pair(tmp_path, {"layers.0.weight": torch.ones(4, 8), "layers.1.weight": torch.ones(8, 4)}))
    assert [(row.kind, row.shape) for row in rows] == [("layers", (4, 8)), ("layers", (8, 4))]


def test_only_floating_matrices_of_both_are_compared(tmp_path: Path) -> None:
    common = {"a.weight": torch.eye(4), "ids": torch.zeros(2, 2, dtype=torch.int64)}
    before = save(tmp_path / "old", {**common, "gone.weight": torch.eye(4)})
    rows = spectrum(before, save(tmp_path / "new", {**common, "added.weight": torch.eye(4)}))
    assert [row.kind for row in rows] == ["a"]


def test_the_table_has_every_kind_at_80_columns(tmp_path: Path) -> None:
    rows = spectrum(*pair(tmp_path, {Q.format(0): matrix([3.0, 0.2, 0.05], m=8, n=8), UP.format(0): torch.eye(8)}))
    console = Console(file=io.StringIO(), width=80)
    print_spectrum(rows, console=console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[-2].split() == ["up_proj", "1", "8x8", "8.0", "8.0", "8.0", "1", "2.83"]
    assert lines[-1].split() == ["q_proj", "1", "8x8", "2.0", "1.4", "1.0", "3", "3.01"]


@pytest.mark.parametrize(
    ("width", "left"), [(66, "Frobenius"), (58, "Frobenius, stable rank"), (30, "Frobenius, stable")]
)
def test_a_narrow_table_has_fewer_columns_and_no_broken_word(width: int, left: str) -> None:
    console = Console(file=io.StringIO(), width=width)
    print_spectrum([KindSpectrum("down_proj", (1024, 2736), torch.eye(9))], console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"no room for: {left}" in text
    assert {"kind", "above", "0.1", "effective", "rank", "down_proj"} <= set(text.split())
    assert all(len(line) <= width for line in text.splitlines()[:-1])


def test_the_picture_has_a_panel_a_kind(tmp_path: Path) -> None:
    rows = [KindSpectrum(f"kind{i}", (6, 6), torch.linspace(1, 0, 6).repeat(2, 1)) for i in range(7)]
    picture = plot_spectrum(rows, tmp_path / "spectrum.svg").read_text()
    assert all(f"kind{i}" in picture for i in range(7))


def test_different_shapes_are_an_error_that_names_key_and_shapes(tmp_path: Path) -> None:
    before = save(tmp_path / "old", {"a.weight": torch.eye(4)})
    after = save(tmp_path / "new", {"a.weight": torch.ones(4, 5)})
    with pytest.raises(UserError, match=r"'a\.weight' has shape \(4, 4\) in .*old and \(4, 5\) in .*new"):
        spectrum(before, after)


def test_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    before = save(tmp_path / "old", {"a.weight": torch.eye(4)})
    with pytest.raises(UserError, match=r"old and .*new share no 2-D weight"):
        spectrum(before, save(tmp_path / "new", {"b.weight": torch.eye(4)}))


def test_a_change_that_is_not_finite_is_an_error_that_names_the_weight(tmp_path: Path) -> None:
    before = save(tmp_path / "old", {"a.weight": torch.eye(4)})
    with pytest.raises(UserError, match=r"'a\.weight' changes by nan or infinity"):
        spectrum(before, save(tmp_path / "new", {"a.weight": torch.eye(4) / 0}))


def test_missing_and_unreadable_files_are_errors_that_name_them(tmp_path: Path) -> None:
    model = save(tmp_path / "model", {"a.weight": torch.eye(4)})
    empty, torn, lost = tmp_path / "empty", tmp_path / "torn.safetensors", tmp_path / "lost"
    empty.mkdir()
    lost.mkdir()
    torn.write_bytes(b"\x00" * 100)
    index = lost / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a.weight": "shard.safetensors"}}')
    for path, message in (
        (tmp_path / "none", "none does not exist: give a model folder"),
        (empty, r"empty holds neither model\.safetensors nor"),
        (torn, r"torn\.safetensors is not a readable safetensors file"),
        (lost, r"shard\.safetensors is not a readable safetensors file"),
    ):
        with pytest.raises(UserError, match=message):
            spectrum(model, path)
    index.write_text("[]")
    with pytest.raises(UserError, match=r"index\.json has no 'weight_map'"):
        spectrum(model, lost)
