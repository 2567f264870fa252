"""What a command says arrives as far as it can, and its end is quiet or one sentence."""

import io
import os
import select
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import tiny
from relora_opt_cli import app, train
from relora_opt_cli.config_file import to_toml
from relora_opt_cli.output import enduring_output
from relora_opt_cli.parallel import World
from relora_opt_cli.resolution import resolve
from relora_opt_cli.run import say as say_of_a_run

SAY = """
import sys
from relora_opt_cli.errors import UserError
from relora_opt_cli.output import streamed_output
try:
    with streamed_output() as write:
        for number in range({pieces}):
            write("naïve 世界 ")
except UserError as error:
    sys.exit(f"one sentence: {{error}}")
"""


def say(output: int, *, pieces: int = 1, encoding: str = "utf-8") -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SAY.format(pieces=pieces)],
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": encoding},
        stdout=output,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("utf-8", "naïve 世界 \n".encode()), ("latin-1", b"na\xefve ?? \n"), ("ascii", b"na?ve ?? \n")],
)
def test_what_an_encoding_lacks_is_a_question_mark(encoding: str, expected: bytes) -> None:
    assert say(subprocess.PIPE, encoding=encoding).communicate(timeout=60) == (expected, b"")


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    with say(subprocess.PIPE, pieces=1_000_000) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == b"na\xc3\xafv"
        process.stdout.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == b""


def test_a_path_that_an_encoding_lacks_ends_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["relora-opt", "pretrain", "--out", "naïve"])
    monkeypatch.setattr(train, "start_run", lambda config, _: say_of_a_run(World(), config.out))
    with pytest.raises(SystemExit) as end:
        app.main()
    assert not end.value.code
    assert stream.buffer.getvalue() == b"na?ve\n"  # type: ignore[attr-defined]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        process = say(full.fileno())
    _, errors = process.communicate(timeout=60)
    assert errors == b"one sentence: the text cannot be written: No space left on device\n"
    assert process.returncode == 1


def test_an_output_that_is_closed_is_one_sentence() -> None:
    command = f"exec {sys.executable} -c '{SAY.format(pieces=1)}' >&-"
    done = subprocess.run(
        ["sh", "-c", command], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, timeout=60, check=False
    )
    assert done.stderr.startswith(b"one sentence: the standard output is closed")


# ---- output that is not what a command is for


def output(kind: str) -> int:
    """Return a file to write to: one that is always full, one of a terminal that was closed, ..."""
    if kind == "a full disk":
        return os.open("/dev/full", os.O_WRONLY)
    reader, writer = os.openpty() if kind == "a closed terminal" else os.pipe()
    if kind == "a reader that sleeps":
        os.set_blocking(writer, False)
        while select.select([], [writer], [], 0)[1]:
            os.write(writer, bytes(1 << 10))
    else:
        os.close(reader)
    return writer


@pytest.mark.parametrize("kind", ["a closed pipe", "a closed terminal", "a full disk", "a reader that sleeps"])
def test_whatever_becomes_of_its_output_a_run_goes_on_to_its_end(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "run.toml").write_text(to_toml(resolve(tiny.options(tmp_path))))
    monkeypatch.setattr(sys, "argv", ["relora-opt", "pretrain", "--config", str(tmp_path / "run.toml")])
    descriptor = output(kind)
    with ExitStack() as stack, monkeypatch.context() as patch:
        stack.callback(os.close, descriptor)
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, stack.enter_context(open(descriptor, "w", closefd=False, buffering=1)))
        with pytest.raises(SystemExit) as end:
            app.main()
    assert not end.value.code
    assert [row.update for row in tiny.rows(tmp_path / "run")] == list(range(tiny.STEPS + 1))
    assert tiny.end_of(tmp_path / "run")


def test_output_that_arrives_is_the_same_and_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    with enduring_output():
        print("naïve 世界", "x" * 100_000)
        print("to stderr", file=sys.stderr)
        print("unfinished", end="")
    print(" line")
    assert capfd.readouterr() == (f"naïve 世界 {'x' * 100_000}\nunfinished line\n", "to stderr\n")
