"""A tokenizer gives every text back, and the tokens depend on nothing but the documents."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from documents import sentences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from relora_opt_cli import tokens
from relora_opt_cli.encoding import chained, cut_pieces, encode_pieces
from relora_opt_cli.errors import UserError
from relora_opt_cli.parts import parts
from relora_opt_cli.split import SplitPart
from relora_opt_cli.store import Stream
from relora_opt_cli.tokens import (
    END_OF_TEXT,
    cached_tokenizer,
    check_round_trip,
    default_cache_folder,
    end_of_text_id,
    ends_beside,
    fit_tokenizer,
    is_same,
    load_tokenizer,
    training_sample,
    vocabulary_size,
    without_template,
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TEXTS = sentences(60)
TOKENIZER = fit_tokenizer(TEXTS, vocab_size=300)


def encode(texts: list[str], tokenizer: Tokenizer, *, most: int = 1 << 18, size: int = 1 << 22) -> Stream:
    """Return the training stream of some documents, cut into parts and pieces of some sizes."""
    cut = (SplitPart(part.text, part.is_last, False) for text in texts for part in parts([text], most=most))
    pieces = list(encode_pieces(cut_pieces(cut, size=size), tokenizer))
    assert sum(piece.num_documents["train"] for piece in pieces) == len(texts)
    return np.concatenate([piece.ids["train"] for piece in pieces])


# ---- encoding


@given(st.text(min_size=1, max_size=40).filter(lambda text: not text.isspace()))
def test_any_text_is_encoded_and_decodes_to_itself(text: str) -> None:
    stream = encode([text], TOKENIZER)
    assert TOKENIZER.decode(stream[:-1].tolist(), skip_special_tokens=False) == text


def test_only_packing_writes_an_end_of_text() -> None:
    spelled = f"before {END_OF_TEXT} after"
    stream = encode([spelled, "x"], TOKENIZER)
    assert np.flatnonzero(stream == end_of_text_id(TOKENIZER)).tolist()[-1] == len(stream) - 1
    assert (stream == end_of_text_id(TOKENIZER)).sum() == 2
    assert TOKENIZER.encode(END_OF_TEXT).ids == [end_of_text_id(TOKENIZER)]  # the tokenizer itself is as before


@pytest.mark.parametrize("size", [1, 500, 10**9])
def test_streams_do_not_depend_on_how_documents_are_grouped(size: int) -> None:
    alone = np.concatenate([encode([text], TOKENIZER) for text in TEXTS])
    assert np.array_equal(encode(TEXTS, TOKENIZER, size=size), alone)


@pytest.mark.parametrize("before", [None, "true"])
def test_the_threads_of_tokenizers_rest_while_each_of_ours_has_a_piece_and_are_given_back(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    pieces = encode_pieces(
        cut_pieces(iter([SplitPart("a", True, False), SplitPart("b", True, False)]), size=1), TOKENIZER
    )
    next(pieces)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    pieces.close()
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


LLAMA_3 = (  # the pattern of Llama 3's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def like_llama_3() -> Tokenizer:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    words = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return tokenizer


def like_llama_2() -> Tokenizer:
    pieces = {"<unk>": 0, "</s>": 1, "▁": 2, **{chr(c): c for c in range(33, 127)}}
    bytes_ = {f"<0x{byte:02X}>": 200 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE({**pieces, **bytes_}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def with_metaspace(scheme: str) -> Tokenizer:
    tokenizer = like_llama_2()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return tokenizer


LIKE = {
    "GPT-2": TOKENIZER,
    "Llama 3": like_llama_3(),
    "Llama 2": like_llama_2(),
    **{f"Metaspace, {scheme}": with_metaspace(scheme) for scheme in ("always", "first", "never")},
}


@pytest.mark.parametrize("tokenizer", LIKE.values(), ids=LIKE)
@pytest.mark.parametrize("size", [1, pytest.param(1 << 22, marks=pytest.mark.slow)])
@given(st.lists(st.text("ab1.'\n é-", max_size=9), min_size=1, max_size=20), st.integers(20, 40))
@settings(deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_a_long_document_has_the_tokens_that_it_would_have_in_one_part(
    size: int, tokenizer: Tokenizer, words: list[str], most: int
) -> None:
    texts = [" of the ".join(words) + ".", " of"]  # there is a place to cut within every 20 characters
    assert np.array_equal(encode(texts, tokenizer, most=most, size=size), encode(texts, tokenizer))


def test_a_space_that_is_all_that_a_part_holds_is_not_lost() -> None:
    ids = encode(["abcd "], like_llama_2(), most=4)
    assert like_llama_2().decode(ids.tolist(), skip_special_tokens=False).startswith("abcd ")


def test_each_side_of_a_piece_has_its_own_documents() -> None:
    sides = [SplitPart(text, True, is_held_out) for text, is_held_out in zip("abcd", [0, 1, 1, 0], strict=True)]
    (piece,) = encode_pieces(cut_pieces(iter(sides)), TOKENIZER)
    assert np.array_equal(piece.ids["train"], encode(["a", "d"], TOKENIZER))
    assert np.array_equal(piece.ids["val"], encode(["b", "c"], TOKENIZER))
    assert piece.num_documents == {"train": 2, "val": 2}


def test_the_chain_of_pieces_depends_on_every_part_its_end_and_its_side() -> None:
    variants = [
        [SplitPart("ab", True, False)],
        [SplitPart("ab", False, False)],
        [SplitPart("ab", True, True)],
        [SplitPart("a", True, False), SplitPart("b", True, False)],
        [SplitPart("b", True, False), SplitPart("a", True, False)],
    ]
    chains = {chained(chained("", piece.digest), "x") for parts in variants for piece in cut_pieces(iter(parts))}
    assert len(chains) == len(variants)
    assert chained(chained("", "a"), "b") != chained(chained("", "b"), "a")


# ---- training


def test_fitting_is_deterministic_and_stops_where_the_text_is_exhausted() -> None:
    assert fit_tokenizer(TEXTS, vocab_size=400).to_str() == fit_tokenizer(TEXTS, vocab_size=400).to_str()
    assert vocabulary_size(TOKENIZER) == 300
    assert vocabulary_size(fit_tokenizer(["abab"], vocab_size=4096)) == 258
    with pytest.raises(UserError, match="vocab_size=256 must be at least 257"):
        fit_tokenizer(TEXTS, vocab_size=256)


@given(st.lists(st.text("abc", min_size=1, max_size=9), max_size=20), st.integers(1, 60), st.randoms())
def test_a_tokenizer_is_trained_on_all_texts_or_on_a_sample_of_bounded_size(
    texts: list[str], most: int, shuffle: random.Random
) -> None:
    sample = training_sample(iter(texts), most=most)
    if sum(map(len, texts)) <= most:
        assert sample == texts
    else:
        assert len(sample) == 1 or sum(map(len, sample)) <= most
    assert sorted(training_sample(shuffle.sample(texts, len(texts)), most=most)) == sorted(sample)
    rest = iter(texts)
    assert all(text in rest for text in sample)  # in order


# ---- foreign ones


def words(end: str) -> Tokenizer:
    foreign = Tokenizer(models.WordLevel({"hello": 0, "?": 1, end: 70_000}, unk_token="?"))
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    return foreign


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"])
def test_foreign_tokenizers_are_used_whole(end: str, tmp_path: Path) -> None:
    foreign = words(end)
    foreign.enable_truncation(1)
    foreign.enable_padding(length=8)
    foreign.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path / "tokenizer.json", tmp_path):
        loaded = load_tokenizer(path)
        stream = encode(["hello other", "hello"], loaded)
        assert stream.tolist() == [0, 1, 70_000, 0, 70_000]
        assert stream.dtype == np.uint32
        assert vocabulary_size(loaded) == 70_001


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (tmp_path / "gone.json", tmp_path):
        with pytest.raises(UserError, match=r"tokenizer='.*\.json' does not exist: give a tokenizer.json, or a folder"):
            load_tokenizer(place)
    bad = tmp_path / "bad.json"
    empty = Tokenizer(models.BPE()).to_str().encode()
    for contents in (b"{}", b"\xff\x00", b"not json", TOKENIZER.to_str().encode()[:-9], b"[" * 10**5, b"", empty):
        bad.write_bytes(contents)
        with pytest.raises(UserError, match=r"^tokenizer='.*bad.json' cannot be read \(.*\): give a tokenizer.json"):
            load_tokenizer(bad)
    monkeypatch.setattr(tokens, "_MOST_BYTES", 1 << 20)
    bad.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(UserError, match=r"tokenizer='.*bad.json' has more than 1 MB"):
        load_tokenizer(bad)
    with pytest.raises(UserError, match=r"tokenizer=.x+. does not exist: give a"):
        load_tokenizer("x" * 5000)
    with pytest.raises(UserError, match=r"tokenizer='/dev/null' is no regular file"):
        load_tokenizer("/dev/null")


def test_a_tokenizer_whose_tokens_are_drawn_at_random_is_refused(tmp_path: Path) -> None:
    drawn = Tokenizer.from_str(TOKENIZER.to_str())
    drawn.model.dropout = 0.1
    drawn.save(str(tmp_path / "t.json"))
    with pytest.raises(
        UserError, match=r"t\.json' has dropout=0\.1, with which a text has other tokens every time: set"
    ):
        load_tokenizer(tmp_path / "t.json")


def test_a_tokenizer_that_cannot_end_or_encode_a_text_is_refused() -> None:
    endless = Tokenizer(models.WordLevel({"hello": 0}, unk_token="hello"))
    with pytest.raises(UserError, match=r"tokenizer has none of <\|endoftext\|>, </s>"):
        encode(["hello"], endless)
    wordless = Tokenizer(models.WordLevel({"hello": 0, "</s>": 1}, unk_token="?"))
    for use in (lambda: encode(["other"], wordless), lambda: check_round_trip(wordless, ["other"])):
        with pytest.raises(UserError, match=r"tokenizer cannot encode the texts \(.*\): give another one"):
            use()


MANGLED = TOKENIZER.to_str().encode()


@given(st.integers(0, 1500), st.sampled_from([b"", b"null", b"-1", b'"x"', b"{}", b"99999999999"]), st.integers(0, 40))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mangled_tokenizer_loads_or_is_refused_in_one_sentence(
    tmp_path: Path, at: int, new: bytes, length: int
) -> None:
    (tmp_path / "t.json").write_bytes(MANGLED[:at] + new + MANGLED[at + length :])
    said = ""
    try:
        loaded = load_tokenizer(tmp_path / "t.json")
        end_of_text_id(loaded)
        check_round_trip(loaded, TEXTS[:1])
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 600


# ---- the way back


def lowercasing() -> Tokenizer:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def prefixing() -> Tokenizer:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


@pytest.mark.parametrize("make", [lambda: TOKENIZER, like_llama_3, like_llama_2])
def test_tokenizers_that_give_every_text_back_are_taken(make: Callable[[], Tokenizer]) -> None:
    check_round_trip(make(), [*TEXTS, " a  b\n\n\tÄ 漢字 😀\x00\x7f ", f"spelled {END_OF_TEXT} out", "</s><0x41>"])


@pytest.mark.parametrize(
    ("make", "text", "message"),
    [
        (lowercasing, "in Peace and war", r"'in Peace and war' comes back as 'in peace and war': give another"),
        (prefixing, "union", r"'union' comes back as ' union': .* accept what it loses with --allow-lossy$"),
        (
            lambda: words("</s>"),
            "a long beginning, hello",
            r"'a long beginning, he' comes back as '\? \? \? \? hello'",
        ),
    ],
)
def test_a_tokenizer_that_loses_something_is_refused_with_the_first_place(
    make: Callable[[], Tokenizer], text: str, message: str
) -> None:
    with pytest.raises(UserError, match=r"^tokenizer does not give the texts back, " + message):
        check_round_trip(make(), ["", text])


# ---- the cache of trained ones


def cached(folder: Path | None, *, digest: str = "d", vocab_size: int = 300) -> Tokenizer:
    return cached_tokenizer(lambda: TEXTS, vocab_size=vocab_size, digest=digest, folder=folder)


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "fit_tokenizer", lambda *_, **__: pytest.fail("trained again"))


def test_a_tokenizer_is_trained_once_for_every_text_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vocabulary_size(cached(tmp_path)) == 300
    assert vocabulary_size(cached(tmp_path, vocab_size=310)) == 310
    cached(tmp_path, digest="e")
    assert len(list(tmp_path.iterdir())) == 3
    forbid_training(monkeypatch)
    assert cached(tmp_path).to_str() == TOKENIZER.to_str()


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[: len(raw) // 2], lambda raw: raw[:500] + b"#" + raw[501:], lambda raw: b"", lambda raw: b"\xff"],
)
def test_a_damaged_entry_is_made_again(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert cached(tmp_path).to_str() == TOKENIZER.to_str()
    forbid_training(monkeypatch)
    assert cached(tmp_path).to_str() == TOKENIZER.to_str()


def test_an_unwritable_cache_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert cached(tmp_path / "file" / "cache").to_str() == cached(None).to_str() == TOKENIZER.to_str()


def test_the_default_cache_folder_is_looked_up_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_folder() == Path("/somewhere/relora-opt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache_folder() == Path("/home/me/.cache/relora-opt")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_folder() is None


def test_a_model_says_what_ends_its_texts_and_the_names_that_we_know_choose_among_several() -> None:
    tokenizer = fit_tokenizer([], vocab_size=257)
    tokenizer.add_special_tokens(["</s>", "<|im_end|>"])
    usual, other, foreign = (tokenizer.token_to_id(name) for name in (END_OF_TEXT, "</s>", "<|im_end|>"))
    assert end_of_text_id(tokenizer) == usual
    assert end_of_text_id(tokenizer, [other]) == other
    assert end_of_text_id(tokenizer, [foreign]) == foreign
    assert end_of_text_id(tokenizer, [foreign, other]) == other
    letter = tokenizer.token_to_id("a")  # the end of another tokenizer's
    assert end_of_text_id(tokenizer, [letter, 100_000]) == usual


@pytest.mark.parametrize(
    ("config", "ends"),
    [
        ({"eos_token_id": 2}, (2,)),
        ({"eos_token_id": [5, 2]}, (5, 2)),
        ({"eos_token_id": None}, ()),
        ({"eos_token_id": [True, "2", 3]}, (3,)),
        ({}, ()),
        ([], ()),
        ("text", ()),
    ],
    ids=str,
)
def test_the_ends_of_a_model_stand_beside_its_tokenizer(tmp_path: Path, config: object, ends: tuple[int, ...]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").touch()
    assert ends_beside(tmp_path) == ends_beside(tmp_path / "tokenizer.json") == ends
    assert ends_beside(tmp_path / "no" / "tokenizer.json") == ()


def test_a_tokenizer_without_its_template_puts_nothing_around_a_text_and_is_the_same() -> None:
    tokenizer = fit_tokenizer([], vocab_size=257)
    plain = tokenizer.to_str()
    assert without_template(tokenizer).to_str() == plain
    tokenizer.add_special_tokens(["<s>"])
    before = tokenizer.encode("a b").ids
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    assert tokenizer.encode("a b").ids == [257, *before]
    assert without_template(tokenizer).encode("a b").ids == before
    assert is_same(tokenizer, without_template(tokenizer))
    assert not is_same(tokenizer, fit_tokenizer([], vocab_size=257))
