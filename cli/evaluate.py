"""How well a model predicts a text: the mean of -ln p over its tokens, exactly.

Every batch counts by its tokens, so that a last, shorter sequence weighs what it should. The loss of a batch is that of
training, and so are the sequences where only some are drawn: the numbers are then those that the run reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from .checkpoint import read_progress
from .config import CHOICES, Config
from .config_file import load_config_file
from .device import autocast_dtype
from .errors import UserError
from .evaluation import Evaluation
from .loss import batch_loss
from .model import Llama
from .pace import Pace
from .place import RUN_CONFIG, Place
from .predicted import Text, all_sequences, drawn_sequences, given_text, held_out_text
from .record import RECORD
from .resolution import resolve
from .trained import load_trained

_TOKENS = 2048  # at a time, of a whole text
_MOST = 1 << 31  # of anything


@dataclass(frozen=True)
class Reading:
    """How a model reads a text. Checked at construction: UserError names the field.

    Args:
        seq_len: tokens in a sequence.
        batch_size: sequences at a time.
        dtype: of matrix products: "auto", "float32" or "bfloat16".
        num_sequences: that are drawn from the text as a run draws those that it reports; None reads all of it.
    """

    seq_len: int = 1024
    batch_size: int = 4
    dtype: str = "float32"
    num_sequences: int | None = None

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "num_sequences"):
            value, name = getattr(self, name), name.removeprefix("num_")  # as the command line has it
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be a whole number of at least 1")
            if value is not None and value > _MOST:
                raise UserError(f"{name}={value} is more than {_MOST:,}, and than any text has: give fewer")
        if self.dtype not in CHOICES["dtype"]:
            raise UserError(f"dtype={self.dtype!r} is not known: choose one of {', '.join(CHOICES['dtype'])}")

    def sequences(self, text: Text) -> Iterable[Tensor]:
        """Return the batches (b, t + 1) of a text."""
        if self.num_sequences is None:
            return all_sequences(text, seq_len=self.seq_len, batch_size=self.batch_size)
        drawn = drawn_sequences(text.tokens, seq_len=self.seq_len, num_sequences=self.num_sequences)
        return torch.split(drawn, self.batch_size)


def evaluate(
    folder: Path,
    *,
    data: Sequence[str] = (),
    text_field: str | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    num_sequences: int | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> Evaluation:
    """Evaluate a model on a text.

    Args:
        folder: a run, an export, a checkpoint, or any Hugging Face Llama with a tokenizer.json: see place.py.
        data: sources, all of whose documents are read: see data.py. Empty means those that the model's run holds out.
        text_field: the key of the text in .jsonl lines and datasets; None means as in the model's run, or "text".
        seq_len, batch_size, dtype, num_sequences: see `Reading`. None means as in the model's run, but a whole text
            some 2,048 tokens at a time; of models that have no run, as in `Reading`, but in sequences no longer than
            the model's window.
        device: where the model computes; "auto" takes an accelerator where there is one.
        console: where progress is shown.

    Raises:
        UserError: for a model or a text that cannot be read or do not fit, and where the model's logits are not finite.
    """
    if text_field is not None and not data:
        raise UserError(
            f"text_field={text_field!r} is of texts that data names, and none are: give them, or leave it out"
        )
    trained = load_trained(folder, device=device)
    run, window = trained.place.run, trained.model.config.max_position_embeddings
    config = None if run is None else resolve(load_config_file(run / RUN_CONFIG), has_begun=True)
    given = {"seq_len": seq_len, "batch_size": batch_size, "dtype": dtype, "num_sequences": num_sequences}
    reading = _reading(config, window, {name: value for name, value in given.items() if value is not None})
    console = console or Console(quiet=True)
    pace = Pace(console)
    if data:
        own = "text" if config is None else config.text_field or "text"
        text = given_text(data, trained.tokenizer, text_field=text_field or own, ends=trained.ends, pace=pace)
    else:
        text = _held_out(trained.place, config, pace)
    precision = autocast_dtype(reading.dtype, trained.model.lm_head.weight.device)
    with _shown(console, len(text.tokens)) as advance:
        loss, num_tokens = _mean_loss(trained.model, reading.sequences(text), dtype=precision, advance=advance)
    return Evaluation(
        model=trained.place.weights,
        data=text.name,
        loss=loss,
        num_tokens=num_tokens,
        num_documents=text.num_documents,
        num_bytes=text.num_bytes if num_sequences is None else None,
        seq_len=reading.seq_len,
        dtype=str(precision).removeprefix("torch."),
    )


def _reading(config: Config | None, window: int, given: dict[str, Any]) -> Reading:
    if config is None:
        reading = Reading(**{"seq_len": min(window, Reading.seq_len), **given})
    else:
        seq_len = given.get("seq_len", config.seq_len)
        is_drawn = "num_sequences" in given  # then in the run's own batches, for its numbers to the last digit
        size = config.micro_batch_size if is_drawn else max(1, _TOKENS // max(1, seq_len))
        own = {"seq_len": config.seq_len, "batch_size": size, "dtype": config.dtype}
        reading = Reading(**{**own, **given})
    if reading.seq_len > window:
        raise UserError(
            f"seq_len={reading.seq_len} is longer than the model's max_position_embeddings={window}: shorten it"
        )
    return reading


def _held_out(place: Place, config: Config | None, pace: Pace) -> Text:
    if place.run is None or config is None:
        raise UserError(f"{place.weights} is not the folder of a run, so that no text is held out: give --data")
    if not (place.weights / RECORD).is_file():  # an export, or a checkpoint of old
        raise UserError(
            f"{place.weights} does not say what it was trained on, and the texts of {place.run} may have changed: "
            "give --data"
        )
    fingerprint = read_progress(place.weights).corpus
    return held_out_text(place.run, config, fingerprint=fingerprint, pace=pace)


@torch.inference_mode()
def _mean_loss(
    model: Llama, batches: Iterable[Tensor], *, dtype: torch.dtype, advance: Callable[[int], None]
) -> tuple[float, int]:
    """Return the mean over all predicted tokens, and how many they are."""
    nats, num_tokens = 0.0, 0
    for batch in batches:
        loss = float(batch_loss(model, batch.to(model.lm_head.weight.device), dtype=dtype))
        if not math.isfinite(loss):
            raise UserError(f"the model's loss is {loss}: its training diverged, use an earlier checkpoint")
        num_predicted = batch[:, 1:].numel()
        nats, num_tokens = nats + loss * num_predicted, num_tokens + num_predicted
        advance(num_predicted)
    return nats / num_tokens, num_tokens


@contextmanager
def _shown(console: Console, num_tokens: int) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how far it is, until it is done."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=num_tokens)
        yield lambda count: bar.advance(task, count)
