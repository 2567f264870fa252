"""The flags of `pretrain`: one for every option of `Config`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_type_hints

import typer

from .config import FIELDS, Config


def declare_options(command: Callable[..., None]) -> None:
    """Give a function of keyword options a flag for every option of `Config`, and two of its own."""
    kinds = get_type_hints(Config)
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(name, kinds[name]))
        for name in FIELDS
    ]
    own = {
        "config": "A TOML file with these names as keys; flags win.",
        "resume": "Folder of a run to go on with; settings come from it, and flags change what may change.",
    }
    for name, text in own.items():
        annotation = Annotated[str | None, typer.Option(help=text, rich_help_panel="Run", show_default=False)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _flag(name: str, kind: Any) -> Any:
    """Return what typer needs to make an option of a field: not given means None."""
    metadata = FIELDS[name].metadata
    metavar = "<float> <float>" if kind == tuple[float, float] else None
    option = typer.Option(help=metadata["help"], rich_help_panel=metadata["panel"], show_default=False, metavar=metavar)
    parts = [part for part in get_args(kind) if part is not type(None)] if _is_optional(kind) else [kind]
    kind = str if str in parts else parts[0]  # a number or a word comes as text
    if kind == tuple[str, ...]:
        return Annotated[list[str] | None, option]
    return Annotated[kind | None, option]


def _is_optional(kind: Any) -> bool:
    return type(None) in get_args(kind)


def spread_data(arguments: list[str]) -> list[str]:
    """Let `--data A B C` mean `--data A --data B --data C`; `eval` has its MODEL before."""
    if arguments[:1] not in (["pretrain"], ["eval"]):
        return arguments
    spread: list[str] = []
    is_data = False
    for argument in arguments:
        if argument.startswith("-"):
            is_data = argument == "--data"
        elif is_data and spread[-1] != "--data":
            spread.append("--data")
        spread.append(argument)
    return spread
