"""A store holds what its texts give, is found again by them alone, survives whatever stops it, and is never stale."""

import errno
import hashlib
import io
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documents import lines, sentences, split, write
from relora_opt_cli import corpus as rooms
from relora_opt_cli import encoding, store_writer, tokens
from relora_opt_cli.corpus import Corpus, Settings, encode_sources, prepare, tokenize, train_tokenizer
from relora_opt_cli.data import Batches
from relora_opt_cli.encoding import Encoded
from relora_opt_cli.errors import UserError
from relora_opt_cli.journal import begin_journal
from relora_opt_cli.pace import Pace
from relora_opt_cli.store_writer import StoreWriter, key_of
from relora_opt_cli.tokens import end_of_text_id, fit_tokenizer
from rich.console import Console
from test_cli_tokens import encode, lowercasing

TEXTS = sentences(60)
TOKENIZER = fit_tokenizer(TEXTS, vocab_size=300)


def made(folder: Path, *, seq_len: int = 16, name: str = "texts.jsonl", **changes: Any) -> Corpus:
    """Return the corpus of TEXTS, by way of a cache in `folder`."""
    if not (folder / name).exists():
        write(folder / name, lines(TEXTS))
    settings = Settings(**{"vocab_size": 300, **changes})
    return prepare([str(folder / name)], settings, seq_len=seq_len, cache_folder=folder / "cache")


