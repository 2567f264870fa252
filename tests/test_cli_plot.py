"""Proves what the pictures of runs contain; how they look was judged by eye."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import relora_opt_cli.plot as plot
from relora_opt_cli.errors import UserError
from relora_opt_cli.metrics import Row

NUM_UPDATES, WARM_START, RESTART_EVERY = 400, 100, 60


def make_run(folder: Path, *, start: float = 10.0, num_updates: int = NUM_UPDATES, eval_every: int = 20) -> Path:
    """Write the metrics of a run whose loss falls from `start` to about 4, with a warm start and restarts."""
    rows = []
    for update in range(num_updates + 1):
        is_warm = update <= WARM_START
        loss = 4 + (start - 4) * math.exp(-update / 10)
        rows.append(
            Row(
                update=update,
                tokens=1000 * update,
                loss=loss if update else None,
                val_loss=loss if eval_every and update % eval_every == 0 else None,
                lr=1e-3,
                grad_norm=None,
                tokens_per_second=None,
                restarts=0 if is_warm else (update - WARM_START) // RESTART_EVERY,
                phase="warm_start" if is_warm else "low_rank",
            )
        )
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the figures that are saved."""
    saved: list[Any] = []
    save = plot.save_figure
    monkeypatch.setattr(plot, "save_figure", lambda figure, out: saved.append(figure) or save(figure, out))
    return saved


def legend_texts(legend: Any) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("num_updates", [1, 2, 7, 20, 600])
def test_ticks_stand_at_updates(num_updates: int, tmp_path: Path, figures: list[Any]) -> None:
    plot.plot_runs([make_run(tmp_path / "run", num_updates=num_updates)], None)
    ticks = figures[0].axes[1].get_xticks()
    assert [float(tick) for tick in ticks] == [round(tick) for tick in ticks]
    assert sum(0 <= tick <= num_updates for tick in ticks) >= 2


def test_one_run_becomes_a_png_of_1200_by_800_in_its_folder(tmp_path: Path) -> None:
    picture = plot.plot_runs([make_run(tmp_path / "run")], None)
    data = picture.read_bytes()
    assert picture == tmp_path / "run" / "curves.png"
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (1200, 800)


def test_one_run_shows_losses_rate_restarts_and_the_labelled_switch(tmp_path: Path, figures: list[Any]) -> None:
    plot.plot_runs([make_run(tmp_path / "run")], None)
    losses, rates = figures[0].axes
    assert losses.get_ylabel() == "loss (nats per token)"
    assert rates.get_ylabel() == "effective learning rate"
    assert rates.get_xlabel() == "updates"
    for axes in (losses, rates):
        vertical = [line.get_xdata()[0] for line in axes.lines if list(line.get_xdata()) == [line.get_xdata()[0]] * 2]
        assert vertical == [160, 220, 280, 340, 400, WARM_START]
    assert "switch to low rank" in [text.get_text() for text in losses.texts]
    names = ["training loss", "training loss, smoothed", "validation loss", "restart"]
    assert legend_texts(losses.get_legend()) == names
    top = losses.child_axes[0]
    assert top.get_xlabel() == "tokens trained on"
    assert top.get_xlim()[1] == pytest.approx(1000 * losses.get_xlim()[1])


def test_a_warm_start_in_the_middle_has_both_switches_labelled(tmp_path: Path, figures: list[Any]) -> None:
    run = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[:51]:
        row["phase"] = "low_rank"
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot.plot_runs([run], None)
    losses = figures[0].axes[0]
    places = {text.get_text(): text.xy[0] for text in losses.texts if "switch" in text.get_text()}
    assert places == {"switch to full rank": 50, "switch to low rank": WARM_START}


def test_first_losses_that_would_flatten_the_rest_are_cut_off_and_said(tmp_path: Path, figures: list[Any]) -> None:
    plot.plot_runs([make_run(tmp_path / "run", start=11.25)], None)
    losses = figures[0].axes[0]
    assert losses.get_ylim()[1] < 6
    assert "not shown: the first losses, up to 11.25" in [text.get_text() for text in losses.texts]


def test_losses_that_flatten_nothing_are_all_shown(tmp_path: Path, figures: list[Any]) -> None:
    plot.plot_runs([make_run(tmp_path / "run", num_updates=8)], None)
    losses = figures[0].axes[0]
    assert losses.get_ylim()[1] > 10
    assert not losses.texts


@pytest.mark.parametrize("num_updates", [0, 1, 2])
def test_a_run_that_has_just_begun_can_be_drawn(tmp_path: Path, num_updates: int) -> None:
    assert plot.plot_runs([make_run(tmp_path / "run", num_updates=num_updates)], None).is_file()


def test_several_runs_share_axes_and_are_told_apart_by_their_folders(tmp_path: Path, figures: list[Any]) -> None:
    names = ["full_rank", "_hidden", "$x_1$"]
    runs = [make_run(tmp_path / name) for name in names]
    picture = plot.plot_runs(runs, tmp_path / "new" / "all.svg")
    assert picture.read_text().startswith("<?xml")
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "tokens trained on"
    assert axes.get_ylabel() == "validation loss (nats per token)"
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 3
    assert list(axes.lines[0].get_xdata())[:3] == [0, 20_000, 40_000]
    shown = [text.split(" (")[0] for text in legend_texts(figures[0].legends[0])]
    assert shown == ["full_rank", "./_hidden", r"\$x_1\$"]


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path, figures: list[Any]) -> None:
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")]
    plot.plot_runs(runs, tmp_path / "all.png")
    assert [text.split(" (")[0] for text in legend_texts(figures[0].legends[0])] == [str(run) for run in runs]


def test_thirty_runs_are_all_told_apart_and_the_legend_lies_outside_of_the_data(
    tmp_path: Path, figures: list[Any]
) -> None:
    plot.plot_runs([make_run(tmp_path / f"run-{number}") for number in range(30)], tmp_path / "all.png")
    (axes,) = figures[0].axes
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 30
    legend = figures[0].legends[0].get_window_extent()
    assert not legend.overlaps(axes.get_tightbbox())
    assert legend.x0 >= 0
    assert legend.x1 <= 1200
    assert axes.get_window_extent().height > 250


def test_a_run_without_losses_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"has no losses in its metrics\.jsonl yet"):
        plot.plot_runs([tmp_path], None)


def test_a_folder_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read metrics '.*metrics\.jsonl'"):
        plot.plot_runs([tmp_path], None)


def test_comparing_a_run_without_validation_is_an_error_that_names_it(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "unevaluated", eval_every=0)]
    with pytest.raises(UserError, match="unevaluated' has no validation loss"):
        plot.plot_runs(runs, tmp_path / "all.png")


def test_a_picture_of_unknown_kind_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"curves\.docx' \(out\): end its name in one of .*png"):
        plot.plot_runs([make_run(tmp_path / "run")], tmp_path / "curves.docx")


def test_no_run_is_an_error() -> None:
    with pytest.raises(UserError, match="no run to plot"):
        plot.plot_runs([], None)


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import relora_opt_cli.plot, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
