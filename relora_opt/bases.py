"""Base optimizers made of others: Muon for matrices beside AdamW for the rest.

    ReLoRAOptimizer(model, muon_beside_adamw(), rank=128, lr=1e-3)

A factory groups -> Optimizer may return any optimizer over the groups it is given. This one is an example of it: the
low-rank groups, whose factors are matrices, go to Muon, and every other group to AdamW, unless a group says itself what
it is (`is_matrices`: weights too small for the rank, say).

Sources: Muon, Keller Jordan et al. 2024; updates of AdamW's size for it, Liu et al. 2025, arXiv 2502.16982.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

from . import inner

Group = dict[str, Any]
Part = Callable[[list[Group]], Optimizer]


def muon_beside_adamw(
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    momentum: float = 0.95,
    fused: bool | None = None,
) -> Callable[..., Optimizer]:
    """Return the factory of Muon for matrices, with updates of AdamW's size, beside AdamW for everything else.

    One learning rate suits both. A group is Muon's where it says `is_matrices`, and else where its rank is above 0.

    Args:
        betas, fused: AdamW's. momentum: Muon's. weight_decay: of both.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    >>> groups = [{"params": [model[0].weight], "is_matrices": True}, {"params": [model[0].bias]}]
    >>> optimizer = muon_beside_adamw()(groups, lr=1e-3)
    """
    muon = partial(Muon, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return partial(
        MuonBesideAdamW, muon=muon, adamw=partial(AdamW, betas=betas, weight_decay=weight_decay, fused=fused)
    )


class MuonBesideAdamW(Optimizer):
    """Muon for the groups of matrices and AdamW for the others, as one optimizer over the groups it is given.

    Args:
        params: groups, or what else torch.optim takes.
        muon, adamw: factories of the two.
        options: defaults of the groups, `lr` say.

    Raises:
        ValueError: where a parameter of Muon's is not a matrix, in Muon's words.
        TypeError: for an option that neither of the two takes.
    """

    def __init__(self, params: Any, *, muon: Part, adamw: Part, **options: Any) -> None:
        _check_options(options, (muon, adamw))
        self._makers = (muon, adamw)
        super().__init__(params, options)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, with the options of the one that will train it."""
        super().add_param_group(param_group)
        self._maker(self.param_groups[-1])(self.param_groups[-1:])  # fills its options into the very group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update with each; the step hooks fire once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts():
            inner.step(part)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_makers": self._makers}

    def _maker(self, group: Group) -> Part:
        return self._makers[0 if group.get("is_matrices", group.get("rank", 0) > 0) else 1]

    def _parts(self) -> Iterator[Optimizer]:
        """Yield both over their groups and the state as these are now: loading, say, has replaced them."""
        for maker in self._makers:
            groups = [group for group in self.param_groups if self._maker(group) is maker]
            if groups:
                part = maker(groups)
                part.state = self.state
                yield part


def _check_options(options: Group, makers: Iterable[Part]) -> None:
    """Refuse options that no part takes: as defaults of the groups they would be kept, and nobody would read them."""
    takes = [parameter for maker in makers for parameter in inspect.signature(maker).parameters.values()]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes):
        return
    known = {parameter.name for parameter in takes} - {"params"} | {"lr", "is_matrices"}
    for name, value in options.items():
        if name not in known:
            raise TypeError(
                f"{name}={value!r} is an option neither of Muon nor of AdamW: there are {', '.join(sorted(known))}"
            )
