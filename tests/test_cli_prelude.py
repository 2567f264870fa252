"""Ctrl-C before a command's work begins ends it without a word."""

import signal
import subprocess
import sys

from relora_opt_cli.prelude import prelude, work_begins

SCRIPT = """
import os, signal, sys
from relora_opt_cli.app import main

class Interrupting:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
sys.argv = ["relora-opt", "export", "run", "--out", "export"]
main()
"""


def test_a_command_that_is_interrupted_while_it_imports_ends_quietly() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_what_an_interrupt_does_is_as_before_when_work_begins_and_when_a_command_ends() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with prelude():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            work_begins()
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with prelude():
            pass
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with prelude():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            work_begins()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
