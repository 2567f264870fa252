"""A configuration is filled from flags, file and preset in that order, follows what is set, and is checked whole."""

import dataclasses
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relora_opt_cli.config import CHOICES, DEFAULT_PRESET, FIELDS, PRESETS, Config
from relora_opt_cli.config_file import load_config_file, to_toml
from relora_opt_cli.errors import UserError
from relora_opt_cli.limits import parse_prune
from relora_opt_cli.resolution import changed, resolve

FIELD_NAMES = list(FIELDS)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---- what is not set follows what is


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**6))
def test_lengths_that_are_not_set_are_shares_of_the_run(steps: int) -> None:
    config = resolve({"steps": steps})
    assert (config.warmup, config.warm_start) == (steps // 20, 0)
    assert (config.eval_every, config.save_every) == (max(1, steps // 10), max(1, steps // 5))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**6) | st.integers(1480, 2020), st.none() | st.integers(0, 400), st.sampled_from([8, 16, 64]))
def test_restarts_come_by_themselves_where_a_run_is_long_enough_for_them_to_pay(
    steps: int, warm_start: int | None, rank: int
) -> None:
    warm_start = min(warm_start, steps - 1) if warm_start is not None else None
    config = resolve({"steps": steps, "warm_start": warm_start, "rank": rank})
    low_rank, every, shortest = steps - config.warm_start, config.restart_every, 500 * rank // 8
    if low_rank < 3 * shortest:
        assert (every, config.restart_warmup) == (0, 0)
        return
    restarts = range(every, low_rank + 1, every)
    assert shortest < every < 1.4 * shortest
    assert low_rank - restarts[-1] >= 0.9 * shortest  # bench/README.md: it takes about as long for a restart to pay
    assert config.restart_warmup == every // 20


@pytest.mark.parametrize(
    ("lengths", "ramp"),
    [
        ({"warm_start": 200}, 0),
        ({"warm_start": 200, "warm_start_at": 400}, 20),
        ({"warm_start": 20, "warm_start_at": 400}, 10),
        ({"warm_start": 4, "warm_start_at": 400}, 4),
        ({"warm_start": 200, "warm_start_at": 400, "restart_every": 300}, 15),
        ({"warm_start": 10, "warm_start_at": 400, "restart_every": 300}, 10),
        ({"warm_start": 200, "warm_start_turns": 3}, 20),
    ],
)
def test_a_warm_start_in_the_middle_has_a_ramp_that_fits(lengths: dict[str, int], ramp: int) -> None:
    assert resolve({"steps": 1000, **lengths}).restart_warmup == ramp


@pytest.mark.parametrize(
    ("rank", "steps", "every"),
    [
        (8, 1499, 0),
        (8, 1500, 501),
        (8, 20_000, 501),
        (64, 600, 0),
        (64, 11_999, 0),
        (64, 12_000, 4001),
        (5, 938, 0),
        (5, 939, 314),
    ],
)
def test_a_cycle_is_62_5_updates_for_each_rank_or_a_few_more(rank: int, steps: int, every: int) -> None:
    assert resolve({"rank": rank, "steps": steps}).restart_every == every


@pytest.mark.parametrize("steps", [20, 600, 8000])
def test_a_warm_start_and_restarts_that_are_asked_for_come_in_runs_of_any_length(steps: int) -> None:
    config = resolve({"steps": steps, "warm_start": 5, "restart_every": 7, "restart_warmup": 3})
    assert (config.warm_start, config.restart_every, config.restart_warmup) == (5, 7, 3)
    assert resolve({"steps": steps, "restart_every": 0}).restart_every == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**5))
def test_the_ramp_follows_the_cycle_that_is_set(restart_every: int) -> None:
    config = resolve({"restart_every": restart_every, "steps": 10**6})
    assert (config.restart_every, config.restart_warmup) == (restart_every, restart_every // 20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warm_start": 100}, "warm_start=100 leaves no low-rank update in steps=100: shorten it, or give rank 0"),
        ({"warm_start": 20, "warm_start_at": 80}, "warm_start=20 at 80 leaves no low-rank update in steps=100"),
        (
            {"warm_start": 4, "warm_start_at": 50, "restart_every": 0, "restart_warmup": 5},
            "restart_warmup=5 is longer than warm_start=4, in which the rate would never recover",
        ),
        ({"warm_start_at": 80}, "warm_start_at=80 of no warm start: say how long, warm_start"),
        ({"warm_start_turns": 2}, "warm_start_turns=2 of no warm start: say how long, warm_start"),
        (
            {"warm_start": 25, "warm_start_turns": 3, "warm_start_at": 25},
            "warm_start=25 at 25 in 3 turns leaves no low-rank update in steps=100",
        ),
        (
            {"warm_start": 4, "warm_start_turns": 2, "restart_every": 0, "restart_warmup": 5},
            "restart_warmup=5 is longer than warm_start=4, in which the rate would never recover",
        ),
        (
            {"restart_every": 96, "warm_start": 5},
            "restart_every=96 puts the first restart after update 101, beyond steps=100: shorten it",
        ),
        (
            {"restart_every": 60, "warm_start": 10, "warm_start_at": 40, "warm_start_turns": 2},
            "restart_every=60 puts the first restart, but for those that end a warm start, after update 120, beyond",
        ),
    ],
)
def test_a_run_that_would_end_before_what_it_asks_for_is_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve({"steps": 100, **options})
    resolve({"steps": 100, "rank": 0, **options})  # full rank asks for neither


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 512), st.integers(0, 10**7))
def test_tokens_are_whole_updates(batch_size: int, seq_len: int, tokens: int) -> None:
    options = {"tokens": tokens, "batch_size": batch_size, "seq_len": seq_len}
    if tokens < batch_size * seq_len:
        with pytest.raises(UserError, match=f"tokens={tokens} is less than one update's {batch_size * seq_len}"):
            resolve(options)
        return
    config = resolve(options)
    assert config.steps == tokens // (batch_size * seq_len)
    assert config.warmup == config.steps // 20


