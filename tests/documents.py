"""Documents for the tests of the data path, and the files they come in."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

from relora_opt_cli.parts import Part, parts
from relora_opt_cli.sources import find_sources, read_sources
from relora_opt_cli.split import split_parts, take_census

WORDS = "the people of these united states have heard in peace and war that union is strength and".split()  # noqa: SIM905


def sentences(count: int, *, seed: int = 0, length: int = 60) -> list[str]:
    """Distinct documents of common words."""
    draw = random.Random(seed)
    return [f"{seed}-{i} " + " ".join(draw.choices(WORDS, k=length)) + ".\n" for i in range(count)]


def write(path: Path, contents: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return str(path)


def lines(texts: Iterable[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def read(*names: str, text_field: str = "text") -> list[str]:
    """Return the documents that some names stand for."""
    found, held = [], ""
    for part in read_sources(find_sources(names), text_field):
        held += part.text
        if part.is_last:
            found.append(held)
            held = ""
    assert not held
    return found


def in_parts(texts: list[str], most: int = 1 << 18) -> list[Part]:
    return [part for text in texts for part in parts([text], most=most)]


def split(texts: list[str], *, most: int = 1 << 18, share: float = 0.05) -> tuple[list[str], list[str]]:
    """Return the training and the held-out documents."""
    census = take_census(lambda: in_parts(texts, most), val_share=share)
    sides: tuple[list[str], list[str]] = ([], [])
    held = {False: "", True: ""}
    for part in split_parts(lambda: in_parts(texts, most), census):
        held[part.is_held_out] += part.text
        if part.is_last:
            sides[part.is_held_out].append(held[part.is_held_out])
            held[part.is_held_out] = ""
    assert held == {False: "", True: ""}  # every document ended
    return sides
