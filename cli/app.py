"""The command `relora-opt`: pretrain, tokenize, tokenizer train, export, generate, eval, checkpoints, plot, spectrum.

What is heavy (torch, datasets, matplotlib) is imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .config import FIELDS
from .config_file import load_config_file
from .errors import UserError, short_paths
from .flags import declare_options, spread_data
from .launch import launched
from .output import enduring_output, forgiving_output, quoted
from .prelude import prelude, work_begins
from .report import print_error
from .resolution import resolve

if TYPE_CHECKING:
    from .parallel import World

app = typer.Typer(
    name="relora-opt",
    help="Train language models by low-rank updates (ReLoRA), and export their merged weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; a mistake of the user's ends with one sentence and status 2."""
    try:
        with prelude():
            _run()
    except SystemExit as end:
        if _may_be_one_of_several():
            # Threads of gloo that outlive their process group abort the interpreter while it shuts down.
            if isinstance(end.code, str):
                sys.stderr.write(f"{end.code}\n")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _run() -> None:
    forgiving_output()
    try:
        with short_paths():
            app(args=spread_data(sys.argv[1:]))
    except UserError as error:
        print_error(str(error))
        sys.exit(2)


def _may_be_one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("0", "1")


@contextmanager
def _processes() -> Iterator[World | None]:
    """Join the run's other processes; where there are none, torch need not be imported for a mistake in a flag."""
    if launched("WORLD_SIZE") <= 1:
        yield None
        return
    from .parallel import world

    with world() as processes:
        yield processes


def pretrain(**options: Any) -> None:
    """Pretrain a language model by low-rank updates, with restarts where the run is long enough for them.

    With no argument: a small Llama on the State of the Union messages, in a few minutes on a laptop's CPU.
    """
    resume, config_file = options.pop("resume"), options.pop("config")
    given = {name: value for name, value in options.items() if value not in (None, [], ())}
    with enduring_output(), _processes() as processes, short_paths():
        if resume is not None:
            if config_file is not None:
                raise UserError(f"config={config_file!r} does not go with resume: give flags for what is to change")
            from .train import resume_run

            work_begins()
            resume_run(Path(resume), given, processes)
            return
        config = resolve({**(load_config_file(config_file) if config_file else {}), **given})
        from .train import start_run

        work_begins()
        start_run(config, processes)


declare_options(pretrain)
app.command()(pretrain)

_Data = Annotated[
    list[str] | None,
    typer.Argument(help="As for pretrain --data. (default: State of the Union messages)", show_default=False),
]
_TextField = Annotated[str, typer.Option(help=FIELDS["text_field"].metadata["help"], show_default=False)]
_ValShare = Annotated[float, typer.Option(help=FIELDS["val_share"].metadata["help"], show_default=False)]


@app.command()
@enduring_output()
def tokenize(
    out: Annotated[Path, typer.Option(help="Folder to write: new, empty, or of a try that was stopped.")],
    data: _Data = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer.json, or a folder with one. (default: one is trained)")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Tokens of the vocabulary to train. (default: 4096)", show_default=False)
    ] = None,
    text_field: _TextField = "text",
    val_share: _ValShare = 0.05,
    allow_lossy: Annotated[bool, typer.Option(help=FIELDS["allow_lossy"].metadata["help"])] = False,
) -> None:
    """Tokenize texts once, into a folder for pretrain --data; run again, it goes on where it was stopped."""
    options = {"tokenizer": tokenizer, "vocab_size": vocab_size, "text_field": text_field, "val_share": val_share}
    config = resolve({"data": data or [], "allow_lossy": allow_lossy, **options})
    from .corpus import Settings
    from .corpus import tokenize as tokenize_to
    from .origin import check_vocabulary
    from .pace import Pace
    from .plan import describe_texts

    work_begins()
    if tokenizer is not None:
        check_vocabulary(vocab_size, Path(tokenizer))

    corpus = tokenize_to(config.data, Settings.of(config), out, pace=Pace(Console()))
    typer.echo(f"{describe_texts(corpus)}; next: relora-opt pretrain --data {quoted(out)}")


tokenizer_app = typer.Typer(help="Train a tokenizer.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")