def test_every_preset_resolves_and_gives_its_values() -> None:
    for name, values in PRESETS.items():
        config = resolve({"preset": name})
        assert {key: getattr(config, key) for key in values} == values
    assert resolve({}) == resolve({"preset": DEFAULT_PRESET})


def test_micro_batches_and_rates_follow() -> None:
    assert resolve({"batch_size": 12}).micro_batch_size == 12
    assert resolve({"batch_size": 12, "micro_batch_size": 3}).micro_batch_size == 3
    assert resolve({"lr": 0.5}).rest_lr == 0.5
    assert resolve({"lr": 0.5, "rest_lr": 0.25}).rest_lr == 0.25
    assert resolve({}).rest_lr == PRESETS[DEFAULT_PRESET]["rest_lr"]
    assert resolve({"device": "cuda"}).compile is None  # the machine decides
    assert resolve({"device": "cuda", "compile": False}).compile is False


def test_a_model_of_ones_own_needs_no_preset() -> None:
    for options in ({"model": "config.json"}, {"init_from": "folder"}):
        config = resolve(options)
        assert config.preset is None
        assert config.vocab_size is None
        assert min(config.steps, config.rank, config.lr) > 0


def test_what_is_set_wins_over_the_preset_and_none_is_not_set() -> None:
    assert resolve({"preset": "60m", "rank": 7}).rank == 7
    assert resolve({"preset": "60m", "rank": None}).rank == PRESETS["60m"]["rank"]
    assert resolve({"rank": 0, "restart_every": 0, "warm_start": 0, "warmup": 0}).rank == 0


