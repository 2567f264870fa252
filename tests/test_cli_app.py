"""Every option is a flag, and every mistake costs one line on stderr and exit status 2, before any training."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from relora_opt_cli import app as command_line
from relora_opt_cli import train
from relora_opt_cli.config import FIELDS, Config
from relora_opt_cli.config_file import to_toml
from relora_opt_cli.resolution import resolve
from relora_opt_cli.tokens import END_OF_TEXT, fit_tokenizer

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
PROGRAM = Path(sys.executable).with_name("relora-opt")


def run(*arguments: str) -> int:
    """Run the command line in this process, and return its exit status."""
    before = sys.argv
    sys.argv = ["relora-opt", *arguments]
    try:
        command_line.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configurations with which `pretrain` would have started a run; none is."""
    configs: list[Config] = []
    monkeypatch.setattr(train, "start_run", lambda config, _: configs.append(config))
    return configs


# ---- flags


def flags() -> dict[str, list[str]]:
    pretrain = typer.main.get_command(command_line.app).commands["pretrain"]  # type: ignore[attr-defined]
    return {parameter.name: [*parameter.opts, *parameter.secondary_opts] for parameter in pretrain.params}


SWITCHES = ("allow_lossy", "compile", "cuda_graphs", "checkpoint_activations", "shard")


def test_every_option_is_a_flag_in_kebab_case_and_has_a_help_and_a_panel() -> None:
    expected = {name: [f"--{name.replace('_', '-')}"] for name in (*FIELDS, "config", "resume")}
    for name in SWITCHES:
        expected[name].append(f"--no-{name.replace('_', '-')}")
    assert flags() == expected
    assert all(item.metadata["help"] and item.metadata["panel"] for item in FIELDS.values())


VALUES: dict[str, tuple[list[str], Any]] = {
    "text_field": (["body"], "body"),
    "val_share": (["0.1"], 0.1),
    "tokenizer": (["t.json"], "t.json"),
    "vocab_size": (["300"], 300),
    "seq_len": (["17"], 17),
    "preset": (["60m"], "60m"),
    "model": (["c.json"], "c.json"),
    "init_from": (["folder"], "folder"),
    "steps": (["70"], 70),
    "tokens": (["100000"], 100_000),
    "batch_size": (["6"], 6),
    "micro_batch_size": (["4"], 4),
    "base": (["muon"], "muon"),
    "lr": (["3e-4"], 3e-4),
    "rest_lr": (["2"], 2.0),
    "outer": (["wsd"], "wsd"),
    "warmup": (["3"], 3),
    "min_ratio": (["0.5"], 0.5),
    "weight_decay": (["0.25"], 0.25),
    "log": (["tensorboard"], ("tensorboard",)),
    "betas": (["0.5", "0.75"], (0.5, 0.75)),
    "max_grad_norm": (["inf"], float("inf")),
    "rank": (["0"], 0),
    "alpha": (["32"], 32.0),
    "targets": (["q_proj|k_proj"], "q_proj|k_proj"),
    "factor_lr": (["2.5"], 2.5),
    "init": (["orthogonal"], "orthogonal"),
    "warm_start": (["0"], 0),
    "warm_start_at": (["0"], 0),
    "warm_start_turns": (["1"], 1),
    "restart_every": (["0"], 0),
    "restart_warmup": (["1"], 1),
    "prune": (["magnitude:0.9"], "magnitude:0.9"),
    "dtype": (["bfloat16"], "bfloat16"),
    "device": (["cuda:1"], "cuda:1"),
    "threads": (["3"], 3),
    "out": (["runs/x"], "runs/x"),
    "eval_every": (["5"], 5),
    "save_every": (["5"], 5),
    "keep": (["4"], 4),
    "keep_every": (["10"], 10),
    "max_loss_jump": (["6.5"], 6.5),
    "max_skips": (["3"], 3),
    "seed": (["7"], 7),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_sets_its_option_and_no_other(name: str, started: list[Config]) -> None:
    words, value = VALUES[name]
    assert run("pretrain", f"--{name.replace('_', '-')}", *words) == 0
    assert getattr(started[0], name) == value
    assert started[0] == resolve({name: value})


def test_every_option_has_been_tried() -> None:
    assert {*VALUES, *SWITCHES, "data"} == set(FIELDS)


def test_pretrain_with_no_argument_is_the_defaults(started: list[Config]) -> None:
    assert run("pretrain") == 0
    assert started == [resolve({})]


def test_shard_and_no_shard_are_told_from_each_other(started: list[Config]) -> None:
    for words in (["--shard"], ["--no-shard"], []):
        assert run("pretrain", *words) == 0
    assert [config.shard for config in started] == [True, False, False]


def test_compile_and_no_compile_are_told_from_neither(started: list[Config]) -> None:
    for words in (["--compile"], ["--no-compile"], []):
        assert run("pretrain", *words) == 0
    assert [config.compile for config in started] == [True, False, None]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "A", "B", "C"], ("A", "B", "C")),
        (["--data", "A", "--data", "B"], ("A", "B")),
        (["--data", "A", "B", "--data", "C", "D", "--seed", "1"], ("A", "B", "C", "D")),
        (["--seed", "1", "--data", "A", "B", "--compile"], ("A", "B")),
        (["--data=A", "--data", "B", "C"], ("A", "B", "C")),
        ([], ()),
    ],
    ids=" ".join,
)
def test_data_spreads_over_the_words_that_follow(words: list[str], expected: tuple[str, ...], started: Any) -> None:
    assert run("pretrain", *words) == 0
    assert started[0].data == expected


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path, started: list[Config]) -> None:
    file = tmp_path / "c.toml"
    file.write_text('preset = "60m"\nrank = 7\nlr = 0.5\ndata = ["a", "b"]\ncompile = true\n')
    assert run("pretrain", "--config", str(file), "--lr", "0.25", "--no-compile") == 0
    config = started[0]
    assert (config.preset, config.rank, config.lr, config.data, config.compile) == ("60m", 7, 0.25, ("a", "b"), False)
    assert config.seq_len == 512


