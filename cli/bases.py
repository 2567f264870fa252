"""The base optimizers that `--base` names, as factories groups -> Optimizer.

adamw   torch.optim.AdamW with the betas and the weight decay
sgd     torch.optim.SGD whose momentum is the first beta
muon    torch.optim.Muon for the selected weights and their factors, which are matrices, with momentum 0.95 and updates
        of AdamW's size; AdamW for the rest
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import SGD, AdamW, Muon, Optimizer

from .config import Config

MATRICES = "is_matrices"  # the key that marks the groups of the selected weights


def base_optimizer(config: Config) -> Callable[..., Optimizer]:
    """Return the factory of the base optimizer that a configuration names."""
    if config.base == "sgd":
        return partial(SGD, momentum=config.betas[0], weight_decay=config.weight_decay)
    if config.base == "muon":
        return muon_beside_adamw(betas=config.betas, weight_decay=config.weight_decay)
    return partial(AdamW, betas=config.betas, weight_decay=config.weight_decay)


def muon_beside_adamw(*, betas: tuple[float, float], weight_decay: float) -> Callable[..., Optimizer]:
    """Return the factory of Muon for the groups marked as matrices, beside AdamW for the others."""
    muon = partial(Muon, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return partial(MuonBesideAdamW, muon=muon, adamw=partial(AdamW, betas=betas, weight_decay=weight_decay))


class MuonBesideAdamW(Optimizer):
    """Muon for the groups marked as matrices, AdamW for the others, as one optimizer over the groups it is given."""

    def __init__(
        self, params: list[dict[str, Any]], muon: Callable[..., Optimizer], adamw: Callable[..., Optimizer]
    ) -> None:
        super().__init__(params, {})
        matrices = [group for group in self.param_groups if group.get(MATRICES)]
        rest = [group for group in self.param_groups if not group.get(MATRICES)]
        # The parts fill their options into these very dictionaries, and follow what is changed there later.
        self._parts = [part(groups) for part, groups in ((muon, matrices), (adamw, rest)) if groups]
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one update with each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss
