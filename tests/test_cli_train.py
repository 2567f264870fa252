"""The training loop does what its configuration says, leaves what it promises, and goes on exactly where it stopped."""

import json
import os
import random
import shlex
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from relora_opt_cli.build import make_optimizer
from relora_opt_cli.checkpoint import checkpoints, read_config, read_progress, save_progress
from relora_opt_cli.config_file import load_config_file
from relora_opt_cli.errors import UserError
from relora_opt_cli.export import export_run
from relora_opt_cli.generate import generate
from relora_opt_cli.metrics import Row, read_metrics
from relora_opt_cli.model import Llama, load_config, load_weights
from relora_opt_cli.resolution import resolve
from relora_opt_cli.sampling import Sampling
from relora_opt_cli.train import resume_run, start_run
from safetensors.torch import load_file

SHAPE = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
STEPS, CYCLE = 24, 6


@pytest.fixture(autouse=True)
def _quiet_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_texts(folder: Path) -> Path:
    """Write forty documents in a language of sixty words, each likely to be followed by the same few."""
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghij", k=source.randint(2, 7))) for _ in range(60)]
    folder.mkdir()
    for number in range(40):
        place, text = number, []
        for _ in range(300):
            place = (place * 7 + source.randint(0, 2)) % len(words)
            text.append(words[place])
        (folder / f"{number:02d}.txt").write_text(" ".join(text))
    return folder


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the options of a run that takes about a second."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    texts = folder / "texts"
    defaults = {
        "data": [str(texts if texts.exists() else write_texts(texts))],
        "model": str(folder / "config.json"),
        "out": str(folder / "run"),
        "seq_len": 32,
        "batch_size": 4,
        "steps": STEPS,
        "warm_start": CYCLE,
        "restart_every": CYCLE,
        "restart_warmup": 2,
        "rank": 4,
        "lr": 1e-2,
        "dtype": "float32",
    }
    return {**defaults, **changes}


def train(folder: Path, **changes: Any) -> Path:
    start_run(resolve(options(folder, **changes)))
    return Path(changes.get("out", folder / "run"))


def rows(run: Path) -> list[Row]:
    """Return a run's metrics without the one that depends on the clock on the wall."""
    return [replace(row, tokens_per_second=None) for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.draws
def test_a_run_leaves_everything_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path)
    assert " documents for training, " in capsys.readouterr().out.partition("\ncpu: ")[0]
    found = rows(run)
    assert [row.update for row in found] == list(range(STEPS + 1))
    assert [row.phase for row in found] == ["warm_start"] * (CYCLE + 1) + ["low_rank"] * (STEPS - CYCLE)
    assert [row.restarts for row in found[::CYCLE]] == [0, 0, 1, 2, 3]
    assert found[-1].tokens == STEPS * 4 * 32
    assert found[0].val_loss is not None
    assert found[CYCLE].val_loss is not None
    assert found[-1].val_loss is not None
    assert found[-1].val_loss < found[0].val_loss
    assert all(row.loss is not None and row.grad_norm is not None for row in found[1:])
    assert {path.name for path in (run / "export").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (run / "curves.png").stat().st_size > 10_000
    assert len(checkpoints(run)) == 2
    found_device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    settled = {"compile": False, "threads": 1, "device": found_device.type}
    settled |= {"text_field": "text", "val_share": 0.05, "vocab_size": 300}  # of the texts, and of the model
    settled["dtype"] = resolve(load_config_file(run / "config.toml")).dtype
    assert settled["dtype"] in ("float32", "bfloat16")
    assert resolve(load_config_file(run / "config.toml")) == resolve(options(tmp_path, **settled))


def test_the_next_command_can_be_copied_into_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, out=str(tmp_path / "it's my run"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next ")]
    assert shlex.split(line)[:4] == ["next", "relora-opt", "generate", str(run)]


def test_the_learning_rate_in_the_metrics_is_the_jagged_schedule(tmp_path: Path) -> None:
    run = train(tmp_path, factor_lr=2.0, outer="constant", warmup=0)
    rates = [row.lr for row in rows(run)[1:]]
    cycle = [1e-2, *[2e-2] * 5]  # half way up the ramp of two updates, then the peak: twice the dense rate
    assert rates == pytest.approx([1e-2] * CYCLE + cycle * 3)


def stopped(whole: Path, stop: int) -> Path:
    """Return a copy of a run as it was when it was killed after update `stop`."""
    part = whole.parent / "part"
    shutil.copytree(whole, part)
    for path in checkpoints(part):
        if int(path.name) > stop:
            shutil.rmtree(path)
    shutil.rmtree(part / "export")
    return part


@pytest.mark.parametrize("stop", [7, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (6, 8, 13))])
def test_a_run_stopped_between_two_sketches_of_the_gradient_resumes_bitwise(tmp_path: Path, stop: int) -> None:
    whole = train(tmp_path, save_every=1, keep=100, init="gradient")
    part = stopped(whole, stop)
    resume_run(part)
    assert rows(part) == rows(whole)
    last = [checkpoints(run)[-1] / "model.safetensors" for run in (part, whole)]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.parametrize("stop", [12, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (9, 15, 16))])