def test_a_zero_that_is_set_is_kept() -> None:
    config = resolve(dict.fromkeys(("warmup", "warm_start", "restart_every", "rank", "seed", "weight_decay"), 0))
    assert (config.warmup, config.warm_start, config.restart_every, config.restart_warmup) == (0, 0, 0, 0)


def test_values_take_the_type_of_their_option() -> None:
    config = resolve({"lr": 1, "alpha": 32, "betas": [0, 0.5], "data": "texts", "max_grad_norm": math.inf})
    assert (config.lr, config.alpha, config.betas, config.data) == (1.0, 32.0, (0.0, 0.5), ("texts",))
    assert all(isinstance(value, float) for value in (config.lr, config.alpha, *config.betas))
    assert resolve({"data": ["a", "b"]}).data == ("a", "b")


# ---- files


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "data": st.lists(st.text(max_size=8), max_size=3).map(tuple),
            "text_field": st.text(max_size=8),
            "targets": st.text(max_size=12),
            "out": st.text(max_size=12),
            "tokenizer": st.text(max_size=8),
            "vocab_size": st.integers(257, 10**6),
            "steps": st.integers(1, 10**7),
            "lr": st.floats(0, 1e3),
            "weight_decay": st.floats(0, 1),
            "alpha": st.floats(1e-300, 1e300),
            "max_grad_norm": st.floats(1e-9, math.inf),
            "max_loss_jump": st.floats(1e-9, math.inf),
            "betas": st.tuples(st.floats(0, 0.9999), st.floats(0, 0.9999)),
            "base": st.sampled_from(CHOICES["base"]),
            "prune": st.sampled_from(["reset", "keep", "magnitude:0.9", "random:0.99"]),
            "compile": st.booleans(),
            "seed": st.integers(0, 2**40),
            "threads": st.integers(1, 8),
            "preset": st.sampled_from(list(PRESETS)),
        },
    )
)
def test_a_configuration_written_as_toml_is_read_back_as_the_same(
    tmp_path_factory: Any, options: dict[str, Any]
) -> None:
    config = resolve(options)
    path = tmp_path_factory.getbasetemp() / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert resolve(load_config_file(path)) == dataclasses.replace(config, tokens=None)
    assert to_toml(resolve(load_config_file(path))) == to_toml(config)


def test_tokens_are_written_as_steps(tmp_path: Path) -> None:
    config = resolve({"tokens": 10**6})
    read = resolve(load_config_file(write(tmp_path / "c.toml", to_toml(config))))
    assert read == dataclasses.replace(config, tokens=None)


@pytest.mark.parametrize("text", ["lr = ", "[optimizer]\nlr = 1.0\nlr = 2.0", "\x00", "lr 0.1"])
def test_a_file_that_is_not_toml_is_one_sentence_with_its_name(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", text)
    with pytest.raises(UserError, match=r"config='.*c\.toml' is not TOML") as caught:
        load_config_file(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_bytes_and_a_missing_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match="is not TOML"):
        load_config_file(tmp_path / "c.toml")
    with pytest.raises(
        UserError, match=r"config='.*none\.toml' cannot be read: No such file or directory; give a TOML"
    ):
        load_config_file(tmp_path / "none.toml")
    with pytest.raises(UserError, match="Is a directory"):
        load_config_file(tmp_path)


def test_what_belongs_on_the_command_line_alone_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", 'resume = "run"\n')
    with pytest.raises(
        UserError, match=re.escape(f"{path}: 'resume' is no key: give it on the command line, --resume")
    ):
        load_config_file(path)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("restart_evry", "'restart_every'"),
        ("learning_rate", None),
        ("micro_batch", "'micro_batch_size'"),
        ("zzz", None),
    ],
)
def test_a_key_that_is_no_option_is_named_with_the_nearest_that_is(
    key: str, suggestion: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "c.toml", f"{key} = 3\n")
    with pytest.raises(UserError, match=re.escape(f"{path}: {key!r} is not an option")) as caught:
        load_config_file(path)
    if suggestion is not None:
        assert f"did you mean {suggestion}?" in str(caught.value)
    elif key == "zzz":
        assert "the keys are data, text_field" in str(caught.value)
    with pytest.raises(UserError, match=repr(key)):
        resolve({key: 3})


