"""Long work says how far it is: a bar on a terminal, a line now and then elsewhere, and nothing when it is short."""

import io

import pytest
from relora_opt_cli import pace
from relora_opt_cli.pace import Pace
from rich.console import Console


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_shows_a_bar_with_amount_and_rate_and_nothing_stays() -> None:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=80, legacy_windows=False, _environ={"TERM": "xterm"}
    )
    with Pace(console).stage("tokenizing", total=8 << 20) as advance:
        advance(4 << 20)
    text = shown(console)
    assert "tokenizing" in text
    assert "4 MB, " in text
    assert "MB/s" in text
    assert text.endswith("\x1b[1A\x1b[2K")  # the line is erased


@pytest.mark.parametrize(("total", "expected"), [(8 << 20, "tokenizing: 62% of 8 MB, "), (None, "tokenizing: 5 MB, ")])
def test_elsewhere_a_line_comes_now_and_then(total: int | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    console = Console(file=io.StringIO())
    with Pace(console).stage("tokenizing", total=total) as advance:
        advance(4 << 20)
        assert shown(console) == ""
        now = 42.0
        advance(1 << 19)  # too little to look at the clock
        assert shown(console) == ""
        advance(1 << 19)
    assert shown(console) == f"{expected}0.1 MB/s\n"


def test_short_work_says_nothing_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO())
    with Pace(console).stage("reading", total=None) as advance:
        advance(100 << 20)
    assert shown(console) == ""