def test_a_warm_start_in_the_middle_is_seen_in_the_metrics_and_resumes_bitwise(tmp_path: Path, stop: int) -> None:
    lengths = {"warm_start": 6, "warm_start_at": 9, "restart_every": 4}
    whole = train(tmp_path, save_every=1, keep=100, **lengths)
    found = rows(whole)
    assert [row.phase for row in found] == ["low_rank"] * 10 + ["warm_start"] * 6 + ["low_rank"] * (STEPS - 15)
    restarts = [row.update for before, row in pairwise(found) if row.restarts > before.restarts]
    assert restarts == [4, 8, 15, 19, 23]  # the switch is one: there was low rank before
    assert found[15].val_loss is not None
    part = stopped(whole, stop)
    resume_run(part)
    assert rows(part) == found
    last = [checkpoints(run)[-1] / "model.safetensors" for run in (part, whole)]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.parametrize("stop", [11, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (7, 12, 15))])
def test_a_warm_start_in_turns_is_seen_in_the_metrics_and_resumes_bitwise(tmp_path: Path, stop: int) -> None:
    lengths = {"warm_start": 4, "warm_start_at": 7, "warm_start_turns": 2, "restart_every": 5}
    whole = train(tmp_path, save_every=1, keep=100, **lengths)
    found = rows(whole)
    assert [row.phase for row in found] == ["low_rank"] * 8 + ["warm_start"] * 8 + ["low_rank"] * (STEPS - 15)
    restarts = [row.update for before, row in pairwise(found) if row.restarts > before.restarts]
    assert restarts == [5, 11, 15, 20]
    assert [found[update].val_loss is not None for update in (11, 15)] == [True, True]
    assert read_progress(checkpoints(whole)[10]).val_loss_switch is None
    assert read_progress(checkpoints(whole)[-1]).val_loss_switch == found[15].val_loss
    part = stopped(whole, stop)
    resume_run(part)
    assert rows(part) == found
    last = [checkpoints(run)[-1] / "model.safetensors" for run in (part, whole)]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_a_run_from_before_alpha_had_a_default_is_resumed_with_the_rank(tmp_path: Path) -> None:
    whole = train(tmp_path, alpha=4.0, save_every=6, keep=100)  # the rank is 4
    part = stopped(whole, 6)
    lines = (part / "config.toml").read_text().splitlines()
    (part / "config.toml").write_text("\n".join(line for line in lines if not line.startswith("alpha")) + "\n")
    resume_run(part)
    assert rows(part) == rows(whole)


