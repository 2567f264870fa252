"""The door of transformers' Trainer, which builds its optimizer when it has placed the model.

    Trainer(model, arguments, train_dataset=data,
            optimizer_cls_and_kwargs=(trainer_factory, {"lr": arguments.learning_rate, "rank": 128}))

A class there is called with groups of nameless parameters, embeddings among the matrices; anything else is called as
`factory()(model, **kwargs)`, from which the low-rank weights can be told. This file does not know transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .optimizer import ReLoRAOptimizer


def trainer_factory() -> Callable[..., ReLoRAOptimizer]:
    """Return `build(model, **options)`, as `optimizer_cls_and_kwargs=(trainer_factory, options)` wants it.

    The options are those of ReLoRAOptimizer. `lr` must be among them: the Trainer keeps its `learning_rate`,
    `weight_decay` and Adam's settings to itself. Its scheduler drives the groups' rates, and the schedule given here
    multiplies them; its `max_grad_norm` clips dense gradients, so set that to 0 and ours where factors are to be
    clipped.
    """
    return _build


def _build(model: nn.Module | None = None, **options: Any) -> ReLoRAOptimizer:
    if not isinstance(model, nn.Module):  # the Trainer calls what it is given, and then calls that with the model
        raise TypeError(
            f"trainer_factory() was called with model={model!r}: say "
            "optimizer_cls_and_kwargs=(trainer_factory, {...}), without the brackets after trainer_factory"
        )
    if "lr" not in options:
        raise TypeError(
            "optimizer_cls_and_kwargs without lr: transformers' Trainer does not hand its learning_rate over; say "
            '(trainer_factory, {"lr": arguments.learning_rate, ...})'
        )
    return ReLoRAOptimizer(model, **options)
