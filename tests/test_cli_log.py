"""`--log`: TensorBoard, trackio and W&B get the numbers of metrics.jsonl, once, in stopped and resumed runs too.

TensorBoard runs in every test suite. trackio and W&B run for real, offline, where they are installed; what they are
told is seen with stand-ins everywhere.
"""

import json
import math
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from relora_opt_cli.checkpoint import checkpoints
from relora_opt_cli.errors import UserError
from relora_opt_cli.log import check_logs, remember
from relora_opt_cli.metrics import Row, read_metrics
from relora_opt_cli.resolution import resolve
from relora_opt_cli.train import resume_run, start_run

SHAPE = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
WORDS = "the people of these united states have heard in peace and war that union is strength and so it was"
NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
NAMES += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
WEIGHTS = [f"model.layers.0.{name}.weight" for name in NAMES]
STEPS, EVERY = 14, 4  # the switch after 3, restarts after 8 and 13, evaluations after 0, 3, 4, 8, 12 and 14
EVALUATED = [0, 3, 4, 8, 12, 14]


def needs(name: str) -> Any:
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed: pip install {name}")


@pytest.fixture(autouse=True)
def _quiet_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name in ("WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the options of a run that takes about a second."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir()
        for number in range(12):
            (texts / f"{number}.txt").write_text(" ".join(random.Random(number).choices(WORDS.split(), k=200)))
    defaults = {
        "data": [str(texts)],
        "model": str(folder / "config.json"),
        "out": str(folder / "run"),
        "seq_len": 16,
        "batch_size": 4,
        "steps": STEPS,
        "warm_start": 3,
        "restart_every": 5,
        "restart_warmup": 1,
        "eval_every": EVERY,
        "save_every": 3,
        "keep": 100,
        "rank": 4,
        "dtype": "float32",
    }
    return {**defaults, **changes}


def train(folder: Path, *log: str, **changes: Any) -> Path:
    start_run(resolve(options(folder, log=list(log), **changes)))
    return folder / "run"


def stopped(whole: Path, stop: int) -> Path:
    """Return a copy of a run as it was when it was killed at its end, with its newest checkpoint after `stop`."""
    part = whole.parent / "part" / whole.name
    shutil.copytree(whole, part)
    for path in checkpoints(part):
        if int(path.name) > stop:
            shutil.rmtree(path)
    shutil.rmtree(part / "export")
    return part


def command(folder: Path, *log: str, **changes: Any) -> list[str]:
    words = [sys.executable, "-m", "relora_opt_cli", "pretrain"]
    for name, value in options(folder, log=list(log), **changes).items():
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", str(item)]
    return words


def run(words: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=240)


def expected(rows: list[Row]) -> dict[str, list[tuple[int, float]]]:
    """Return what metrics.jsonl says, by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in vars(row).items():
            if name not in ("update", "phase") and value is not None:
                found.setdefault(name, []).append((row.update, value))
    return found


def assert_told_all(run: Path, told: dict[str, list[tuple[int, float]]]) -> None:
    """A log has every number of metrics.jsonl once, and what the optimizer says of itself at the evaluations."""
    rows = read_metrics(run / "metrics.jsonl")
    for name, pairs in expected(rows).items():
        assert [step for step, _ in told[name]] == [step for step, _ in pairs]
        # TensorBoard keeps 32 bits.
        assert [value for _, value in told[name]] == pytest.approx([value for _, value in pairs], rel=1e-6)
    for name in ("lr_multiplier", "num_trainable", "state_bytes", "full_rank_adamw_bytes", "updates_to_restart"):
        assert [step for step, _ in told[name]] == EVALUATED
    assert [int(value) for _, value in told["updates_to_restart"]] == [8, 5, 4, 5, 1, 4]
    assert told["pruned_share"] == [(8, 1.0), (12, 1.0), (14, 1.0)]
    for weight in WEIGHTS:
        assert [step for step, _ in told[f"low_rank_ratio/{weight}"]] == EVALUATED[1:]
    assert set(told) == {*expected(rows), *SIZES, *(f"low_rank_ratio/{weight}" for weight in WEIGHTS)}


SIZES = {"lr_multiplier", "num_trainable", "state_bytes", "full_rank_adamw_bytes", "updates_to_restart", "pruned_share"}


def test_metrics_jsonl_has_the_optimizers_overall_numbers_at_the_evaluations(tmp_path: Path) -> None:
    rows = read_metrics(train(tmp_path) / "metrics.jsonl")
    assert [row.update for row in rows if row.low_rank_ratio is not None] == EVALUATED[1:]
    assert [row.update for row in rows if row.update_rms is not None] == EVALUATED[2:]  # 3 ended the warm start
    assert [row.low_rank_ratio == 0.0 for row in rows if row.low_rank_ratio is not None] == [True, False, True] + [
        False
    ] * 2
    assert all(row.update_rms > 0 for row in rows if row.update_rms is not None)


def test_full_rank_training_has_no_such_numbers(tmp_path: Path) -> None:
    rows = read_metrics(train(tmp_path, rank=0) / "metrics.jsonl")
    assert {(row.low_rank_ratio, row.update_rms) for row in rows} == {(None, None)}


# ---- TensorBoard


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": 3, "last": 2}', '{"id": "a", "last": "b"}', "[" * 10**5])
def test_a_damaged_note_of_what_was_logged_is_one_sentence_that_names_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "log.json").write_text(content)
    with pytest.raises(UserError, match=r"log\.json is damaged \(.*\): remove it to log as a new run") as caught:
        remember(tmp_path, last=3)
    assert "\n" not in str(caught.value)


@needs("tensorboard")
def test_tensorboard_is_told_what_metrics_jsonl_says(tmp_path: Path) -> None:
    run = train(tmp_path, "tensorboard")
    assert_told_all(run, scalars(run))
    assert len([*(run / "tensorboard").iterdir()]) == 1
    assert not (run / "log.json").exists()  # TensorBoard needs no id


@needs("tensorboard")
@pytest.mark.parametrize("stop", [0, 3, 6, 12])
def test_tensorboard_shows_a_resumed_run_as_one_that_never_stopped(tmp_path: Path, stop: int) -> None:
    whole = train(tmp_path, "tensorboard")
    part = stopped(whole, stop)
    resume_run(part)
    ours, theirs = scalars(part), scalars(whole)
    for told in (ours, theirs):
        del told["tokens_per_second"], told["pruned_share"]  # the first restart of each process comes later
    assert ours == theirs
    assert len([*(part / "tensorboard").iterdir()]) == 2


@needs("tensorboard")
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupted_run_has_told_tensorboard_everything(tmp_path: Path, number: int) -> None:
    words = command(tmp_path, "tensorboard", steps=4000, save_every=4000, eval_every=1000)
    path = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while not (path.exists() and path.read_text().count("\n") > 5):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    rows = read_metrics(path)
    assert scalars(tmp_path / "run")["loss"] == [(row.update, pytest.approx(row.loss)) for row in rows[1:]]


@needs("tensorboard")
@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--shard"]], ids=str)
def test_of_several_processes_the_first_alone_tells(tmp_path: Path, extra: list[str]) -> None:
    python, _, *words = command(tmp_path, "tensorboard")
    # The dashes: torchrun of Python 3.11 takes --log for its own --log-dir, wherever it stands.
    launch = "-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0 -m --"
    done = run([python, *launch.split(), *words, *extra], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_told_all(tmp_path / "run", scalars(tmp_path / "run"))
    assert len([*(tmp_path / "run" / "tensorboard").iterdir()]) == 1


# ---- trackio and W&B, as they are told


class StandIn:
    """Takes what trackio and W&B are told, and keeps it from one run of a process to the next."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.told: list[tuple[int, dict[str, float]]] = []
        self.num_closed = 0
        self.breaks = False

    def init(self, **arguments: Any) -> Any:
        if self.breaks:
            raise RuntimeError("no login\nand more lines")
        self.opened.append(arguments)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.told.append((step, numbers))

    def finish(self) -> None:
        self.num_closed += 1


@pytest.fixture(params=["trackio", "wandb"])
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    stand_in.name = request.param  # type: ignore[attr-defined]
    module = SimpleNamespace(init=stand_in.init, log=stand_in.log, finish=stand_in.finish)
    monkeypatch.setitem(sys.modules, request.param, module)  # type: ignore[arg-type]
    yield stand_in
    assert stand_in.num_closed == len(stand_in.opened)


def by_name(told: list[tuple[int, dict[str, float]]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for step, numbers in told:
        for name, value in numbers.items():
            found.setdefault(name, []).append((step, value))
    return found


def test_they_are_told_what_metrics_jsonl_says(tmp_path: Path, stand_in: Any) -> None:
    run = train(tmp_path, stand_in.name)
    assert_told_all(run, by_name(stand_in.told))
    (opened,) = stand_in.opened
    assert opened["project"] == "relora-opt"
    assert opened["config"]["restart_every"] == 5
    assert all(type(value) in (int, float) for _, numbers in stand_in.told for value in numbers.values())


@pytest.mark.parametrize("stop", [0, 6, 12])
def test_a_resumed_run_goes_on_under_its_id_and_repeats_nothing(tmp_path: Path, stand_in: Any, stop: int) -> None:
    part = stopped(train(tmp_path, stand_in.name), stop)
    resume_run(part)
    assert [step for step, _ in stand_in.told] == list(range(STEPS + 1))
    key = {"trackio": "name", "wandb": "id"}[stand_in.name]
    first, second = (opened[key] for opened in stand_in.opened)
    assert first == second
    assert stand_in.opened[1]["resume"] == "allow"


def test_a_run_that_was_killed_twice_repeats_nothing(tmp_path: Path, stand_in: Any) -> None:
    """After the second time metrics.jsonl ends before what the log has been told."""
    part = stopped(train(tmp_path, stand_in.name), 3)
    lines = (part / "metrics.jsonl").read_text().splitlines(keepends=True)
    resume_run(part)
    (part / "metrics.jsonl").write_text("".join(lines[:6]))
    again = stopped(part, 3)
    resume_run(again)
    assert [step for step, _ in stand_in.told] == list(range(STEPS + 1))


def test_two_runs_have_two_ids(tmp_path: Path, stand_in: Any) -> None:
    train(tmp_path, stand_in.name)
    train(tmp_path, stand_in.name, out=str(tmp_path / "other" / "run"))
    key = {"trackio": "name", "wandb": "id"}[stand_in.name]
    assert len({opened[key] for opened in stand_in.opened}) == 2


def test_a_log_that_cannot_be_opened_ends_the_run_before_it_trains_and_closes_the_others(
    tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = StandIn()
    name = {"trackio": "wandb", "wandb": "trackio"}[stand_in.name]
    monkeypatch.setitem(
        sys.modules,
        name,
        SimpleNamespace(init=other.init, log=other.log, finish=other.finish),  # type: ignore[arg-type]
    )
    stand_in.breaks = True
    message = rf"^log='{stand_in.name}' cannot be opened: no login; mend that and go on with --resume .*run$"
    with pytest.raises(UserError, match=message):
        train(tmp_path, name, stand_in.name)
    assert (len(other.opened), other.num_closed, other.told) == (1, 1, [])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    stand_in.breaks = False
    resume_run(tmp_path / "run")
    assert [step for step, _ in stand_in.told] == list(range(STEPS + 1))


def test_a_run_that_fails_closes_its_logs(tmp_path: Path, stand_in: Any) -> None:
    with pytest.raises(UserError, match="start again with lower rates"):
        train(tmp_path, stand_in.name, lr=1e30, max_grad_norm=math.inf, warmup=0)
    assert stand_in.num_closed == 1


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_what_is_not_installed_is_named_before_any_work_is_done(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(
        UserError, match=rf"log='{name}' cannot be imported \(.*\): pip install \"relora-opt\[{name}\]\""
    ):
        train(tmp_path, name)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_a_folder_called_wandb_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="log='wandb' cannot be imported"):
        check_logs(["wandb"])
    sys.modules.pop("wandb", None)


def test_several_logs_are_told_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = {name: StandIn() for name in ("trackio", "wandb")}
    for name, log in logs.items():
        module = SimpleNamespace(init=log.init, log=log.log, finish=log.finish)
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    train(tmp_path, *logs)
    assert logs["trackio"].told == logs["wandb"].told
    assert [log.num_closed for log in logs.values()] == [1, 1]


# ---- trackio and W&B themselves, offline


def offline_run_and_its_resumption(folder: Path, name: str) -> Path:
    done = run(command(folder, name), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    path = folder / "run"
    for checkpoint in checkpoints(path):
        if int(checkpoint.name) > 6:
            shutil.rmtree(checkpoint)
    shutil.rmtree(path / "export")
    done = run([*command(folder)[:4], "--resume", str(path)], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@needs("trackio")
def test_trackio_keeps_a_run_and_its_resumption_as_one(tmp_path: Path) -> None:
    path = offline_run_and_its_resumption(tmp_path, "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "relora-opt.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    database.close()
    (name,) = {name for name, *_ in rows}
    assert name == f"run-{json.loads((path / 'log.json').read_text())['id']}"
    assert_told_all_but_speed(path, [(step, json.loads(numbers)) for _, step, numbers in rows])


@needs("wandb")
def test_wandb_keeps_a_run_and_its_resumption_under_one_id(tmp_path: Path) -> None:
    path = offline_run_and_its_resumption(tmp_path, "wandb")
    files = sorted(path.glob("wandb/offline-run-*/*.wandb"))
    identity = json.loads((path / "log.json").read_text())["id"]
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    told = []
    for record in (record for file in files for record in records(file)):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            own = {name: value for name, value in items.items() if not name.startswith("_")}
            told.append((items["_step"], own))
    assert_told_all_but_speed(path, told)


def assert_told_all_but_speed(run: Path, told: list[tuple[int, dict[str, float]]]) -> None:
    """metrics.jsonl has the speed of the second time."""
    speeds = {row.update: row.tokens_per_second for row in read_metrics(run / "metrics.jsonl")}
    told = [(step, {**numbers, **speed(speeds[step])}) for step, numbers in told]
    assert_told_all(run, by_name(told))


def speed(value: float | None) -> dict[str, float]:
    return {} if value is None else {"tokens_per_second": value}


def records(file: Path) -> Iterator[Any]:
    """Yield the records of an offline run of W&B: LevelDB's log format behind seven bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from wandb.proto import wandb_internal_pb2
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""
