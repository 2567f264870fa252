"""Proves what metrics.jsonl survives, and that the view of a run is readable on every kind of output."""

from __future__ import annotations

import io
import json
import os
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from relora_opt_cli.errors import UserError
from relora_opt_cli.metrics import MetricsFile, Row, read_metrics, truncate_metrics
from relora_opt_cli.report import Summary, View, print_summary
from rich.console import Console

OLD_KEYS = ["update", "tokens", "loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "restarts", "phase"]
KEYS = [*OLD_KEYS, "low_rank_ratio", "update_rms", "skips", "skip_reason"]
ROW = Row(
    update=7,
    tokens=7168,
    loss=4.25,
    val_loss=4.5,
    lr=1e-3,
    grad_norm=0.5,
    tokens_per_second=12345.6,
    restarts=1,
    phase="low_rank",
)
SUMMARY = Summary(
    val_loss_start=8.0,
    val_loss_switch=5.0,
    val_loss_end=4.0,
    updates=600,
    tokens=1_228_800,
    restarts=3,
    trainable=1_234_567,
    parameters=8_765_432,
    optimizer_bytes=9_876_536,
    full_rank_bytes=70_123_456,
    tokens_per_second=12345.6,
    seconds=3723.4,
    run=Path("runs/a-rather-long-name-of-a-run-that-would-not-fit-into-a-table-of-eighty-columns/[demo]"),
    export=None,
    curves=Path("runs/x/curves.png"),
    next_command='relora-opt generate runs/x --prompt "The state of the union is"',
)

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
rows = st.builds(
    Row,
    update=st.integers(0, 10**9),
    tokens=st.integers(0, 10**15),
    loss=numbers,
    val_loss=numbers,
    lr=st.floats(0, 1),
    grad_norm=numbers,
    tokens_per_second=numbers,
    restarts=st.integers(0, 1000),
    phase=st.sampled_from(["warm_start", "low_rank", "full_rank"]),
    low_rank_ratio=numbers,
    update_rms=numbers,
    skips=st.integers(0, 100),
    skip_reason=st.none() | st.text(),
)


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(row.to_json() + "\n" for row in rows))
    return path


def a_run(num_updates: int, *, restart_every: int, eval_every: int) -> list[Row]:
    """Return the rows of a low-rank run."""
    return [
        replace(
            ROW,
            update=update,
            restarts=update // restart_every,
            loss=5.0 if update else None,
            val_loss=6.0 if update % eval_every == 0 else None,
        )
        for update in range(num_updates + 1)
    ]


def plain(num_updates: int, rows: list[Row]) -> list[str]:
    """Return the lines that a run prints on something that is no terminal."""
    console = Console(file=io.StringIO(), force_terminal=False)
    with View(num_updates, console=console) as view:
        for row in rows:
            view.row(row, next_restart=None)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_row_has_exactly_the_keys_of_metrics_jsonl() -> None:
    assert list(json.loads(ROW.to_json())) == KEYS


@given(st.lists(rows, max_size=4))
def test_rows_are_read_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    path = write(tmp_path_factory.mktemp("rows") / "metrics.jsonl", rows)
    assert read_metrics(path) == rows


def test_a_row_from_before_there_were_more_numbers_is_read(tmp_path: Path) -> None:
    values = json.loads(ROW.to_json())
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({key: values[key] for key in OLD_KEYS}) + "\n")
    assert read_metrics(path) == [ROW]
    truncate_metrics(path, after_update=ROW.update)
    assert read_metrics(path) == [ROW]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_become_null(value: float) -> None:
    assert json.loads(replace(ROW, loss=value).to_json())["loss"] is None