def test_flags_spelled_with_hyphens_in_a_file_are_met_with_the_underscored_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'restart_every'"):
        load_config_file(write(tmp_path / "c.toml", "restart-every = 3\n"))


# ---- what is refused

WRONG_KINDS: list[tuple[str, Any]] = [
    ("steps", 1.5),
    ("steps", "10"),
    ("steps", True),
    ("rank", [8]),
    ("lr", "fast"),
    ("lr", True),
    ("betas", 0.9),
    ("betas", [0.9]),
    ("betas", [0.9, 0.95, 0.99]),
    ("betas", ["a", "b"]),
    ("data", [1]),
    ("data", 3),
    ("compile", 1),
    ("compile", "yes"),
    ("out", 3),
    ("prune", 0.9),
    ("targets", ["q_proj"]),
    ("preset", 60),
    ("tokens", 1e9),
    ("seed", 0.5),
]


@pytest.mark.parametrize(("name", "value"), WRONG_KINDS, ids=str)
def test_a_value_of_the_wrong_kind_is_named_with_the_right_one(name: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        resolve({name: value})
    assert f"{name}={value!r} is of the wrong kind: it must be " in str(caught.value)


WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    *[({name: 0}, f"{name}=0 must be a whole number of at least 1") for name in ("seq_len", "steps", "eval_every")],
    *[
        ({name: 0}, f"{name}=0 must be a whole number of at least 1")
        for name in ("save_every", "keep", "warm_start_turns")
    ],
    ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
    ({"batch_size": -4}, "=-4 must be a whole number of at least 1"),
    ({"micro_batch_size": 0}, "micro_batch_size=0 must be a whole number of at least 1"),
    ({"steps": -1}, "steps=-1 must be"),
    ({"tokens": 0}, "tokens=0 is less than one update's 2048"),
    ({"tokens": 10**6, "batch_size": 0}, "batch_size=0 must be"),
    ({"tokens": 10**6, "seq_len": -1}, "seq_len=-1 must be"),
    *[
        ({name: -1}, f"{name}=-1 must be a whole number, 0 or more")
        for name in ("rank", "warmup", "warm_start", "restart_every", "restart_warmup")
    ],
    *[
        ({name: value}, f"{name}={value} must be a finite number, 0 or more")
        for name in ("lr", "rest_lr", "factor_lr", "weight_decay")
        for value in (math.nan, math.inf, -1.0)
    ],
    *[({name: "x"}, f"{name}='x' is not known: choose one of {', '.join(CHOICES[name])}") for name in CHOICES],
    *[({"alpha": value}, f"alpha={value} must be a positive number") for value in (0.0, -2.0, math.nan, math.inf)],
    *[({"betas": [0.9, value]}, "must lie between 0 and 1") for value in (1.0, -0.1, math.nan)],
    *[({"min_ratio": value}, f"min_ratio={value} must lie between 0 and 1") for value in (-0.1, 1.1, math.nan)],
    *[({"max_grad_norm": value}, f"max_grad_norm={value} must be positive") for value in (0.0, -1.0, math.nan)],
    *[({"max_loss_jump": value}, f"max_loss_jump={value} must be positive") for value in (0.0, -1.0, math.nan)],
    ({"warmup": 11, "steps": 10}, "warmup=11 is longer than the run, steps=10"),
    ({"restart_warmup": 6, "restart_every": 5}, "restart_warmup=6 is longer than restart_every=5"),
    ({"save_every": 10, "keep_every": 5}, "keep_every=5 is no multiple of save_every=10, so that updates to keep have"),
    ({"steps": 600, "keep_every": 250}, "keep_every=250 is no multiple of save_every=120"),
    ({"batch_size": 8, "micro_batch_size": 3}, "micro_batch_size=3 must divide batch_size=8"),
    ({"batch_size": 8, "micro_batch_size": 16}, "micro_batch_size=16 must divide batch_size=8"),
    ({"threads": 0}, "threads=0 must be"),
    ({"vocab_size": 256}, "vocab_size=256 must be at least 257"),
    ({"steps": 10, "tokens": 10**6}, "steps=10 and tokens=1000000 both say how long to train: give one"),
    ({"preset": "9m"}, "preset='9m' is not known: choose one of 5m, 60m"),
    ({"preset": "5m", "model": "c.json"}, "preset, model and init_from each say what the model is"),
    ({"init_from": "a", "model": "c.json"}, "preset, model and init_from each say what the model is"),
    *[({"prune": text}, f"prune={text!r} is not known") for text in ("", "none", "magnitude", "random:", "keep:0.5")],
    *[({"prune": text}, f"prune={text!r} is not known") for text in ("magnitude:1.5", "random:nan", "magnitude:-0.1")],
]


