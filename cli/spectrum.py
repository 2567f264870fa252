"""The rank of a weight change: singular values of AFTER - BEFORE, by kind of layer.

One cycle changes a weight by a matrix of rank r at most; the sum of k cycles can reach k r. The paper shows it by these
spectra (Lialin et al. 2023, arXiv 2307.05695, its rank analysis), and counts the singular values on either side of 0.1.
A kind is what is left of a weight's name without the layer's number: q_proj, up_proj, ...

Files are read one pair of tensors at a time; models larger than memory are all right.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UserError
from .place import Place
from .plot import COLOURS, label_text, new_figure, save_figure, style_axes
from .record import WEIGHTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THRESHOLD = 0.1


@dataclass(frozen=True, eq=False)
class KindSpectrum:
    """The spectra of all weights of one kind.

    Args:
        kind: the layer's name without its number, as short as the other kinds allow.
        shape: (out, in) of every weight of the kind.
        singular_values: (number of matrices, min(out, in)), each row descending, in the weights' own units.
    """

    kind: str
    shape: tuple[int, int]
    singular_values: Tensor

    @property
    def num_matrices(self) -> int:
        """Number of weights of the kind."""
        return len(self.singular_values)

    @property
    def num_above(self) -> float:
        """How many singular values exceed THRESHOLD, mean over matrices."""
        return float((self.singular_values > THRESHOLD).sum(1).double().mean())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values normalised to sum 1, mean over matrices; 0 for no change.

        Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO.
        """
        sums = self.singular_values.sum(1, keepdim=True)
        shares = self.singular_values / sums.where(sums > 0, 1.0)
        ranks = torch.special.entr(shares).sum(1).exp()
        return float(ranks.where(sums.squeeze(1) > 0, 0.0).mean())

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over squared largest singular value, mean over matrices; 0 for no change."""
        largest = self.singular_values[:, :1]
        ratios = self.singular_values / largest.where(largest > 0, 1.0)
        return float(ratios.square().sum(1).mean())

    @property
    def largest(self) -> float:
        """The largest singular value of all."""
        return float(self.singular_values.max())

    @property
    def frobenius(self) -> float:
        """Frobenius norm, mean over matrices."""
        return float(self.singular_values.square().sum(1).sqrt().mean())


def spectrum(before: Path, after: Path) -> list[KindSpectrum]:
    """Return the spectra of the change of every 2-D weight that both models hold, in the order of the kinds' names.

    Args:
        before: a .safetensors file, or a folder with model.safetensors or the index of its shards.
        after: the same.

    Raises:
        UserError: a file is missing, unreadable or a damaged checkpoint's, no 2-D weight is in both, a weight's shapes
            differ, or a change is not finite.
    """
    for path in (before, after):
        _check(path)
    groups: defaultdict[tuple[str, tuple[int, int]], list[Tensor]] = defaultdict(list)
    with _open(before) as old, _open(after) as new:
        names = [name for name in sorted(old.keys() & new.keys()) if _is_matrix(old, name) or _is_matrix(new, name)]
        if not names:
            raise UserError(f"{before} and {after} share no 2-D weight: give two states of one model")
        for name in names:
            if _shape(old, name) != _shape(new, name):
                shapes = f"{_shape(old, name)} in {before} and {_shape(new, name)} in {after}"
                raise UserError(f"{name!r} has shape {shapes}: give two states of one model")
        for name in names:
            change = _change(old[name].get_tensor(name), new[name].get_tensor(name), name=name)
            groups[_path(name), (change.shape[0], change.shape[1])].append(torch.linalg.svdvals(change).double())
    kinds = _short_names({path for path, _ in groups})
    return [KindSpectrum(kinds[path], shape, torch.stack(rows)) for (path, shape), rows in sorted(groups.items())]


def left_out(before: Path, after: Path) -> str | None:
    """Say how many 2-D weights have no spectrum, because one of the two alone has them; None where there are none."""
    with _open(before) as old, _open(after) as new:
        sides = ((before, old, new), (after, new, old))
        counts = {path: sum(_is_matrix(own, name) for name in own.keys() - other.keys()) for path, own, other in sides}
    said = [f"{count:,} that only {path} has" for path, count in counts.items() if count]
    return f"left out, matrices: {', '.join(said)}" if said else None


def print_spectrum(rows: list[KindSpectrum], *, console: Console) -> None:
    """Print a table, a kind a row; columns are means over the kind's matrices, but for the largest singular value.

    Columns that a narrow console has no room for are left out, and named below.
    """
    columns = {
        "kind": [row.kind for row in rows],
        "matrices": [str(row.num_matrices) for row in rows],
        "shape": [f"{row.shape[0]}x{row.shape[1]}" for row in rows],
        f"above\n{THRESHOLD}": [f"{row.num_above:.1f}" for row in rows],
        "effective\nrank": [f"{row.effective_rank:.1f}" for row in rows],
        "stable\nrank": [f"{row.stable_rank:.1f}" for row in rows],
        "largest": [f"{row.largest:.3g}" for row in rows],
        "Frobenius": [f"{row.frobenius:.3g}" for row in rows],
    }
    left = [name for name in _LEAST_WANTED if _narrowed(columns, console.width, name)]
    table = Table(box=None, padding=(0, 1, 0, 0), title_justify="left", title="singular values of the weight change")
    for name in columns:
        table.add_column(name, justify="left" if name == "kind" else "right", overflow="fold")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    console.print(table)
    if left:
        console.print(f"no room for: {', '.join(name.replace(chr(10), ' ') for name in left)}", highlight=False)


def _narrowed(columns: dict[str, list[str]], width: int, name: str) -> bool:
    """Leave a column out where all of them together are wider than a console; return whether it was."""
    texts = {own: [*own.split("\n"), *cells] for own, cells in columns.items()}
    widths = {own: max(map(len, text)) + 1 for own, text in texts.items()}
    widths["kind"] = min(widths["kind"], _KIND_WIDTH)
    if sum(widths.values()) <= width:
        return False
    del columns[name]
    return True


def plot_spectrum(rows: list[KindSpectrum], out: Path) -> Path:
    """Draw the spectra, a panel a kind, and return the picture's path.

    Raises:
        UserError: the picture cannot be written.
    """
    figure = new_figure()
    num_columns = math.ceil(math.sqrt(len(rows)))
    num_rows = math.ceil(len(rows) / num_columns)
    panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flatten()
    largest = [row.largest for row in rows if row.largest > 0] or [1.0]
    limits = (min(largest) * _FLOOR, max(largest) * 2)
    for axes, row in zip(panels, rows, strict=False):
        _draw(axes, row)
        axes.set(yscale="log", ylim=limits)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    figure.suptitle("Singular values of the weight change, by kind of layer", fontweight="bold")
    figure.supxlabel("index, largest first")
    figure.supylabel("singular value")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=3)
    return save_figure(figure, out)


def _draw(axes: Axes, row: KindSpectrum) -> None:
    indices = range(1, row.singular_values.shape[1] + 1)
    for values in row.singular_values.tolist():
        axes.plot(indices, values, color=COLOURS[0], linewidth=0.6, alpha=0.4)
    axes.plot(indices, row.singular_values.mean(0).tolist(), color=COLOURS[0], linewidth=2, label="mean over layers")
    axes.axhline(THRESHOLD, color=COLOURS[1], linewidth=1.2, linestyle="--", label=str(THRESHOLD))
    shape, rank = f"{row.shape[0]} x {row.shape[1]}", f"effective rank {row.effective_rank:.0f}"
    axes.set_title(f"{label_text(row.kind)}  ({shape}, {rank})", fontsize="medium")
    style_axes(axes)


def _check(path: Path) -> None:
    """Hold a checkpoint's weights against their checksum, whether its folder or its file is given."""
    if path.is_dir() or path.name == WEIGHTS:
        folder = path if path.is_dir() else path.parent
        Place(folder, folder).check()


