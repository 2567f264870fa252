"""What a command says arrives as far as it can, and its end is quiet or one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

SAY = """
import sys
from relora_opt_cli.config import UserError
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