@pytest.mark.parametrize("length", [1, 20, len(ROW.to_json()) - 1])
def test_a_torn_last_line_is_dropped(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "metrics.jsonl", [ROW, ROW])
    path.write_text(path.read_text() + ROW.to_json()[:length])
    assert read_metrics(path) == [ROW, ROW]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{torn", "line 2 is not JSON: '{torn'"),
        ("", "line 2 is not JSON"),
        ('{"update": 1}', "line 2 does not have the keys update, tokens,"),
        (ROW.to_json().replace("}", ', "more": 1}'), "line 2 does not have the keys"),
        (ROW.to_json().replace("4.25", '"low"'), 'line 2 has loss = "low"'),
        (ROW.to_json().replace('"low_rank"', '"lukewarm"'), 'line 2 has phase = "lukewarm"'),
        (ROW.to_json().replace('"update": 7', '"update": true'), "line 2 has update = true"),
    ],
)
def test_a_bad_line_is_an_error_that_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "metrics.jsonl", [ROW])
    path.write_text(path.read_text() + line + "\n" + ROW.to_json() + "\n")
    with pytest.raises(UserError, match=re.escape(f"{path}, {message}")):
        read_metrics(path)


@given(
    st.binary(max_size=60) | st.sampled_from([b"[" * 10**5, b"9" * 5000, b'{"update": ' + b"[" * 10**5]), st.booleans()
)
def test_whatever_stands_in_the_metrics_is_read_or_costs_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, line: bytes, has_more: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(line + (b"\n" + ROW.to_json().encode() + b"\n" if has_more else b""))
    message, rows = "", []
    try:
        rows = read_metrics(path)
    except UserError as error:
        message = str(error)
    assert rows == []  # no random bytes are a row; a last line alone is torn
    assert len(message.splitlines()) <= 1
    assert len(message) < 500


def test_missing_metrics_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read metrics '.*metrics\.jsonl': No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_truncation_keeps_the_rows_up_to_an_update_and_leaves_nothing_else_behind(tmp_path: Path) -> None:
    rows = a_run(10, restart_every=4, eval_every=5)
    path = write(tmp_path / "metrics.jsonl", rows)
    path.write_text(path.read_text() + '{"update": 11, "tok')
    truncate_metrics(path, after_update=6)
    assert path.read_text() == "".join(row.to_json() + "\n" for row in rows[:7])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_row_that_finds_no_room_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        closing(MetricsFile(tmp_path / "metrics.jsonl")) as file,
        pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space"),
    ):
        file.write("{}\n")
    with pytest.raises(UserError, match=r"nowhere/metrics.jsonl cannot be written: No such file"):
        MetricsFile(tmp_path / "nowhere" / "metrics.jsonl")


def test_rows_are_written_at_once(tmp_path: Path) -> None:
    with closing(MetricsFile(tmp_path / "metrics.jsonl")) as file:
        file.write("a\n")
        file.write("b\n")
        assert (tmp_path / "metrics.jsonl").read_text() == "a\nb\n"


