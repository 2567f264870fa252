"""A run in the making: its texts, model and optimizer, and the folder that says what it is.

    runs/x/config.toml     every option, resolved
           config.json     the model's shape
           tokenizer.json
           tokenizer_config.json and what else an export has beside it: see companions.py
           lock            held while a process trains it
           metrics.jsonl   one row an update
           checkpoints/    see checkpoint.py

`new_run` and `prepare_run` build; the loop trains, train.py sequences.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from relora_opt import ReLoRAOptimizer

from .build import make_optimizer, model_config, with_vocabulary
from .checkpoint import checkpoints
from .companions import TOKENIZER_CONFIG, companions, tokenizer_config
from .config import FIELDS, Config
from .config_file import to_toml
from .corpus import Corpus, Settings, prepare
from .device import find_device
from .disk import crc32, write_file
from .errors import UserError
from .export import MODEL_CONFIG, TOKENIZER
from .identity import identity_of
from .lock import LOCK, Lock, locked
from .machine import check_graphs, describe, keep_compiled, keep_freed_memory, set_threads, settle
from .metrics import Row
from .model import Llama, LlamaConfig, check_finite, init_weights, load_weights, weight_files
from .origin import agreed, located, tokenizer_file
from .output import quoted
from .pace import Pace
from .parallel import World
from .place import find_trained
from .plan import describe_texts
from .progress import Progress
from .shard import shard
from .tokens import without_template
from .writer import Writer

METRICS, CONFIG = "metrics.jsonl", "config.toml"
_PLACES = ("data", "tokenizer", "model", "init_from", "out", "device", "threads")  # these may differ by machine


@dataclass
class Run:
    """A run in the making: what the loop works on."""

    config: Config
    folder: Path
    console: Console
    corpus: Corpus
    model: Llama
    optimizer: ReLoRAOptimizer
    progress: Progress
    processes: World
    writer: Writer = field(default_factory=Writer)  # of checkpoints
    unevaluated: Row | None = None  # of the update that the run goes on after, where it owes an evaluation
    identity: dict[str, Any] = field(default_factory=dict)  # what a resumed run is held against
    lock: Lock | None = None  # of the folder; the main process holds it
    saved: int | None = None  # update of the checkpoint that this run has written last, or was restored from

    @property
    def is_sharded(self) -> bool:
        return _is_sharded(self.config, self.processes)

    def check_folder(self) -> None:
        """Refuse to write where the folder is another run's by now."""
        if self.lock is not None:
            self.lock.check()


def new_run(config: Config, processes: World) -> Run:
    """Return a run at its beginning."""
    if config.shard and processes.size == 1:
        raise UserError("shard=True, but there is one process: start several with torchrun, or leave it out")
    config = located(config)
    shape = model_config(config)
    with torch.device("meta"):  # what cannot be low-rank is found before the texts are read
        make_optimizer(Llama(shape), config)
    config = agreed(config, vocab_size=shape.vocab_size)

    def set_weights(model: Llama) -> None:
        if config.init_from:
            find_trained(Path(config.init_from)).check()
            load_weights(model, config.init_from)
            check_finite(model, config.init_from)
            if _is_sharded(config, processes):  # each takes its part of its own files
                processes.check_alike(
                    [crc32(file) for file in weight_files(config.init_from)],
                    lambda _: f"the weights are not those of rank 0 (init_from={config.init_from!r}): copy those",
                )
        else:
            init_weights(model, seed=config.seed)

    return prepare_run(config, shape, processes, set_weights)


def prepare_run(config: Config, shape: LlamaConfig, processes: World, set_weights: Callable[[Llama], None]) -> Run:
    """Read the texts and build what the loop works on."""
    _check_shares(config, processes)
    check_graphs(config, is_sharded=_is_sharded(config, processes))
    set_threads(config.threads)
    folder, console = Path(config.out), Console(quiet=not processes.is_main)
    settings = Settings.of(
        config,
        vocab_size=config.vocab_size or shape.vocab_size,
        tokenizer=_tokenizer_file(config, folder),
        allow_lossy=config.allow_lossy or (folder / TOKENIZER).is_file(),  # a run goes on with what it began with
    )
    corpus = processes.main_first(lambda: prepare(config.data, settings, seq_len=config.seq_len, pace=Pace(console)))
    processes.check_alike(
        corpus.fingerprint, lambda _: f"the texts are not those of rank 0 (data={list(config.data)}): copy those"
    )
    if config.init_from is None:
        corpus = replace(corpus, tokenizer=without_template(corpus.tokenizer))
    shape = with_vocabulary(shape, corpus, config)
    processes.check_alike(shape, lambda other: f"the model is {shape}, and {other} on rank 0: give all the same")
    device = find_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    own = settle(config, num_parameters=shape.num_parameters)
    dtype, is_compiled = processes.from_main((own.dtype, own.compile))
    config = replace(own, dtype=dtype, compile=is_compiled)
    if config.compile:
        keep_compiled()
    say(processes, f"{describe_texts(corpus)}\n{describe(config)}")
    if _is_sharded(config, processes):
        model = shard(shape, device, processes, compile=bool(config.compile))
    else:
        model = Llama(shape).to(device)
    model.model.checkpoints_activations = config.checkpoint_activations
    set_weights(model)
    optimizer = make_optimizer(model, config)
    progress = Progress(update=0, attempts=0, seconds=0.0, corpus=corpus.fingerprint)
    return Run(config, folder, console, corpus, model, optimizer, progress, processes)


