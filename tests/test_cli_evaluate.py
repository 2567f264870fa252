"""An evaluation is the mean of -ln p over every token of a text, however it is cut, and training says the same."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from documents import read, split
from folders import CONFIG, small_model, write_export
from hypothesis import given, settings
from hypothesis import strategies as st
from relora_opt_cli.app import app
from relora_opt_cli.corpus import Settings, tokenize
from relora_opt_cli.errors import UserError
from relora_opt_cli.evaluate import Reading, evaluate
from relora_opt_cli.evaluation import Evaluation, table_of
from relora_opt_cli.metrics import read_metrics
from relora_opt_cli.predicted import Text, all_sequences, given_text
from relora_opt_cli.resolution import resolve
from relora_opt_cli.train import start_run
from relora_opt_cli.trained import load_trained
from rich.console import Console
from safetensors.torch import save_file
from tokenizer import END
from tokenizers import Tokenizer, models, pre_tokenizers

LONG = dataclasses.replace(CONFIG, max_position_embeddings=64, num_hidden_layers=2)
DOCUMENTS = ["naïve 世界 🌍! " * 5, "a second one", "the third document is longer than the second"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_export(tmp_path / "model", LONG)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts", DOCUMENTS)


def write_texts(folder: Path, documents: list[str]) -> Path:
    folder.mkdir()
    for number, document in enumerate(documents):
        (folder / f"{number:02d}.txt").write_text(document, encoding="utf-8")
    return folder


def packed(documents: list[str]) -> list[int]:
    """Return the tokens of some documents, which are their bytes, with their ends of text."""
    return [token for document in documents for token in (*document.encode(), END)]


def nats(tokens: list[int], *, seq_len: int) -> list[float]:
    """Return -ln p of every token, each predicted alone, from an end of text on in the first sequence."""
    model, found = small_model(LONG), []
    for i, token in enumerate(tokens):
        start = i - i % seq_len
        seen = [tokens[start - 1] if start else END, *tokens[start:i]]
        with torch.no_grad():
            found.append(-float(model(torch.tensor([seen]))[0, -1].double().log_softmax(-1)[token]))
    return found


@pytest.mark.parametrize(("seq_len", "batch_size"), [(64, 4), (10, 1), (10, 3), (1, 64), (7, 100)])
def test_the_loss_is_the_mean_over_all_tokens_each_predicted_once(
    seq_len: int, batch_size: int, folder: Path, texts: Path
) -> None:
    found = evaluate(folder, data=[str(texts)], seq_len=seq_len, batch_size=batch_size)
    expected = nats(packed(DOCUMENTS), seq_len=seq_len)
    assert found.num_tokens == len(expected)
    assert found.loss == pytest.approx(sum(expected) / len(expected), rel=1e-6)  # float32 sums
    assert found.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)


def test_bits_per_byte_are_of_the_texts_own_bytes(folder: Path, texts: Path) -> None:
    found = evaluate(folder, data=[str(texts)])
    num_bytes = len("".join(DOCUMENTS).encode())
    assert num_bytes > len("".join(DOCUMENTS))
    assert (found.num_documents, found.num_bytes) == (3, num_bytes)
    total = sum(nats(packed(DOCUMENTS), seq_len=found.seq_len))
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / num_bytes, rel=1e-6)


@given(num_tokens=st.integers(1, 70), seq_len=st.integers(1, 80), batch_size=st.integers(1, 9))
@settings(deadline=None)
def test_sequences_predict_every_token_once_and_in_order(num_tokens: int, seq_len: int, batch_size: int) -> None:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    text = Text(tokens, end=999, num_documents=1, num_bytes=1, name="")
    batches = list(all_sequences(text, seq_len=seq_len, batch_size=batch_size))
    rows = [row for batch in batches for row in batch.tolist()]
    assert [token for row in rows for token in row[1:]] == tokens.tolist()
    assert [row[0] for row in rows] == [999, *tokens[seq_len - 1 :: seq_len].tolist()][: len(rows)]
    assert all(len(batch) <= batch_size for batch in batches)
    assert all(len(row) == seq_len + 1 for row in rows[:-1])


def test_the_loss_is_that_of_transformers(folder: Path, texts: Path) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    whole = [END, *(token for document in DOCUMENTS[1:] for token in (*tokenizer(document).input_ids, END))]
    ids = torch.tensor([whole])
    (texts / "00.txt").unlink()
    assert ids.shape[1] - 1 <= 64  # one sequence
    found = evaluate(folder, data=[str(texts)])
    with torch.no_grad():
        assert found.loss == pytest.approx(float(other(ids, labels=ids).loss), rel=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a short run in bfloat16 whose last batch of validation sequences is smaller than the others."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["abacus", "brick", "cellar", "dynamo", "ember"]
    documents = [" ".join(words[(i * k + k) % 5] for k in range(120)) + f" {i}" for i in range(40)]
    (folder / "config.json").write_text(json.dumps({**LONG.to_dict(), "vocab_size": 300, "eos_token_id": None}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        options = {
            "steps": 3,
            "keep": 9,
            "dtype": "bfloat16",
            "rank": 2,
            "seq_len": 16,
            "batch_size": 8,
            "micro_batch_size": 4,
        }
        places = {"model": str(folder / "config.json"), "out": str(folder / "run")}
        start_run(resolve({**options, **places, "data": [str(write_texts(folder / "texts", documents))]}))
    return folder / "run"


def test_the_sequences_that_a_run_reports_give_the_number_that_it_reports(run: Path) -> None:
    found = evaluate(run, num_sequences=256)
    reported = read_metrics(run / "metrics.jsonl")
    assert found.loss == pytest.approx(reported[-1].val_loss, rel=1e-12)  # float64 sums of the same losses
    assert (found.num_bytes, found.bits_per_byte) == (None, None)
    assert found.dtype == "bfloat16"
    assert found.num_tokens % (4 * 16)  # the last batch was smaller
    assert evaluate(run, num_sequences=256, dtype="float32").loss != found.loss
    first = evaluate(run / "checkpoints" / "00000000", num_sequences=256)
    assert first.loss == pytest.approx(reported[0].val_loss, rel=1e-12)


def test_a_run_means_what_it_holds_out(run: Path, tmp_path: Path) -> None:
    _, held_out = split(read(str(run.parent / "texts")))
    given_by_hand = write_texts(tmp_path / "held_out", held_out)
    own, other = evaluate(run), evaluate(run, data=[str(given_by_hand)])
    assert dataclasses.replace(own, data=other.data) == other
    assert own.num_documents == len(held_out)


def test_an_export_of_a_run_has_its_loss(run: Path, texts: Path) -> None:
    own = evaluate(run, data=[str(texts)], dtype="float32")
    export = evaluate(run / "export", data=[str(texts)], seq_len=own.seq_len, batch_size=128)  # the run's
    assert dataclasses.replace(export, model=own.model) == own
    smaller = evaluate(run / "export", data=[str(texts)], seq_len=own.seq_len, batch_size=4)
    assert smaller.loss == pytest.approx(own.loss, rel=1e-6)  # sums of other batches, in float32


def test_changed_texts_are_refused_by_a_run_and_not_by_data(run: Path, tmp_path: Path) -> None:
    file = run.parent / "texts" / "00.txt"
    before = file.read_bytes()
    file.write_text("changed")
    try:
        with pytest.raises(UserError, match=r"the texts are not those that .*run was trained on .*give --data"):
            evaluate(run)
        evaluate(run, data=[str(file)])
    finally:
        file.write_bytes(before)


def test_texts_that_are_gone_are_said_to_be_the_runs(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "copied")
    config = (copied / "config.toml").read_text()
    (copied / "config.toml").write_text(config.replace(str(run.parent / "texts"), str(tmp_path / "nowhere.txt")))
    with pytest.raises(UserError, match=r"the texts of .*copied cannot be had: .*nowhere\.txt.*give others with"):
        evaluate(copied)


def test_a_tokenized_corpus_is_no_text_to_evaluate(run: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    tokenize([str(run.parent / "texts")], Settings(tokenizer=run), store)
    with pytest.raises(UserError, match=r"store' is a tokenized corpus, training texts included: give texts"):
        evaluate(run, data=[str(store)])


def test_weights_that_changed_on_the_disk_are_refused(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "copied")
    weights = copied / "checkpoints" / "00000003" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged \(its checksum is another"):
        evaluate(copied)
    evaluate(copied / "checkpoints" / "00000002")


def test_an_export_holds_out_nothing(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model is not the folder of a run, so that no text is held out: give --data"):
        evaluate(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 65}, r"seq_len=65 is longer than the model's max_position_embeddings=64"),
        ({"seq_len": 0}, "seq_len=0 must be a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"num_sequences": 0}, "sequences=0 must be a whole number of at least 1"),
        ({"dtype": "int8"}, "dtype='int8' is not known: choose one of auto, float32, bfloat16"),
        ({"device": "abacus"}, "device='abacus' is not to be had here"),
        ({"data": ["nowhere.txt"]}, r"data='nowhere\.txt' does not exist"),
    ],
)
def test_bad_values_are_refused_by_name(options: dict[str, Any], message: str, folder: Path, texts: Path) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(folder, **{"data": [str(texts)], **options})


def test_a_text_without_a_whole_sequence_can_be_read_but_not_drawn_from(folder: Path, tmp_path: Path) -> None:
    short = [str(write_texts(tmp_path / "short", ["a"]))]
    assert evaluate(folder, data=short).num_tokens == 2
    with pytest.raises(UserError, match=r"the given text has 2 tokens, fewer than one sequence of seq_len=64"):
        evaluate(folder, data=short, num_sequences=1)


def test_a_diverged_model_is_an_error(folder: Path, texts: Path) -> None:
    weights = {name: torch.full_like(W, torch.nan) for name, W in small_model(LONG).state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"the model's loss is nan: its training diverged"):
        evaluate(folder, data=[str(texts)])


def test_a_model_without_a_run_is_read_in_float32_and_no_further_than_its_window(folder: Path, texts: Path) -> None:
    found = evaluate(folder, data=[str(texts)])
    assert (found.seq_len, found.dtype) == (64, "float32")
    assert Reading().seq_len == 1024


def test_the_table_and_the_json_say_the_same(folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(folder, data=[str(texts)])
    words = ["eval", str(folder), "--data", str(texts)]
    app([*words, "--json"], standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    assert (said["loss"], said["perplexity"], said["bits_per_byte"]) == (
        found.loss,
        found.perplexity,
        found.bits_per_byte,
    )
    assert (said["tokens"], said["documents"], said["bytes"]) == (found.num_tokens, 3, found.num_bytes)
    app(words, standalone_mode=False)
    table = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert table["loss"].strip() == f"{found.loss:.4f} nats per token"
    assert table["bits per byte"].strip() == f"{found.bits_per_byte:.4f}"
    assert table["tokens"].strip() == f"{found.num_tokens} in sequences of 64"


@pytest.mark.parametrize("name", ["runs[red]/x", "runs[/b]"])
def test_brackets_in_a_path_are_shown_as_they_are(name: str) -> None:
    found = Evaluation(Path(name), name, 1.0, num_tokens=1, num_documents=1, num_bytes=1, seq_len=1, dtype="float32")
    assert table_of(found, console=Console(width=100)).count(name) == 2


def test_a_perplexity_beyond_all_numbers_is_none_in_json() -> None:
    found = Evaluation(Path("m"), "d", 1000.0, num_tokens=1, num_documents=1, num_bytes=1, seq_len=1, dtype="float32")
    assert found.perplexity == math.inf
    assert json.loads(found.to_json())["perplexity"] is None


def test_documents_end_with_the_models_own_end(tmp_path: Path, texts: Path) -> None:
    folder = write_export(tmp_path / "model", dataclasses.replace(LONG, vocab_size=258, eos_token_id=257))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    found = load_trained(folder, device="cpu")
    text = given_text([str(texts)], found.tokenizer, text_field="text", ends=found.ends)
    assert text.end == 257
    assert (text.tokens == 257).sum() == len(DOCUMENTS)
    assert not (text.tokens == END).any()


def test_bytes_that_the_tokens_do_not_hold_are_not_counted(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "model", LONG)
    tokenizer = Tokenizer(models.WordLevel({"say": 0, "now": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("say what nobody knows now")
    found = evaluate(folder, data=[str(tmp_path / "a.txt")])
    assert (found.num_bytes, found.bits_per_byte) == (None, None)
    assert math.isfinite(found.loss)


def test_texts_that_nobody_can_hold_against_a_record_are_not_taken_for_held_out(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "copied")
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(UserError, match=r"copied/export does not say what it was trained on.*: give --data"):
        evaluate(copied)


def test_the_key_of_a_text_is_the_runs_unless_given(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "copied")
    config = copied / "config.toml"
    config.write_text(config.read_text().replace('text_field = "text"', 'text_field = "content"'))
    lines = tmp_path / "two.jsonl"
    lines.write_text(json.dumps({"text": "abacus", "content": "brick brick brick"}) + "\n")
    own, other = evaluate(copied, data=[str(lines)]), evaluate(copied, data=[str(lines)], text_field="text")
    assert (own.num_bytes, other.num_bytes) == (17, 6)
    assert evaluate(run / "export", data=[str(lines)], seq_len=16).num_bytes == 6