def test_truncating_missing_metrics_does_nothing(tmp_path: Path) -> None:
    truncate_metrics(tmp_path / "metrics.jsonl", after_update=6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_updates", [1, 30, 600, 20_000])
def test_plain_lines_are_few_and_miss_no_evaluation_restart_or_end(num_updates: int) -> None:
    rows = a_run(num_updates, restart_every=max(1, num_updates // 7), eval_every=max(1, num_updates // 11))
    lines = plain(num_updates, rows)
    evaluated = [row.update for row in rows if row.val_loss is not None]
    assert sum("val loss" in line for line in lines) == len(evaluated)
    assert [int(line.split("  restart ")[1]) for line in lines if "  restart " in line] == list(
        range(1, rows[-1].restarts + 1)
    )
    assert f"update {num_updates}/{num_updates}" in lines[-1]
    assert len(lines) <= 31 + len(evaluated) + rows[-1].restarts


def test_a_plain_line_says_what_the_row_knows_and_nothing_else() -> None:
    (line,) = plain(600, [replace(ROW, update=0, loss=None, grad_norm=0.0, tokens_per_second=None)])
    assert line.startswith("update   0/600  low rank    val loss 4.5000  lr 1.00e-03  grad norm 0  memory ")
    assert line.endswith("  eta -")


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_a_dumb_terminal_gets_plain_lines(environment: dict[str, str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ=environment)
    with View(10, console=console) as view:
        view.row(ROW, next_restart=None)
    assert "\x1b" not in console.file.getvalue()  # type: ignore[attr-defined]


def live(width: int, **environment: str) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=24, _environ={"TERM": "xterm", **environment}
    )


def without_escapes(console: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [20, 35, 60, 100, 300])
def test_the_panel_fits_its_terminal_and_shows_every_number(width: int) -> None:
    console = live(width)
    with View(20_000, console=console) as view:
        view.row(replace(ROW, update=10_000), next_restart=12_000)
        view.row(replace(ROW, update=10_001, val_loss=None), next_restart=12_000)
    text = without_escapes(console)
    assert max(len(line) for line in re.split(r"[\r\n]", text)) < width
    if width >= 60:
        for words in ("10,001/20,000", "loss (smoothed) 4.2500", "val loss 4.5000 at 10,000", "learning rate 1.00e-03"):
            assert words in text
        for words in ("gradient norm 0.5", "tokens/s 12,346", "memory", "cycle 2", "restart in 1,999 updates", "eta"):
            assert words in text


def test_no_color_is_honoured() -> None:
    console = live(80, NO_COLOR="1")
    with View(10, console=console) as view:
        view.row(ROW, next_restart=None)
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_cursor_comes_back_whatever_ends_the_run(error: type[BaseException]) -> None:
    console = live(80)

    def end_badly() -> None:
        with View(10, console=console) as view:
            view.row(ROW, next_restart=None)
            raise error

    with pytest.raises(error):
        end_badly()
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    assert output.endswith("\n\x1b[?25h")


def test_a_message_is_printed_literally() -> None:
    for console in (live(80), Console(file=io.StringIO(), force_terminal=False)):
        with View(10, console=console) as view:
            view.say("out: runs/[demo]")
        assert "out: runs/[demo]" in without_escapes(console)


def test_the_smoothed_loss_recovers_from_a_loss_that_was_not_finite() -> None:
    console = live(80)
    with View(10, console=console) as view:
        for update, loss in enumerate([5.0, float("nan"), 4.0], start=1):
            view.row(replace(ROW, update=update, loss=loss), next_restart=None)
    assert "loss (smoothed) 4.0000" in without_escapes(console)


def test_the_summary_says_every_number_and_keeps_paths_and_command_in_one_piece() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    print_summary(SUMMARY, console=console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines == [
        "validation loss at the start   8.0000  (perplexity 2,980.96)",
        "validation loss at the switch  5.0000  (perplexity 148.41)",
        "validation loss at the end     4.0000  (perplexity 54.60)",
        "restarts                       3",
        "trainable parameters           1,234,567 of 8,765,432 (14.1%)",
        "optimizer state                9.88 MB (14.1% of full-rank AdamW's 70.1 MB)",
        "trained on                     1,228,800 tokens in 600 updates",
        "tokens/s                       12,346",
        "time in updates                1:02:03",
        f"run     {SUMMARY.run}",
        "curves  runs/x/curves.png",
        f"next    {SUMMARY.next_command}",
    ]


def test_the_summary_leaves_out_losses_that_were_not_measured_and_bears_any_loss() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    print_summary(replace(SUMMARY, val_loss_switch=None, val_loss_end=1e4), console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "switch" not in text
    assert "10000.0000  (perplexity inf)" in text


@pytest.mark.parametrize(
    ("seconds", "size", "words"),
    [
        (0.2, 0, ("0:00", "0 B")),
        (59.6, 999_600, ("1:00", "1 MB")),
        (90_061, 1_234_000_000_000_000, ("1d 1:01:01", "1.23 PB")),
    ],
)
def test_times_and_sizes_read_well_at_every_scale(seconds: float, size: int, words: tuple[str, str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    print_summary(replace(SUMMARY, seconds=seconds, optimizer_bytes=size), console=console)
    lines = [re.split("  +", line.rstrip()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    table = {line[0]: line[1] for line in lines if len(line) > 1}
    assert table["time in updates"] == words[0]
    assert table["optimizer state"].startswith(f"{words[1]} (")