@contextmanager
def claimed(folder: Path) -> Iterator[Lock]:
    """Make a run's folder, and hold its lock.

    Raises:
        UserError: where another process is quicker, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with locked(folder, partial(say, World())) as lock:
        check_new(folder)
        yield lock


def write_folder(run: Run) -> None:
    """Write what a run is, before it begins."""
    try:
        write_file(run.folder / MODEL_CONFIG, json.dumps(run.model.config.to_dict(), indent=2).encode() + b"\n")
        write_file(run.folder / TOKENIZER, run.corpus.tokenizer.to_str(pretty=True).encode())
        for name, content in _companions(run).items():
            write_file(run.folder / name, content)
        write_config(run)
        run.identity = identity_of(run.folder)
    except OSError as error:
        raise _unwritable(run.folder, error) from error


def _companions(run: Run) -> dict[str, bytes]:
    """Return what exports of the run have beside the tokenizer: what the model has that it goes on from, if any."""
    own = {TOKENIZER_CONFIG: tokenizer_config(run.corpus.tokenizer, run.model.config, end=run.corpus.eos_id)}
    if run.config.init_from is None:
        return own
    source = find_trained(Path(run.config.init_from)).shape
    has_tokenizer = (source / TOKENIZER).is_file()  # the run's own is no other then
    return {**own, **(companions(source) if has_tokenizer else {})}


def write_config(run: Run) -> None:
    """Write the options of a run, whole or not at all."""
    try:
        write_file(run.folder / CONFIG, to_toml(run.config).encode())
    except OSError as error:
        raise _unwritable(run.folder, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"out={str(folder)!r} cannot be written: {error.strerror or error}; give another folder, or make room"
    )


def check_new(folder: Path) -> None:
    """Refuse a folder that holds something."""
    if not folder.exists() or (folder.is_dir() and all(path.name == LOCK for path in folder.iterdir())):
        return
    if (folder / CONFIG).is_file() and not checkpoints(folder):
        raise UserError(
            f"out={str(folder)!r} holds a run that ended before its first checkpoint: remove it, or give a new folder"
        )
    if (folder / CONFIG).is_file():
        raise UserError(f"out={str(folder)!r} holds a run: give a new folder, or go on with --resume {quoted(folder)}")
    what = "is there and not empty" if folder.is_dir() else "is a file"
    raise UserError(f"out={str(folder)!r} {what}: give a new folder")


def on_device(config: Config, processes: World | None) -> World:
    """Return the processes on their devices; refuse other options than the first one's, but for places."""
    if processes is None:
        return World()
    names = [name for name in FIELDS if name not in _PLACES]

    def message(other: list[Any]) -> str:
        name, theirs = next((n, v) for n, v in zip(names, other, strict=True) if v != getattr(config, n))
        return f"{name}={getattr(config, name)!r}, and {theirs!r} on rank 0: give all processes the same options"

    processes.check_alike([getattr(config, name) for name in names], message)
    return processes.on_device(config.device)


def say(processes: World, text: str) -> None:
    Console(quiet=not processes.is_main).print(text, markup=False, highlight=False, soft_wrap=True)


def _is_sharded(config: Config, processes: World) -> bool:
    return config.shard and processes.size > 1


def _check_shares(config: Config, processes: World) -> None:
    """Refuse a batch that cannot be shared evenly."""
    if config.batch_size % processes.size:
        raise UserError(
            f"batch_size={config.batch_size} does not divide among {processes.size} processes: make it a multiple"
        )
    share = config.batch_size // processes.size
    if share % min(config.micro_batch_size, share):
        raise UserError(
            f"micro_batch_size={config.micro_batch_size} must divide what each of {processes.size} processes has of "
            f"batch_size={config.batch_size}, which is {share}"
        )


def _tokenizer_file(config: Config, folder: Path) -> Path | None:
    """Return the tokenizer that need not be trained: the run's own, the one named, or the one beside the weights."""
    if (folder / TOKENIZER).is_file():
        return folder / TOKENIZER
    return tokenizer_file(config)
