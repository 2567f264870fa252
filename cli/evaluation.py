"""What an evaluation found, and how it is said.

    perplexity = exp(loss),    bits per byte = loss * tokens / ln 2 / bytes

Bits per byte compare models with different tokenizers; loss and perplexity do not.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Args:
        model: the folder of the weights.
        data: what the text is.
        loss: nats per token.
        num_tokens: that were predicted.
        num_documents: in the text.
        num_bytes: of the text, as UTF-8; None where only some of its tokens were predicted, or they lose some of it.
        seq_len: how many tokens a sequence has.
        dtype: of matrix products.
    """

    model: Path
    data: str
    loss: float
    num_tokens: int
    num_documents: int
    num_bytes: int | None
    seq_len: int
    dtype: str

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # exp(710) overflows

    @property
    def bits_per_byte(self) -> float | None:
        """None where `num_bytes` is."""
        return None if self.num_bytes is None else self.loss * self.num_tokens / math.log(2) / self.num_bytes

    def to_json(self) -> str:
        """Return everything as one line of JSON, which has no number for an infinite perplexity: it is null."""
        content = {
            "loss": self.loss,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "bytes": self.num_bytes,
            "seq_len": self.seq_len,
            "dtype": self.dtype,
            "model": str(self.model),
            "data": self.data,
        }
        return json.dumps(content)


def table_of(evaluation: Evaluation, *, console: Console) -> str:
    """Return an evaluation as a small table, in what a console can show."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(evaluation).items():
        table.add_row(name, Text(text))
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def _rows(evaluation: Evaluation) -> dict[str, str]:
    bits, num_bytes = evaluation.bits_per_byte, evaluation.num_bytes
    return {
        "loss": f"{evaluation.loss:.4f} nats per token",
        "perplexity": f"{evaluation.perplexity:,.2f}",
        "bits per byte": "-" if bits is None else f"{bits:.4f}",
        "tokens": f"{evaluation.num_tokens:,} in sequences of {evaluation.seq_len:,}",
        "documents": f"{evaluation.num_documents:,}",
        "bytes": "-" if num_bytes is None else f"{num_bytes:,}",
        "data": evaluation.data,
        "model": str(evaluation.model),
        "products in": evaluation.dtype,
    }