@pytest.mark.parametrize(("options", "message"), WRONG_VALUES, ids=str)
def test_a_value_that_cannot_work_is_one_sentence_with_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ". " not in str(caught.value)


def test_what_is_to_be_kept_is_saved_where_that_is_left_open() -> None:
    assert resolve({"steps": 600, "keep_every": 10}).save_every == 10
    assert resolve({"steps": 600, "keep_every": 240}).save_every == 120


def test_a_run_that_is_there_goes_on_with_what_it_keeps_unless_that_is_changed() -> None:
    config = resolve({"save_every": 10, "keep_every": 5}, has_begun=True)
    assert changed(config, {"keep": 3}).keep_every == 5
    assert changed(config, {"keep_every": 20}).keep_every == 20
    with pytest.raises(UserError, match="keep_every=5 is no multiple of save_every=3"):
        changed(config, {"save_every": 3})


def test_no_restart_bears_any_ramp() -> None:
    assert resolve({"restart_every": 0, "restart_warmup": 7}).restart_warmup == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reset", ("reset", None)),
        ("keep", ("keep", None)),
        ("magnitude:0.9", ("magnitude", 0.9)),
        ("random:0", ("random", 0.0)),
        ("random:1", ("random", 1.0)),
    ],
)
def test_pruning_is_a_name_and_a_share(text: str, expected: tuple[str, float | None]) -> None:
    assert parse_prune(text) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(FIELD_NAMES),
        st.one_of(
            st.none(),
            st.integers(-3, 300),
            st.floats(),
            st.text(max_size=5),
            st.booleans(),
            st.lists(st.integers(0, 3)),
        ),
        max_size=4,
    )
)
def test_any_options_resolve_or_are_refused_by_one_sentence(options: dict[str, Any]) -> None:
    try:
        assert isinstance(resolve(options), Config)
    except UserError as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 1500


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=80)
    | st.text(max_size=80).map(str.encode)
    | st.sampled_from(
        [b"a = " + b"[" * 10**5, b"rank = " + b"9" * 5000, b"a." * 10**4 + b"b = 1", b'x = "' + b"a" * 2**21]
    )
)
def test_whatever_stands_in_a_config_file_costs_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(content)
    try:
        assert isinstance(resolve(load_config_file(path)), Config)
    except UserError as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 1500


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FIELD_NAMES), st.integers(-3, 300) | st.floats() | st.text(max_size=5))
def test_any_change_to_a_configuration_holds_or_is_refused_by_one_sentence(name: str, value: Any) -> None:
    config = new = resolve({})
    with suppress(UserError):
        new = changed(config, {name: value})
    others = {other for other in FIELDS if getattr(new, other) != getattr(config, other)}
    assert others <= {name, "steps"}