def test_a_run_that_was_killed_at_its_very_end_is_closed_by_resuming(tmp_path: Path) -> None:
    run = train(tmp_path)
    last = checkpoints(run)[-1]
    save_progress(last, replace(read_progress(last), is_finished=False), read_config(last))
    before = (run / "export" / "model.safetensors").read_bytes()
    resume_run(run)
    assert (run / "export" / "model.safetensors").read_bytes() == before
    assert read_progress(last).is_finished


def test_a_run_that_ends_at_an_earlier_checkpoint_is_evaluated_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = stopped(train(tmp_path, save_every=5, keep=100, eval_every=4), 15)
    assert rows(part)[15].val_loss is None
    capsys.readouterr()
    resume_run(part, {"steps": 15})
    last = rows(part)[-1]
    assert (last.update, len(rows(part))) == (15, 16)
    assert last.val_loss not in (None, rows(part)[12].val_loss)
    assert f"validation loss at the end     {last.val_loss:.4f}" in capsys.readouterr().out


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "lock"}
    capsys.readouterr()
    resume_run(run)
    assert f"is finished: {STEPS} updates; give more --steps to go on\n" in capsys.readouterr().out
    resume_run(run, {"steps": STEPS, "keep": 3, "log": ("tensorboard",), "text_field": "text"})
    assert f"{STEPS} updates, and --keep, --log, --text-field would change nothing; give" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "lock"} == before


def test_an_export_gives_transformers_our_logits_and_generates(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = train(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "export")
    ours = Llama(load_config(run / "export"))
    load_weights(ours, run / "export")
    words = (tmp_path / "texts" / "00.txt").read_text()[:60]
    ids = tokenizer(words, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == words
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)  # float32, as the issue states
        greedy = theirs.generate(ids, max_new_tokens=8, do_sample=False)
    text = "".join(generate(run, words, max_new_tokens=8, sampling=Sampling(temperature=0)))
    assert tokenizer.decode(greedy[0], skip_special_tokens=True) == words + text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_of_a_run_writes_the_newest_weights_in_the_dtype_that_was_asked_for(tmp_path: Path, dtype: str) -> None:
    run = train(tmp_path)
    folder = export_run(run, tmp_path / "export", dtype=dtype)
    exported, kept = load_file(folder / "model.safetensors"), load_file(run / "export" / "model.safetensors")
    assert exported.keys() == kept.keys()
    for name, tensor in exported.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, kept[name].to(tensor.dtype))
    with pytest.raises(UserError, match="is not empty"):
        export_run(run, folder)