@tokenizer_app.command()
@enduring_output()
def train(
    out: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
    data: _Data = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens of the vocabulary, at least 257.")] = 4096,
    text_field: _TextField = "text",
    val_share: _ValShare = 0.05,
) -> None:
    """Train a byte-level BPE tokenizer, which gives every text back, for --tokenizer and transformers' AutoTokenizer.

    It sees the documents that pretrain would train on, or of more than 67 million characters a sample of that size.
    """
    config = resolve({"data": data or [], "vocab_size": vocab_size, "text_field": text_field, "val_share": val_share})
    from .corpus import Settings, train_tokenizer
    from .pace import Pace
    from .tokens import check_new, save_tokenizer, vocabulary_size

    work_begins()
    check_new(out)
    trained = train_tokenizer(config.data, Settings.of(config), pace=Pace(Console()))
    save_tokenizer(trained, out)
    typer.echo(
        f"{vocabulary_size(trained):,} tokens; samples of the texts come back exactly; next: relora-opt pretrain "
        f"--tokenizer {quoted(out)} --data ..."
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. (default: float32)")] = None,
) -> None:
    """Write a run's newest weights, or a checkpoint's, as a folder that transformers loads."""
    from .export import export_run

    work_begins()
    folder = export_run(run, out, dtype=dtype)
    command = f"relora-opt generate {quoted(folder)} --prompt 'The state of the union is'"
    typer.echo(f"exported to {folder}; next: {command}")


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Folder of a run, an export, a checkpoint or a Hugging Face Llama.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw among this many likeliest tokens; 0 means all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest that have this share together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Write a text with a trained model: the prompt, and what follows it."""
    from .generate import generate as pieces
    from .output import streamed_output
    from .sampling import Sampling

    work_begins()
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    text = pieces(model, prompt, max_new_tokens=max_new_tokens, sampling=sampling, device=device)
    with streamed_output() as write:
        for piece in chain([prompt], text):
            write(piece)


@app.command(name="eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a run, an export, a checkpoint or a Hugging Face Llama.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Texts, as for pretrain. (default: those that the run holds out)")
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(help="Key of the text in the lines and tables of --data. (default: the run's, or text)"),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="Predict only so many, drawn as those of a run's own reports: 256.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a sequence. (default: the run's, or at most 1024)")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences at a time. (default: about 2048 tokens)")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Matrix products in auto, float32 or bfloat16. (default: the run's, or float32)")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    is_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Measure how well a model predicts a text: loss, perplexity and bits per byte."""
    from .evaluate import evaluate as evaluation_of
    from .evaluation import table_of
    from .output import streamed_output

    work_begins()
    evaluation = evaluation_of(
        model,
        data=data or (),
        text_field=text_field,
        num_sequences=sequences,
        seq_len=seq_len,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        console=Console(stderr=True),
    )
    with streamed_output() as write:
        write(evaluation.to_json() if is_json else table_of(evaluation, console=Console()))


@app.command()
def checkpoints(run: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """List a run's checkpoints, and verify each; the exit status is 1 where one is damaged."""
    from .listing import list_checkpoints, print_checkpoints

    work_begins()
    listed = list_checkpoints(run)
    print_checkpoints(listed, console=Console())
    if any(line.damage for line in listed):
        sys.exit(1)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of one run, or of several to compare.")],
    out: Annotated[
        Path | None, typer.Option(help="The picture. (default: curves.png in the run; comparison.png here)")
    ] = None,
) -> None:
    """Draw loss and learning rate of a run, or the validation losses of several."""
    from .plot import plot_runs

    work_begins()
    typer.echo(f"drawn: {plot_runs(runs, out)}")


@app.command()
def spectrum(
    before: Annotated[Path, typer.Argument(help="Weights before: an export, a run, a checkpoint or a file.")],
    after: Annotated[Path, typer.Argument(help="Weights after.")],
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("spectrum.png"),
) -> None:
    """Show the singular values of a weight change, by kind of layer.

    Means over the layers of a kind: how many are above 0.1; the effective rank, exp of the entropy of their shares of
    the sum; the stable rank, the sum of their squares by the largest square.
    """
    from .checkpoint import weights_of
    from .spectrum import left_out, plot_spectrum, print_spectrum
    from .spectrum import spectrum as spectra

    work_begins()
    before, after = weights_of(before), weights_of(after)
    rows, left = spectra(before, after), left_out(before, after)
    print_spectrum(rows, console=Console())
    if left:
        typer.echo(left)
    typer.echo(f"drawn: {plot_spectrum(rows, out)}")