def same(a: Corpus, b: Corpus) -> bool:
    return np.array_equal(a.train, b.train) and np.array_equal(a.val, b.val) and a.fingerprint == b.fingerprint


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be tokenized or trained again."""
    monkeypatch.setattr(tokens, "fit_tokenizer", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(rooms, "encode_pieces", lambda *_, **__: pytest.fail("tokenized again"))


def stores(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("corpus-*"))


# ---- what it holds


def test_a_corpus_packs_each_side_and_is_the_same_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(tmp_path)
    forbid(monkeypatch)
    again = made(tmp_path)
    train, val = split(TEXTS)
    assert (first.num_train_documents, first.num_val_documents) == (len(train), len(val))
    assert first.num_val_bytes == sum(len(text.encode()) for text in val)
    assert np.array_equal(first.train, encode(train, fit_tokenizer(train, vocab_size=300)))
    assert np.array_equal(first.val, encode(val, first.tokenizer))
    assert same(first, again)
    assert (first.vocab_size, first.eos_id) == (300, end_of_text_id(first.tokenizer))
    assert (first.train == first.eos_id).sum() == len(train)
    assert first.train.dtype == np.uint16


def test_a_single_document_trains_with_its_beginning_and_is_evaluated_on_its_end(tmp_path: Path) -> None:
    text = " ".join(TEXTS)
    corpus = prepare([write(tmp_path / "a.txt", text)], Settings(vocab_size=300), seq_len=8, cache_folder=tmp_path)
    decoded = corpus.tokenizer.decode([*corpus.train[:-1], *corpus.val[:-1]], skip_special_tokens=False)
    assert decoded == text
    assert (corpus.num_train_documents, corpus.num_val_documents) == (1, 1)


def test_the_share_that_is_held_out_is_an_option(tmp_path: Path) -> None:
    write(tmp_path / "texts.jsonl", lines(sentences(400, length=5)))
    shares = [made(tmp_path, val_share=share, seq_len=4).num_val_documents / 400 for share in (0.02, 0.4)]
    assert shares == pytest.approx([0.02, 0.4], abs=0.1)  # four standard deviations


def test_streams_are_read_from_the_disk_and_not_held(tmp_path: Path) -> None:
    corpus = made(tmp_path)
    for stream in (corpus.train, corpus.val):
        assert isinstance(stream.base.obj, mmap.mmap)
        assert not stream.flags.writeable


def test_a_run_goes_on_when_texts_and_store_are_gone(tmp_path: Path) -> None:
    corpus, other = made(tmp_path), made(tmp_path)
    kept = other.train.copy()
    (tmp_path / "texts.jsonl").unlink()
    (place,) = stores(tmp_path)
    for file in place.iterdir():
        file.unlink()
    assert np.array_equal(corpus.train, kept)
    with pytest.raises(UserError, match=r"texts\.jsonl' does not exist"):
        prepare([str(tmp_path / "texts.jsonl")], Settings(), seq_len=16)


def test_a_file_that_is_cut_under_a_run_is_one_sentence_and_not_a_bus_error(tmp_path: Path) -> None:
    corpus = made(tmp_path)
    batches = Batches(corpus.train, seq_len=16, batch_size=2)
    before = batches.batch(0)
    (place,) = stores(tmp_path)
    (place / "train.bin").chmod(0o644)
    os.truncate(place / "train.bin", 10)
    with pytest.raises(UserError, match=r"file of the tokens was cut to 10 of \d+ bytes while the run read it: leave"):
        batches.batch(0)
    assert torch.equal(Batches(made(tmp_path).train, seq_len=16, batch_size=2).batch(0), before)


def test_a_corpus_shorter_than_one_sequence_is_refused_with_the_numbers(tmp_path: Path) -> None:
    corpus = made(tmp_path)
    assert len(made(tmp_path, seq_len=len(corpus.val) - 1).val) == len(corpus.val)
    with pytest.raises(
        UserError, match=rf"held-out text has {len(corpus.val)} tokens, fewer than .*={len(corpus.val)} and"
    ):
        made(tmp_path, seq_len=len(corpus.val))
    with pytest.raises(
        UserError, match=r"the training text has .* seq_len=9999999 .*give more data or a smaller seq_len"
    ):
        made(tmp_path, seq_len=9999999)
    with pytest.raises(UserError, match="the training text has 1 token,"):
        prepare([write(tmp_path / "short.txt", "a")], Settings(), seq_len=4, cache_folder=tmp_path)
    with pytest.raises(UserError, match=r"data=.*empty\.txt holds no text: give sources with at least one document"):
        prepare([write(tmp_path / "empty.txt", " ")], Settings(), seq_len=4, cache_folder=tmp_path)


# ---- what finds it


def test_a_given_tokenizer_replaces_training_one(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert made(tmp_path, tokenizer=path, vocab_size=5).tokenizer.to_str() == TOKENIZER.to_str()


def test_a_tokenizer_that_loses_something_is_taken_only_when_that_is_allowed(tmp_path: Path) -> None:
    lowercasing().save(str(tmp_path / "t.json"))
    write(tmp_path / "texts.jsonl", lines([*TEXTS, "UNION"]))
    with pytest.raises(UserError, match=r"tokenizer does not give the texts back, 'UNION' comes back as 'union'"):
        made(tmp_path, tokenizer=tmp_path / "t.json")
    assert not stores(tmp_path)
    assert "UNION" not in (corpus := made(tmp_path, tokenizer=tmp_path / "t.json", allow_lossy=True)).tokenizer.decode(
        corpus.train.tolist()
    )


def test_a_changed_text_tokenizer_or_setting_never_meets_a_stale_store(tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    first, status = made(tmp_path), source.stat()
    changed = made(tmp_path, vocab_size=310)
    assert changed.vocab_size == 310
    assert not same(first, changed)
    assert not same(first, made(tmp_path, val_share=0.2))
    seen = {first.fingerprint}
    variants = [
        [*TEXTS[:-1], TEXTS[-1].replace("peace", "Peace").replace("war", "raw")],
        [TEXTS[0] + TEXTS[1], *TEXTS[2:]],
        TEXTS[::-1],
    ]
    for texts in variants:
        source.write_bytes(lines(texts))
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        corpus = made(tmp_path)
        assert np.array_equal(corpus.train, encode(split(texts)[0], corpus.tokenizer))
        seen.add(corpus.fingerprint)
    assert len(seen) == 1 + len(variants)
    assert variants[-1] != TEXTS
    source.write_bytes(lines(TEXTS))
    assert same(made(tmp_path), first)


def test_a_text_that_changes_in_place_with_size_and_time_restored_is_noticed(tmp_path: Path) -> None:
    source, first = tmp_path / "texts.jsonl", made(tmp_path)
    before, raw = source.stat(), source.read_bytes()
    with source.open("r+b") as file:
        file.write(raw.replace(b"war", b"raw"))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = source.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert not same(made(tmp_path), first)


def test_the_same_text_in_another_place_and_format_finds_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(tmp_path)
    forbid(monkeypatch)
    (tmp_path / "texts.jsonl").unlink()
    write(tmp_path / "other.jsonl", lines(TEXTS[:30]) + b"\n" + lines(TEXTS[30:]))
    assert same(made(tmp_path, name="other.jsonl"), first)


def test_a_text_that_changes_while_it_is_tokenized_is_refused_and_leaves_nothing_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "cut_pieces", lambda parts: encoding.cut_pieces(parts, size=500))
    source = Path(write(tmp_path / "texts.jsonl", lines(TEXTS)))
    take = rooms.take_census

    def then_change(*arguments: Any, **options: Any) -> Any:
        census = take(*arguments, **options)
        source.write_bytes(lines([*TEXTS[:20], "changed", *TEXTS[21:]]))
        return census

    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(rooms, "take_census", then_change)
    with pytest.raises(UserError, match="the texts changed while they were read: leave them alone, and run it again"):
        made(tmp_path, tokenizer=tmp_path)
    monkeypatch.setattr(rooms, "take_census", take)
    source.write_bytes(lines(TEXTS))  # back again: what was written of the changed text must not be gone on from
    assert np.array_equal(made(tmp_path, tokenizer=tmp_path).train, encode(split(TEXTS)[0], TOKENIZER))


# ---- what damages it


def replace(file: Path, raw: bytes) -> None:
    """Put another file in the place of one that may be mapped."""
    file.unlink()
    file.write_bytes(raw)


def cut(file: Path) -> None:
    replace(file, file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    replace(file, bytes(raw))


def lengthen(file: Path) -> None:
    replace(file, file.read_bytes() + b"\0\0")


def empty(file: Path) -> None:
    replace(file, b"")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("train.bin", damage) for damage in (cut, flip, lengthen, empty, Path.unlink)),
        *(("val.bin", damage) for damage in (flip, Path.unlink)),
        *(("tokenizer.json", damage) for damage in (flip, empty, Path.unlink)),
        *(("corpus.json", damage) for damage in (cut, flip, Path.unlink)),
    ],
)
def test_a_damaged_store_is_made_again_in_the_cache_and_refused_elsewhere(
    name: str, damage: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, out = made(tmp_path), tmp_path / "out"
    tokenize([str(tmp_path / "texts.jsonl")], Settings(vocab_size=300), out)
    (place,) = stores(tmp_path)
    damage(place / name)
    damage(out / name)
    messages = (
        r"out' is damaged \(.*\): delete the folder and tokenize again",
        r"out' is a folder without \.txt",  # as it is without corpus.json
        r"out/tokenizer\.json' does not exist|tokenizer='.*out' cannot be read",
    )
    with pytest.raises(UserError, match="|".join(messages)):
        prepare([str(out)], Settings(), seq_len=16)
    assert same(made(tmp_path), first)
    forbid(monkeypatch)
    assert same(made(tmp_path), first)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 299),
        ("vocab_size", 10**6),
        ("num_train", 3),
        ("num_train", -1),
        ("num_val", "9"),
        ("format", 1),
        ("format", [2]),
        ("fingerprint", None),
        ("more", 1),
        ("num_val_documents", True),
        ("num_val_bytes", 1.5),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    made(tmp_path)
    (place,) = stores(tmp_path)
    manifest = json.loads((place / "corpus.json").read_text())
    (place / "corpus.json").write_text(json.dumps({**manifest, field: value}))
    with pytest.raises(UserError, match=r"is damaged \(.*\): delete the folder and tokenize again"):
        prepare([str(place)], Settings(), seq_len=16)


@pytest.mark.parametrize(
    "name", ["num_val_bytes", "num_val_documents", "num_train_documents", "num_train_bytes", "key"]
)
def test_a_number_that_was_changed_in_a_manifest_is_noticed(name: str, tmp_path: Path) -> None:
    made(tmp_path)
    (place,) = stores(tmp_path)
    manifest = json.loads((place / "corpus.json").read_text())
    changed = {**manifest, name: manifest[name] * 2}
    (place / "corpus.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"is damaged \(corpus\.json was changed\): delete the folder and tokenize"):
        prepare([str(place)], Settings(), seq_len=16)
    (place / "corpus.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"is damaged \(corpus\.json: .*\): delete the folder and tokenize"):
        prepare([str(place)], Settings(), seq_len=16)


def test_a_fingerprint_says_where_the_held_out_stream_begins_and_knows_those_that_did_not(tmp_path: Path) -> None:
    corpora = []
    for end in (20, 21):
        ids = {"train": np.full(end, 7, np.uint16), "val": np.full(60 - end, 7, np.uint16)}
        (tmp_path / str(end)).mkdir()
        with StoreWriter(tmp_path / str(end), "key", TOKENIZER.to_str(), vocab_size=300) as store:
            store.append(Encoded(encoding.Piece([]), ids, {"train": 1, "val": 1}, {"train": 1, "val": 1}))
            store.finish()
        corpora.append(prepare([str(tmp_path / str(end))], Settings(), seq_len=16))
    first, other = corpora
    old = hashlib.sha256(np.full(60, 7, np.uint16).tobytes()).hexdigest()
    assert first.is_known_as(first.fingerprint)
    assert first.is_known_as(old)
    assert not first.is_known_as(other.fingerprint)
    assert not first.is_known_as("")


def test_ids_beyond_the_vocabulary_are_refused_even_with_the_right_checksum(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with StoreWriter(tmp_path / "s", "key", TOKENIZER.to_str(), vocab_size=300) as store:
        ids = {"train": np.array([7] * 20, np.uint16), "val": np.array([7] * 20 + [300], np.uint16)}
        store.append(Encoded(encoding.Piece([]), ids, {"train": 1, "val": 1}, {"train": 1, "val": 1}))
        store.finish()
    with pytest.raises(UserError, match=r"damaged \(val\.bin has ids that are not below vocab_size=300\)"):
        prepare([str(tmp_path / "s")], Settings(), seq_len=16)


@pytest.mark.parametrize("name", ["gone.txt", "\0", "x" * 5000, "x" * 5000 + "/"])
def test_a_name_that_no_file_can_have_is_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match=r"^data='.*' does not exist"):
        prepare([name], Settings(), seq_len=16)
    with pytest.raises(UserError, match=r"^(tokenizer|out)="):
        tokenize([], Settings(tokenizer=name), Path(name))


def test_an_unwritable_cache_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    first = made(tmp_path)
    write(tmp_path / "file", "in the way")
    before = sorted(tmp_path.iterdir())
    corpus = prepare(
        [str(tmp_path / "texts.jsonl")], Settings(vocab_size=300), seq_len=16, cache_folder=tmp_path / "file" / "cache"
    )
    assert same(corpus, first)
    assert sorted(tmp_path.iterdir()) == before  # the folder for this run alone is gone already


# ---- what stops it


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a piece of every document, which at once goes to the disk."""
    monkeypatch.setattr(rooms, "cut_pieces", lambda parts: encoding.cut_pieces(parts, size=1))
    monkeypatch.setattr(store_writer, "_SECONDS", 0.0)


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Raise once `count` pieces are encoded, the first time."""
    encode_pieces = encoding.encode_pieces

    def stopping(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, piece in enumerate(encode_pieces(*arguments, **options)):
            if number == count:
                raise error
            yield piece

    monkeypatch.setattr(rooms, "encode_pieces", stopping)


def count_pieces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the pieces that are encoded from now on."""
    seen: list[Any] = []
    encode_pieces = encoding.encode_pieces

    def counting(*arguments: Any, **options: Any) -> Iterator[Any]:
        for piece in encode_pieces(*arguments, **options):
            seen.append(piece)
            yield piece

    monkeypatch.setattr(rooms, "encode_pieces", counting)
    return seen


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("stops", [[1], [30], [10, 10, 10], [0, 0]])
def test_what_was_tokenized_before_it_was_stopped_is_not_tokenized_again(
    stops: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    for count in stops:
        stop_after(count, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path, tokenizer=tmp_path)
    pieces = count_pieces(monkeypatch)
    corpus = made(tmp_path, tokenizer=tmp_path)
    train, val = split(TEXTS)
    assert np.array_equal(corpus.train, encode(train, TOKENIZER))
    assert np.array_equal(corpus.val, encode(val, TOKENIZER))
    assert (corpus.num_train_documents, corpus.num_val_documents) == (len(train), len(val))
    assert len(pieces) == 60 - sum(stops)
    (place,) = stores(tmp_path)
    assert sorted(file.name for file in place.iterdir()) == ["corpus.json", "tokenizer.json", "train.bin", "val.bin"]


def half_a_line(place: Path) -> None:
    with (place / "journal.jsonl").open("a") as journal:
        journal.write('{"num_pieces": 99, "chain')


def garbage(place: Path) -> None:
    with (place / "journal.jsonl").open("a") as journal:
        journal.write('[]\n{}\n"x"\n{"num_pieces": 1, "chain": 3, "num_documents": 4}\n')


def more_tokens(place: Path) -> None:
    for name in ("train.bin", "val.bin"):
        with (place / name).open("ab") as file:
            file.write(b"written after the last line of the journal")


def long(place: Path) -> None:
    """Make of a journal that of work that took days."""
    header, *entries = (place / "journal.jsonl").read_text().splitlines(keepends=True)
    (place / "journal.jsonl").write_text(header + "".join(entries) * (2 + (5 << 20) // len("".join(entries))))


def other_bytes(place: Path) -> None:
    """Change a number that no stream bears out."""
    header, *entries = (place / "journal.jsonl").read_text().splitlines(keepends=True)
    changed = [re.sub(r'("num_bytes": .*?"val": )(\d+)', r"\g<1>1\2", entry) for entry in entries]
    assert changed != entries
    (place / "journal.jsonl").write_text("".join([header, *changed]))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("damage", "num_left"),
    [
        (half_a_line, 30),
        (garbage, 30),
        (more_tokens, 30),
        (long, 30),
        (other_bytes, 60),
        (lambda place: flip(place / "train.bin"), 60),
        (lambda place: cut(place / "train.bin"), 60),
        (lambda place: (place / "val.bin").unlink(), 60),
        (lambda place: (place / "journal.jsonl").unlink(), 60),
        (lambda place: (place / "journal.jsonl").write_bytes(b"\xff"), 60),
    ],
)
def test_only_what_the_journal_says_truly_is_gone_on_from(
    damage: Callable[[Path], Any], num_left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    stop_after(30, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, tokenizer=tmp_path)
    (place,) = stores(tmp_path)
    damage(place)
    pieces = count_pieces(monkeypatch)
    assert np.array_equal(made(tmp_path, tokenizer=tmp_path).train, encode(split(TEXTS)[0], TOKENIZER))
    assert len(pieces) == num_left


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("when", [0, 1, 2, 7, 40, 170])
def test_a_full_disk_is_one_sentence_and_the_work_goes_on_when_there_is_room(
    when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "texts.jsonl", lines(TEXTS))
    calls = iter(range(10**6))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) >= when:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"tokens cannot be written to .*corpus-.*: No space left on device; make room"):
        made(tmp_path, tokenizer=tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)
    assert np.array_equal(made(tmp_path, tokenizer=tmp_path).train, encode(split(TEXTS)[0], TOKENIZER))


KILLED = """
import sys
from pathlib import Path
from relora_opt_cli import corpus, encoding, store_writer
corpus.cut_pieces = lambda parts: encoding.cut_pieces(parts, size=1)
store_writer._SECONDS = 0.0
append = store_writer.StoreWriter.append
def slowly(self, *arguments, **options):
    append(self, *arguments, **options)
    if self.num_pieces == 20:
        print("ready", flush=True)
        sys.stdin.read()
store_writer.StoreWriter.append = slowly
corpus.tokenize([sys.argv[1]], corpus.Settings(tokenizer=sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.usefixtures("small_pieces")
def test_two_processes_take_turns_and_a_killed_one_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "texts.jsonl", lines(TEXTS))
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    command = [sys.executable, "-c", KILLED, source, str(tmp_path), str(tmp_path / "out")]
    said: list[str] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"

        def waiting(self: object, text: str) -> None:
            said.append(text)
            other.send_signal(signal.SIGKILL)

        monkeypatch.setattr(rooms.Pace, "say", waiting)
        pieces = count_pieces(monkeypatch)
        corpus = tokenize([source], Settings(tokenizer=tmp_path), tmp_path / "out")
    assert said == [f"waiting for another process that writes to {tmp_path / 'out'}"]
    assert np.array_equal(corpus.train, encode(split(TEXTS)[0], TOKENIZER))
    assert len(pieces) == 40


# ---- folders


def test_a_tokenized_folder_is_what_its_texts_would_be_and_needs_them_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(tmp_path)
    written = tokenize([str(tmp_path / "texts.jsonl")], Settings(vocab_size=300), tmp_path / "out")
    (tmp_path / "texts.jsonl").unlink()
    forbid(monkeypatch)
    opened = prepare([str(tmp_path / "out")], Settings(), seq_len=16)
    assert same(written, first)
    assert same(opened, first)
    assert opened.tokenizer.to_str() == first.tokenizer.to_str()
    assert same(prepare([str(tmp_path / "out")], Settings(tokenizer=tmp_path / "out"), seq_len=16), first)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer='.*' is not the one that made data='.*out': leave it out"):
        prepare([str(tmp_path / "out")], Settings(tokenizer=tmp_path), seq_len=16)
    half = Path(shutil.copytree(tmp_path / "out", tmp_path / "half"))
    begin_journal(half, "key")
    (half / "corpus.json").unlink()
    with pytest.raises(
        UserError, match=r"data='.*half' is a corpus that relora-opt tokenize has not finished: run that"
    ):
        prepare([str(half)], Settings(), seq_len=16)
    with pytest.raises(UserError, match=r"data='.*out' is a tokenized corpus and goes alone: give it, or texts"):
        prepare([str(tmp_path / "out"), "more.txt"], Settings(), seq_len=16)


def test_tokenizing_again_changes_nothing_and_another_corpus_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "texts.jsonl", lines(TEXTS)), tmp_path / "out"
    tokenize([source], Settings(vocab_size=300), out)
    before = {file: (file.stat().st_ino, file.read_bytes()) for file in out.iterdir()}
    tokenize([source], Settings(vocab_size=300), out)
    with pytest.raises(UserError, match=r"out='.*' is not empty, and not of these texts, tokenizer and settings: "):
        tokenize([source], Settings(vocab_size=310), out)
    assert {file: (file.stat().st_ino, file.read_bytes()) for file in out.iterdir()} == before
    assert key_of(out)
    for name in ("mine/notes", "file"):
        write(tmp_path / name, "mine")
        with pytest.raises(UserError, match="is not empty"):
            tokenize([source], Settings(vocab_size=300), tmp_path / name.split("/")[0])
    with pytest.raises(UserError, match=r"out='.*' cannot be written, .*/file is in the way: give another folder"):
        tokenize([source], Settings(vocab_size=300), tmp_path / "file" / "a" / "b")
    with monkeypatch.context() as patch:
        patch.setattr(rooms.os, "access", lambda *_: False)  # a disk that is read-only, to root too
        with pytest.raises(UserError, match=r"out='.*' cannot be written, .* may not be written into: give another"):
            tokenize([source], Settings(vocab_size=300), tmp_path / "new")
    monkeypatch.setattr(rooms, "take_census", lambda *_, **__: pytest.fail("read the texts first"))
    with pytest.raises(UserError, match="is not empty"):
        tokenize([source], Settings(vocab_size=300), tmp_path / "mine")


def test_a_trained_tokenizer_is_the_one_that_a_run_would_train(tmp_path: Path) -> None:
    first = made(tmp_path)
    trained = train_tokenizer([str(tmp_path / "texts.jsonl")], Settings(vocab_size=300))
    assert trained.to_str() == first.tokenizer.to_str()


def test_files_that_are_not_read_are_told_of_wherever_texts_are(tmp_path: Path) -> None:
    write(tmp_path / "texts" / "a.jsonl", lines(TEXTS))
    write(tmp_path / "texts" / "notes.pdf", "")
    source, out = str(tmp_path / "texts"), io.StringIO()
    pace = Pace(Console(file=out))
    corpus = prepare([source], Settings(vocab_size=300), seq_len=16, cache_folder=tmp_path / "cache", pace=pace)
    encode_sources([source], corpus.tokenizer, text_field="text", end=corpus.eos_id, pace=pace)
    assert out.getvalue() == 2 * f"data={source!r}: not read, being of other kinds: 1 .pdf\n"


def test_preparing_is_silent_where_nobody_asks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    made(tmp_path)
    made(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert time.monotonic() - start < 60
