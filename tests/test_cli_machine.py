"""What is left open is settled for the machine at hand, once, and said."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from relora_opt_cli import device, machine
from relora_opt_cli.config import Config
from relora_opt_cli.config_file import to_toml
from relora_opt_cli.errors import UserError
from relora_opt_cli.machine import (
    check_graphs,
    compile_options,
    describe,
    keep_compiled,
    num_cores,
    rounded_products,
    set_threads,
    settle,
    shared_threads,
)
from relora_opt_cli.resolution import resolve

SMALL, LARGE = 10**6, 10**12


@pytest.fixture(autouse=True)
def _has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(machine, "_has_compiler", lambda: True)


def on_cpu(num_parameters: int = SMALL, **options: object) -> Config:
    return settle(resolve({"device": "cpu", **options}), num_parameters=num_parameters)


def test_a_long_run_is_compiled_and_a_short_one_is_not() -> None:
    assert on_cpu(SMALL).compile is False
    assert on_cpu(LARGE).compile is True
    assert on_cpu(SMALL, steps=10**9).compile is True


def test_nothing_is_compiled_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_has_compiler", lambda: False)
    assert on_cpu(LARGE).compile is False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cpu"}, "cuda_graphs=True, but the run is on cpu: say --no-cuda-graphs, or --device cuda"),
        (
            {"device": "cuda", "compile": False},
            "compile=False: it is the compiled step that is recorded; say --",
        ),
        ({"device": "cuda", "shard": True}, "shard=True: it is the step of a whole model that is recorded; say --no-"),
    ],
    ids=str,
)
def test_a_step_that_cannot_be_recorded_is_refused(
    options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "find_device", torch.device)
    with pytest.raises(UserError, match=re.escape(said)):
        check_graphs(resolve({"cuda_graphs": True, **options}), is_sharded="shard" in options)
    check_graphs(resolve(options), is_sharded="shard" in options)


def test_a_step_is_recorded_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_device", torch.device)
    monkeypatch.setattr(machine, "autocast_dtype", lambda *_: torch.bfloat16)
    recorded = settle(resolve({"device": "cuda", "cuda_graphs": True}), num_parameters=SMALL)
    check_graphs(recorded)
    assert compile_options(recorded) == {"mode": "reduce-overhead"}
    assert describe(recorded).startswith("cuda: bfloat16 products, step compiled and replayed")
    assert compile_options(on_cpu(SMALL)) is False
    assert compile_options(on_cpu(LARGE)) is True


def test_what_is_given_stays() -> None:
    assert on_cpu(LARGE, compile=False).compile is False
    assert on_cpu(SMALL, compile=True).compile is True
    assert on_cpu(dtype="float32").dtype == "float32"


def test_the_device_is_settled_by_its_kind_and_one_that_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_cpu(threads=7).threads == 7
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert settle(resolve({}), num_parameters=SMALL).device == "cpu"
    monkeypatch.setattr(machine, "find_device", lambda _: torch.device("cuda", 3))
    monkeypatch.setattr(machine, "autocast_dtype", lambda *_: torch.float32)
    assert settle(resolve({}), num_parameters=SMALL).device == "cuda"  # each process has its own
    assert settle(resolve({"device": "cuda:1"}), num_parameters=SMALL).device == "cuda:1"


@pytest.mark.parametrize(
    ("name", "taken"), [("cpu", "cpu"), ("auto", "auto"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("cuda:2", "cuda")]
)
def test_a_device_that_is_not_to_be_had_is_replaced_by_the_one_of_auto(
    name: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert device.available_device(name) == taken
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert device.available_device(name) == {"auto": "auto"}.get(name, "cpu")


def test_16_bits_are_for_machines_that_multiply_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_cpu().dtype == "bfloat16"
    monkeypatch.setattr(device, "_cpu_multiplies_bf16", lambda: False)
    assert on_cpu().dtype == "float32"


def test_settling_twice_changes_nothing_and_the_file_keeps_it() -> None:
    settled = on_cpu(LARGE)
    assert settle(settled, num_parameters=SMALL) == settled
    assert 'dtype = "bfloat16"' in to_toml(settled)
    assert 'device = "cpu"' in to_toml(settled)
    assert f"threads = {torch.get_num_threads()}\n" in to_toml(settled)
    assert "compile = true" in to_toml(settled)


def test_a_line_says_what_was_picked() -> None:
    number = torch.get_num_threads()
    threads = f"cpu: {number} thread{'s' if number > 1 else ''}, "
    assert describe(on_cpu(SMALL)).startswith(f"{threads}bfloat16 products, step not compiled (")
    assert describe(on_cpu(LARGE, dtype="float32")).startswith(f"{threads}float32, step compiled (")


def test_no_more_threads_than_cores_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        set_threads(3)
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(machine, "num_cores", lambda: 2)
        set_threads(None)
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(machine, "num_cores", lambda: 64)
        set_threads(None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("processes", "threads", "each"), [("1", 8, 8), ("2", 8, 4), ("2", 1, 1), ("16", 8, 1)])
def test_processes_of_a_machine_share_its_cores(
    processes: str, threads: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "num_cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert shared_threads(threads) == each
    assert shared_threads(None) is None


@pytest.mark.parametrize(("text", "cores"), [("max 100000", 8), ("250000 100000", 3), ("1000 100000", 1), ("", 8)])
def test_a_containers_quota_counts(text: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert num_cores() == cores


def test_compiled_code_is_kept_in_the_cache_unless_told_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "relora-opt" / "compiled")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator, and the counters of Linux")
def test_freed_memory_stays_with_the_process() -> None:
    code = """
import numpy as np, resource
from relora_opt_cli.machine import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(2**22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
without, is_kept = faults(), keep_freed_memory()
faults()
print(is_kept, without, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    is_kept, without, kept = done.stdout.split()
    if is_kept != "True":
        pytest.skip("this system's C library has no mallopt")
    assert int(kept) < int(without) / 10


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "medium"), ("float32", "highest")])
def test_products_of_float32_round_only_while_a_run_in_bfloat16_lasts(dtype: str, precision: str) -> None:
    with rounded_products(dtype):
        assert torch.get_float32_matmul_precision() == precision
    assert torch.get_float32_matmul_precision() == "highest"