def test_a_zero_on_the_command_line_wins_over_the_file(tmp_path: Path, started: list[Config]) -> None:
    file = tmp_path / "c.toml"
    file.write_text("rank = 7\nseed = 3\nrestart_every = 9\n")
    assert run("pretrain", "--config", str(file), "--rank", "0", "--seed", "0", "--restart-every", "0") == 0
    assert (started[0].rank, started[0].seed, started[0].restart_every) == (0, 0, 0)


def test_flags_beside_resume_are_what_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    resumed: list[tuple[Path, Any]] = []
    monkeypatch.setattr(train, "resume_run", lambda folder, options, _: resumed.append((folder, options)))
    assert run("pretrain", "--resume", str(tmp_path)) == 0
    assert run("pretrain", "--resume", str(tmp_path), "--steps", "70", "--no-compile", "--data", "A", "B") == 0
    assert resumed == [(tmp_path, {}), (tmp_path, {"steps": 70, "compile": False, "data": ["A", "B"]})]
    assert run("pretrain", "--resume", str(tmp_path), "--config", "c.toml") == 2
    assert "config='c.toml' does not go with resume: give flags for what is to change" in one_line(capfd)
    assert len(resumed) == 2


@pytest.mark.parametrize("words", [["--nonsense", "1"], ["--steps", "many"], ["extra"], ["--betas", "0.9"], ["--lr"]])
def test_words_that_are_no_flags_or_no_numbers_exit_with_status_2(
    words: list[str], started: list[Config], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("pretrain", *words) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert not started


@pytest.mark.parametrize(
    "words", [["--help"], ["-h"], ["pretrain", "--help"], ["export", "-h"], ["spectrum", "--help"]]
)
def test_help_exits_with_status_0(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 0
    assert "Usage: " in capfd.readouterr().out


# ---- mistakes


class Desk:
    """A folder with all that a run of a second needs, in which one thing at a time is spoiled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        texts = folder / "texts"
        texts.mkdir()
        for number in range(12):
            (texts / f"{number}.txt").write_text(f"{number} {WORDS}. " * 40)
        self.write("config.json", json.dumps(SHAPE))

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def write(self, name: str, contents: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        return str(path)

    def tokenizer(self, size: int) -> str:
        letters = "".join(chr(0x100 + i) for i in range(600))
        texts = [f"{WORDS} {letters[i : i + 3] * 3}" for i in range(len(letters) - 3)]
        path = self.path(f"tokenizer-{size}.json")
        fit_tokenizer(texts, vocab_size=size).save(path)
        return path

    def words(self, **changes: Any) -> list[str]:
        """Return the words of a command line that would train, with some options changed; None leaves one out."""
        options = {
            "data": self.path("texts"),
            "model": self.path("config.json"),
            "out": self.path("run"),
            "seq_len": 16,
            "batch_size": 2,
            "steps": 4,
            "rank": 4,
            **changes,
        }
        given = {f"--{name.replace('_', '-')}": value for name, value in options.items() if value is not None}
        return ["pretrain", *(word for flag, value in given.items() for word in (flag, str(value)))]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Desk(tmp_path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[train.Run]:
    """The runs that got as far as training; none trains."""
    runs: list[train.Run] = []
    monkeypatch.setattr(train, "train", runs.append)
    return runs


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    """Return the only line on stderr."""
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("relora-opt: ")
    return line


def in_use(desk: Desk) -> list[str]:
    desk.write("run/notes", "mine")
    return desk.words()


def a_file_for_a_folder(desk: Desk) -> list[str]:
    desk.write("run", "mine")
    return desk.words()


def below_a_file(desk: Desk) -> list[str]:
    desk.write("file", "mine")
    return desk.words(out=desk.path("file/run"))


def no_weights(desk: Desk) -> list[str]:
    desk.write("export/config.json", json.dumps(SHAPE))
    (desk.folder / "export" / "tokenizer.json").write_bytes(Path(desk.tokenizer(300)).read_bytes())
    return desk.words(model=None, init_from=desk.path("export"))


def config_file(text: str | bytes) -> Callable[[Desk], list[str]]:
    return lambda desk: desk.words(config=desk.write("c.toml", text))


def data(name: str, contents: str | bytes, **changes: Any) -> Callable[[Desk], list[str]]:
    return lambda desk: desk.words(data=desk.write(name, contents), **changes)


def changed(**changes: Any) -> Callable[[Desk], list[str]]:
    return lambda desk: desk.words(**changes)


def a_run_without_checkpoints(desk: Desk) -> list[str]:
    desk.write("run/config.toml", to_toml(resolve({})))
    return ["pretrain", "--resume", desk.path("run")]


def a_run_of_a_later_version(desk: Desk) -> list[str]:
    desk.write("run/config.toml", to_toml(resolve({})) + "novelty = 1\n")
    return ["pretrain", "--resume", desk.path("run")]


LONG = "is longer than names of files may be: give another path"
TOO_LONG: dict[str, dict[str, Any]] = {
    "out": {"out": "x" * 300},
    "model": {"model": "x" * 300},
    "init_from": {"model": None, "init_from": "x" * 300},
}

MISTAKES: dict[str, tuple[Callable[[Desk], list[str]], str]] = {
    # data
    "missing file": (
        changed(data="nowhere.txt"),
        "data='nowhere.txt' does not exist: give a .txt, .jsonl or",
    ),
    "missing folder": (changed(data="./nowhere/at/all"), "data='./nowhere/at/all' does not exist"),
    "file of another kind": (data("a.csv", "x"), "is neither .txt nor .txt.zst"),
    "empty corpus": (data("a.txt", " \n"), "holds no text"),
    "empty folder": (
        lambda desk: [desk.write("e/x.md", "x"), *desk.words(data=desk.path("e"))][1:],
        "is a folder without",
    ),
    "binary garbage": (data("a.txt", b"\x80\x81\xff" * 999), "is not UTF-8 text, byte 0 is wrong"),
    "binary with NUL": (data("a.txt", b"\x00\x01" * 999), "it holds a NUL byte"),
    "lines that are no JSON": (data("a.jsonl", '{"text": "a"}\nnonsense\n'), "a.jsonl, line 2 is not JSON"),
    "lines of another key": (data("a.jsonl", '{"body": "a"}\n'), "no text under text_field='text'"),
    "corpus shorter than a sequence": (data("a.txt", "a few words"), "fewer than one sequence of seq_len=16"),
    "held-out text shorter than a sequence": (
        data("a.txt", "a few words " * 20, val_share=0.01),
        "and its next token: give more data, a larger val_share or a smaller seq_len",
    ),
    "path that is no UTF-8": (changed(data=os.fsdecode(b"te\xffxts")), r"data='te\udcffxts' is not UTF-8: rename"),
    "output that is no UTF-8": (changed(out=os.fsdecode(b"ru\xffn")), r"out='ru\udcffn' is not UTF-8: rename"),
    # the model and the tokenizer
    "missing model": (changed(model="nowhere.json"), "nowhere.json"),
    "model that is no JSON": (lambda desk: desk.words(model=desk.write("m.json", "{")), "m.json"),
    "model without a size": (lambda desk: desk.words(model=desk.write("m.json", "{}")), "m.json"),
    "unknown preset": (changed(model=None, preset="9m"), "preset='9m' is not known: choose one of 5m, 60m"),
    "preset and model": (changed(preset="5m"), "preset, model and init_from each say what the model is"),
    "missing weights' folder": (changed(model=None, init_from="nowhere"), "nowhere"),
    "folder without weights": (no_weights, "export"),
    "missing tokenizer": (changed(tokenizer="nowhere.json"), "tokenizer='nowhere.json' does not exist"),
    "tokenizer that is none": (lambda desk: desk.words(tokenizer=desk.write("t.json", "{}")), "cannot be read"),
    "vocabulary above the model's": (
        lambda desk: desk.words(tokenizer=desk.tokenizer(400)),
        "the tokenizer has 400 tokens, and the model embeddings for vocab_size=300: give",
    ),
    "vocabulary unlike the tokenizer's": (
        lambda desk: desk.words(tokenizer=desk.tokenizer(290), vocab_size=300),
        "vocab_size=300, but the tokenizer",
    ),
    "vocabulary to train above the model's": (changed(vocab_size=310), "tokenizer has 310 tokens, and the model"),
    "vocabulary too small": (changed(vocab_size=200), "vocab_size=200 must be at least 257"),
    "sequence too long": (changed(seq_len=65), "seq_len=65 is longer than the model's max_position_embeddings=64"),
    # low rank
    "negative rank": (changed(rank=-1), "rank=-1 must be a whole number, 0 or more"),
    "rank above every weight": (changed(rank=32), "rank=32 is not below the smaller side of any selected weight"),
    "no target matched": (changed(targets="zzz"), "targets: ['zzz'] match no parameter"),
    "targets no regex": (changed(targets="q_proj("), "targets='q_proj(' is not a regular expression"),
    "alpha 0": (changed(alpha=0), "alpha=0.0 must be a positive number"),
    "alpha in words": (changed(alpha="large"), "alpha=large must be a positive number"),
    "ramp longer than the period": (
        changed(restart_every=3, restart_warmup=4),
        "restart_warmup=4 is longer than restart_every=3",
    ),
    "unknown pruning": (changed(prune="magnitude"), "prune='magnitude' is not known"),
    # rates and counts
    "lr nan": (changed(lr="nan"), "lr=nan must be a finite number, 0 or more"),
    "lr inf": (changed(lr="inf"), "lr=inf must be a finite number, 0 or more"),
    "no steps": (changed(steps=0), "steps=0 must be a whole number of at least 1"),
    "steps and tokens": (changed(tokens=10**6), "both say how long to train"),
    "micro batch": (changed(batch_size=4, micro_batch_size=3), "micro_batch_size=3 must divide batch_size=4"),
    "negative seed": (changed(seed=-1), "seed=-1 must be a whole number, at least 0 and below 2^63"),
    "seed too large": (changed(seed=1 << 63), "must be a whole number, at least 0 and below 2^63"),
    "threads beyond all machines": (changed(threads=10**20), "must be at most 1024: give as many as there are cores"),
    "batch beyond all memory": (
        changed(batch_size=10**11),
        "batch_size=100000000000 sequences of seq_len=16 tokens are more than 2,147,483,648 tokens in an update",
    ),
    "unknown base": (changed(base="lion"), "base='lion' is not known: choose one of adamw, sgd, muon"),
    "unknown device": (changed(device="abacus"), "device='abacus' is not to be had here"),
    # files
    "unknown key": (config_file("restart_evry = 3\n"), "did you mean 'restart_every'?"),
    "wrong kind": (config_file('keep = "ten"\n'), "keep='ten' is of the wrong kind: it must be int"),
    "words for a number": (config_file('lr = "1e-3"\n'), "lr='1e-3' is of the wrong kind: it must be float"),
    "config that is no TOML": (config_file(b"\xff"), "is not TOML"),
    "missing config": (changed(config="nowhere.toml"), "config='nowhere.toml' cannot be read"),
    "output folder in use": (in_use, "is there and not empty: give a new folder"),
    "output folder a file": (a_file_for_a_folder, "is a file: give a new folder"),
    "output folder below a file": (below_a_file, "file/run"),
    **{f"name too long for {name}": (changed(**options), LONG) for name, options in TOO_LONG.items()},
    "name too long for resume": (lambda desk: ["pretrain", "--resume", "x" * 300], LONG),
    "name too long for export": (lambda desk: ["export", "x" * 300, "--out", desk.path("e")], LONG),
    "name too long for eval": (lambda desk: ["eval", "x" * 300], LONG),
    "name too long for spectrum": (lambda desk: ["spectrum", "x" * 300, "x"], LONG),
    "resume of nothing": (
        lambda desk: ["pretrain", "--resume", desk.path("nowhere")],
        "is not there: name the folder of a run",
    ),
    "resume without checkpoints": (a_run_without_checkpoints, "holds no checkpoint to resume or export"),
    "resume of a later version": (a_run_of_a_later_version, "'novelty' is not an option"),
    # the other commands
    "export of nothing": (lambda desk: ["export", desk.path("nowhere"), "--out", desk.path("e")], "nowhere"),
    "export in an unknown dtype": (
        lambda desk: ["export", desk.path("nowhere"), "--out", desk.path("e"), "--dtype", "int8"],
        "dtype='int8' is not known",
    ),
    "tokenizing nothing": (
        lambda desk: ["tokenize", "no.txt", "--out", desk.path("o")],
        "data='no.txt' does not exist",
    ),
    "tokenizing into a folder in use": (
        lambda desk: ["tokenize", desk.path("texts"), "--out", desk.path("texts")],
        "is not empty, and not of these texts, tokenizer and settings",
    ),
    "tokenizing with too small a vocabulary": (
        lambda desk: ["tokenize", "--out", desk.path("o"), "--vocab-size", "9"],
        "vocab_size=9 must be at least 257",
    ),
    "tokenizing with a vocabulary unlike the tokenizer's": (
        lambda desk: [
            *("tokenize", desk.path("texts"), "--out", desk.path("o")),
            *("--tokenizer", desk.tokenizer(290), "--vocab-size", "300"),
        ],
        "has 290 tokens: leave out vocab_size",
    ),
    "a key of texts that are not given": (
        lambda desk: ["eval", desk.path("nowhere"), "--text-field", "body"],
        "text_field='body' is of texts that data names, and none are: give them, or leave it out",
    ),
    "holding out too much": (
        lambda desk: ["tokenize", "--out", desk.path("o"), "--val-share", "0.6"],
        "val_share=0.6 must lie above 0 and not above 0.5",
    ),
    "training a tokenizer on nothing": (
        lambda desk: ["tokenizer", "train", "no*.txt", "--out", desk.path("o")],
        "data='no*.txt' matches no file",
    ),
    "training a tokenizer into a folder in use": (
        lambda desk: ["tokenizer", "train", "--out", desk.path("texts")],
        "is not empty: give a folder that is new or empty",
    ),
    "generate from nothing": (lambda desk: ["generate", desk.path("nowhere"), "--prompt", "a"], "nowhere"),
    "plot of nothing": (lambda desk: ["plot", desk.path("nowhere")], "nowhere"),
    "checkpoints of nothing": (lambda desk: ["checkpoints", desk.path("nowhere")], "holds no checkpoint"),
    "spectrum of nothing": (lambda desk: ["spectrum", desk.path("a"), desk.path("b")], "a"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_status_2_before_any_training(
    name: str, desk: Desk, trained: list[train.Run], capfd: pytest.CaptureFixture[str]
) -> None:
    words, message = MISTAKES[name]
    arguments = words(desk)
    before = sorted(path for path in desk.folder.rglob("*") if "cache" not in path.parts)
    assert run(*arguments) == 2
    line = one_line(capfd)
    assert message in line
    assert "Traceback" not in line
    assert not trained
    assert sorted(path for path in desk.folder.rglob("*") if "cache" not in path.parts) == before


def test_texts_are_tokenized_and_a_tokenizer_trained_before_a_run_that_needs_neither(
    desk: Desk, trained: list[train.Run], capfd: pytest.CaptureFixture[str]
) -> None:
    texts, made, out = desk.path("texts"), desk.path("made"), desk.path("out")
    assert run("tokenizer", "train", texts, "--vocab-size", "300", "--out", made) == 0
    assert capfd.readouterr().out.startswith("300 tokens; samples of the texts come back exactly; next: relora-opt ")
    assert run("tokenize", texts, "--tokenizer", made, "--out", out, "--val-share", "0.2") == 0
    line = capfd.readouterr().out
    assert re.match(r"[\d,]+ tokens of \d+ documents for training, [\d,]+ of \d+ documents? held out; next: ", line)
    assert run(*desk.words(data=out)) == 0
    assert run(*desk.words(data=out, tokenizer=made, out=desk.path("other"))) == 0
    assert run(*desk.words(data=texts, tokenizer=made, model=None, preset="5m", rank=64, out=desk.path("third"))) == 0
    assert len({run.corpus.tokenizer.to_str() for run in trained}) == 1
    assert trained[0].corpus.fingerprint == trained[1].corpus.fingerprint != trained[2].corpus.fingerprint
    assert transformers.AutoTokenizer.from_pretrained(made).eos_token == END_OF_TEXT


def test_commands_that_are_printed_can_be_copied_into_a_shell(
    desk: Desk, trained: list[train.Run], capfd: pytest.CaptureFixture[str]
) -> None:
    texts, made, out = desk.path("texts"), desk.path("my tokenizer"), desk.path("it's tokenized")
    assert run("tokenizer", "train", texts, "--vocab-size", "300", "--out", made) == 0
    assert shlex.split(capfd.readouterr().out.partition("next: ")[2])[3] == made
    assert run("tokenize", texts, "--tokenizer", made, "--out", out, "--val-share", "0.2") == 0
    assert shlex.split(capfd.readouterr().out.partition("next: ")[2])[3] == out
    folder = desk.path("my run")
    assert run(*desk.words(data=out, out=folder)) == 0
    assert run("export", folder, "--out", desk.path("my export")) == 0
    assert shlex.split(capfd.readouterr().out.partition("next: ")[2])[2] == desk.path("my export")
    assert run(*desk.words(data=out, out=folder)) == 2
    assert f"go on with --resume {shlex.quote(folder)}" in one_line(capfd)


def test_the_same_words_without_a_mistake_would_train(desk: Desk, trained: list[train.Run]) -> None:
    assert run(*desk.words()) == 0
    assert [run.config.rank for run in trained] == [4]


@pytest.mark.parametrize("size", ["", "abc", "-1", "²"])
def test_a_number_of_processes_that_is_none_is_refused(
    size: str, desk: Desk, trained: list[train.Run], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setattr(os, "_exit", sys.exit)
    assert run(*desk.words()) == 2
    assert f"WORLD_SIZE={size!r} in the environment is no number: unset it" in one_line(capfd)


def test_a_folder_that_is_the_current_one_can_be_written_to(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here = desk.folder / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert run("tokenizer", "train", desk.path("texts"), "--vocab-size", "300", "--out", ".") == 0
    assert (here / "tokenizer.json").is_file()


@pytest.mark.parametrize("columns", ["20", "200"])
def test_the_program_says_one_line_whatever_the_width(columns: str, tmp_path: Path) -> None:
    if not PROGRAM.exists():
        pytest.skip("the console script is installed elsewhere than beside this interpreter")
    done = subprocess.run(
        [PROGRAM, "pretrain", "--restart-every", "3", "--restart-warmup", "4", "--out", tmp_path / "run"],
        env={**os.environ, "COLUMNS": columns, "FORCE_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "relora-opt: restart_warmup=4 is longer than restart_every=3: the rate would never recover; shorten the ramp\n"
    )
    assert not done.stdout
    assert not (tmp_path / "run").exists()
