"""Every document lands on one side, which depends on its contents alone, however it is cut into parts."""

import random
from hashlib import sha256

import pytest
from documents import WORDS, in_parts, sentences, split
from hypothesis import given
from hypothesis import strategies as st
from relora_opt_cli import split as splits
from relora_opt_cli.errors import UserError
from relora_opt_cli.split import Census, Split, hash_share, split_parts, take_census

SHARES = (0.05, 0.3, 0.5)
documents = st.text(min_size=1, max_size=8).filter(lambda text: not text.isspace())


@given(st.lists(documents, min_size=2, max_size=40), st.randoms(), st.integers(1, 9), st.sampled_from(SHARES))
def test_the_split_keeps_every_document_on_one_side_whatever_the_order(
    texts: list[str], shuffle: random.Random, most: int, share: float
) -> None:
    train, val = split(texts, share=share)
    assert train
    assert val
    if len(set(texts)) > 1:
        assert sorted(train + val) == sorted(texts)
        assert not set(train) & set(val)
    assert split(texts, most=most, share=share) == (train, val)
    again = split(shuffle.sample(texts, len(texts)), share=share)
    assert (sorted(again[0]), sorted(again[1])) == (sorted(train), sorted(val))


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_where_the_hashes_draw_a_document_that_is_most_of_the_text_the_share_of_the_others_is_held_out(
    prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits, "_PREFIX", prefix)  # of how many hashes there is a sum is the same to what is found
    short = [text.ljust(90) for text in sentences(1000, length=3)]
    long = next(text for text in (str(i) * 54_000 for i in range(10, 99)) if hash_share(_hash(text)) < 0.05)
    train, val = split([*short, long])
    assert long in train
    assert len(val) == round(0.05 * sum(map(len, (*short, long))) / 90)
    assert val == sorted(val, key=short.index)
    assert max(map(_hash, val)) < min(_hash(text) for text in train if text != long)


def _hash(text: str) -> bytes:
    return sha256(text.encode()).digest()


def test_half_of_many_documents_is_held_out_where_their_hashes_draw_more() -> None:
    counts = [len(split(texts, share=0.5)[1]) for texts in _thousands()]
    assert all(440 < count <= 500 for count in counts)
    assert 500 in counts


def _thousands() -> list[list[str]]:
    """Documents that are equally long, in lists of a thousand; of half of the lists the hashes draw more than half."""
    return [[f"{number:09}" for number in range(start, start + 1000)] for start in range(0, 6000, 1000)]


def test_a_split_by_the_hashes_alone_is_named_as_before_there_was_another() -> None:
    assert repr(split_of(sentences(500), 0.05)) == "Split(val_share=0.05, only=None, cut=None)"  # names stores
    some = [repr(split_of(texts, share=0.5)) for texts in _thousands()]
    assert len(set(some)) == 1 + sum("below=b" in text for text in some) > 1


@given(st.lists(documents, min_size=2, max_size=40, unique=True))
def test_no_more_than_half_of_the_text_is_held_out(texts: list[str]) -> None:
    assert sum(map(len, split(texts)[1])) <= sum(map(len, texts)) / 2


def test_the_split_holds_out_about_five_percent_and_new_documents_move_no_old_ones() -> None:
    old, new = sentences(2000, seed=1, length=3), sentences(500, seed=2, length=3)
    held_out = set(split(old)[1])
    assert 60 < len(held_out) < 140  # 100 expected; four standard deviations are 39
    assert set(split(new + old)[1]) & set(old) == held_out


def test_the_split_is_the_same_in_every_process() -> None:
    assert split([str(i) for i in range(60)])[1] == ["39", "51", "55"]  # sha256's answer, not hash()'s


@pytest.mark.parametrize("most", [1 << 18, 100, 7])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_single_document_is_cut_near_its_end(copies: int, most: int) -> None:
    text = " ".join(WORDS * 10)
    train, val = split([text] * copies, most=most)
    assert len(train) == copies
    assert [shortened + val[0] for shortened in train] == [text] * copies
    assert len(val) == 1
    assert len(val[0]) == pytest.approx(0.05 * len(text), abs=1)


def test_one_document_that_is_most_of_the_text_is_not_held_out() -> None:
    large = next(text for text in sentences(100) if split([text, *"abcdefghijklmnopqrst"])[1] != [text])
    huge = next(str(i) * 1000 for i in range(10**4) if str(i) * 1000 in split([str(i) * 1000, *sentences(500)])[1])
    assert huge not in split([huge, "a few more", "words"])[1]
    assert split([huge, "a few more", "words"])[1] == ["a few more"]
    assert large


def split_of(texts: list[str], share: float) -> Split:
    return take_census(lambda: in_parts(texts), val_share=share).split


def census(texts: list[str]) -> Census:
    return take_census(lambda: in_parts(texts, 50))


def test_the_digest_depends_on_every_document_their_boundaries_and_their_order() -> None:
    texts = sentences(20)
    seen = {
        census(texts).digest,
        census(texts[::-1]).digest,
        census(texts[:-1]).digest,
        census([texts[0] + texts[1], *texts[2:]]).digest,
        census([*texts[:-1], texts[-1] + "!"]).digest,
    }
    assert len(seen) == 5
    assert census(texts).digest == take_census(lambda: in_parts(texts)).digest


def test_the_census_counts() -> None:
    texts = ["aé", "b" * 120, "漢"]
    found = census(texts)
    assert (found.num_documents, found.num_characters, found.num_bytes) == (3, 123, 126)
    assert sorted(found.sample) == sorted(["aé", "b" * 50, "漢"])
    assert len(found.long) == 1
    assert len(census(sentences(500)).sample) == 64
    assert set(census(sentences(500)).sample) == set(census(sentences(500)[::-1]).sample)


@pytest.mark.parametrize(
    "changed", [["a", "b", "c", "d" * 99], ["a", "b"], ["a", "b", "d" * 98], ["A", "b", "d" * 99], []]
)
def test_texts_that_changed_since_the_census_are_noticed(changed: list[str]) -> None:
    before = census(["a", "b", "d" * 99])
    with pytest.raises(UserError, match="the texts changed while they were read: leave them alone, and run it again"):
        list(split_parts(lambda: in_parts(changed, 50), before))