def test_an_export_needs_a_tokenizer_that_can_be_read_and_a_folder_that_may_be_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, here = train(tmp_path), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert export_run(run, Path()) == Path()
    assert (here / "model.safetensors").is_file()
    (run / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer='.*tokenizer\.json' cannot be read"):
        export_run(run, tmp_path / "export")
    (run / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer='.*tokenizer\.json' does not exist"):
        export_run(run, tmp_path / "export")


def test_export_of_a_checkpoint_writes_its_weights(tmp_path: Path) -> None:
    earlier = checkpoints(train(tmp_path))[0]
    exported = load_file(export_run(earlier, tmp_path / "export") / "model.safetensors")
    kept = load_file(earlier / "model.safetensors")
    assert exported.keys() == kept.keys()
    assert all(torch.equal(exported[name], kept[name]) for name in kept)
    with pytest.raises(UserError, match="holds no checkpoint to resume or export"):
        export_run(tmp_path / "export", tmp_path / "again")


def test_a_run_can_go_on_from_an_export(tmp_path: Path) -> None:
    first = train(tmp_path, steps=60, warm_start=12, restart_every=12)
    second = train(tmp_path, out=str(tmp_path / "second"), model=None, init_from=str(first / "export"))
    # The held-out documents are the same, so the second run begins where the first one ended.
    assert rows(second)[0].val_loss == pytest.approx(rows(first)[-1].val_loss, abs=1e-6)


@pytest.mark.parametrize("base", ["adamw", "sgd", "muon"])
def test_every_base_trains(tmp_path: Path, base: str) -> None:
    found = rows(train(tmp_path, base=base, lr={"sgd": 0.5}.get(base, 1e-2)))
    assert found[0].val_loss is not None
    assert found[-1].val_loss is not None
    assert found[-1].val_loss < found[0].val_loss - 0.1
    assert found[-1].restarts == 3


def test_rank_0_is_full_rank_training_at_the_same_rates(tmp_path: Path) -> None:
    found = rows(train(tmp_path, rank=0, outer="constant", warmup=0))
    assert {row.phase for row in found} == {"full_rank"}
    assert found[-1].restarts == 0
    assert {row.lr for row in found[1:]} == {1e-2}


def test_restart_every_0_is_plain_lora(tmp_path: Path) -> None:
    found = rows(train(tmp_path, restart_every=0, restart_warmup=None))
    assert found[-1].restarts == 0
    assert found[-1].phase == "low_rank"


def test_micro_batches_give_the_run_of_whole_batches(tmp_path: Path) -> None:
    whole = rows(train(tmp_path, base="sgd", lr=0.5))
    parts = rows(train(tmp_path, base="sgd", lr=0.5, out=str(tmp_path / "parts"), micro_batch_size=1))
    for ours, theirs in zip(parts[1:], whole[1:], strict=True):
        # float32 sums in another order; SGD does not blow the difference up, as Adam does near a gradient of zero.
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)


def test_selected_weights_train_at_lr_and_the_rest_at_rest_lr(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    config = resolve({"model": str(tmp_path / "config.json"), "rank": 8, "lr": 1e-3, "rest_lr": 3e-3, "steps": 10})
    model = Llama(load_config(tmp_path / "config.json"))
    rates = {
        id(p): (group["lr"], group["rank"])
        for group in make_optimizer(model, config).param_groups
        for p in group["params"]
    }
    by_name = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert by_name["model.layers.0.self_attn.q_proj.weight"] == (1e-3, 8)
    assert by_name["model.layers.0.mlp.down_proj.weight"] == (1e-3, 8)
    assert by_name["lm_head.weight"] == by_name["model.embed_tokens.weight"] == (3e-3, 0)
    assert by_name["model.norm.weight"] == (3e-3, 0)


def test_a_diverging_run_ends_with_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="start again with lower rates"):
        train(tmp_path, lr=1e30, max_grad_norm=float("inf"), warmup=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler uses what torch 2.13 deprecates
def test_a_compiled_run_equals_an_eager_one(tmp_path: Path) -> None:
    eager = rows(train(tmp_path, base="sgd", lr=0.5))
    compiled = rows(train(tmp_path, base="sgd", lr=0.5, out=str(tmp_path / "compiled"), compile=True))
    for ours, theirs in zip(compiled[1:], eager[1:], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)  # as above: other kernels


@pytest.mark.slow
def test_a_run_learns_by_low_rank_and_no_restart_sets_it_back(tmp_path: Path) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    ramp = 14
    options: dict[str, Any] = {"warm_start": 30, "restart_every": 143, "restart_warmup": ramp}
    start_run(resolve({**options, "out": str(tmp_path / "run"), "eval_every": ramp}))
    start_run(resolve({**options, "out": str(tmp_path / "frozen"), "factor_lr": 0.0}))
    found = {row.update: row for row in rows(tmp_path / "run") if row.val_loss is not None}
    config, last = resolve(options), max(found)
    after_switch = found[config.warm_start].val_loss
    assert found[last].restarts >= 3
    assert found[last].val_loss <= after_switch - 0.5
    assert found[last].val_loss < rows(tmp_path / "frozen")[-1].val_loss
    for restart in range(config.warm_start + config.restart_every, last, config.restart_every):
        before = found[max(update for update in found if update <= restart)].val_loss
        after = [row.val_loss for update, row in found.items() if restart < update <= restart + 2 * ramp]
        assert len(after) == 2  # as the ramp ends, and right after it
        assert max(after) <= before + 0.02


def _flag(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{name.replace('_', '-')}", *map(str, values)]