@contextmanager
def _open(path: Path) -> Iterator[dict[str, Any]]:
    """Open a model's files; yield the open file of every tensor by its name. Tensors are read when asked for."""
    with ExitStack() as stack:
        holders: dict[str, Any] = {}
        for file in _files(path):
            try:
                opened = stack.enter_context(safe_open(str(file), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is not a readable safetensors file ({error}): give another") from error
            holders |= dict.fromkeys(opened.keys(), opened)
        yield holders


def _files(path: Path) -> list[Path]:
    """Return the .safetensors files that a path means."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a model folder or a .safetensors file")
    if path.is_file():
        return [path]
    single, index = path / WEIGHTS, path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{path} holds neither {single.name} nor {index.name}: give a model folder, as of an export")
    try:
        return [path / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} has no 'weight_map' from keys to file names: export the model again") from error


def _shape(holders: dict[str, Any], name: str) -> tuple[int, ...]:
    return tuple(holders[name].get_slice(name).get_shape())


def _is_matrix(holders: dict[str, Any], name: str) -> bool:
    is_floating = holders[name].get_slice(name).get_dtype() in _FLOATING  # quantised weights are skipped
    return is_floating and len(_shape(holders, name)) == 2


def _change(before: Tensor, after: Tensor, *, name: str) -> Tensor:
    """Return after - before in float32, or in float64 where either is."""
    dtype = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    change = after.to(dtype) - before.to(dtype)
    if not change.isfinite().all():
        raise UserError(f"{name!r} changes by nan or infinity: give weights that are finite")
    return change


def _path(name: str) -> str:
    """Return a weight's name without `.weight` and the layers' numbers."""
    return ".".join(part for part in name.removesuffix(".weight").split(".") if not part.isdigit())


def _short_names(paths: set[str]) -> dict[str, str]:
    """Return for every path the shortest end that no other path shares."""

    def ends(path: str) -> Iterator[str]:
        parts = path.split(".")
        return (".".join(parts[-length:]) for length in range(1, len(parts) + 1))

    counts = Counter(end for path in paths for end in ends(path))
    return {path: next((end for end in ends(path) if counts[end] == 1), path) for path in paths}


_LEAST_WANTED = ("Frobenius", "stable\nrank", "matrices", "largest", "shape")
_KIND_WIDTH = 25  # a longer name is folded
_FLOOR = 1e-4  # of the largest singular value: smaller ones are near float32 rounding
_FLOATING = ("F64", "F32", "F16", "BF16")
