"""ReLoRA written from the paper (Lialin et al. 2023, arXiv 2307.05695, Algorithm 1), as plainly as it can be.

The oracle of the test suite: it imports torch alone, shares no code with relora_opt, and holds the weight the other way
round, as a frozen part and two factors that are merged into it at every restart:

    y = x (W_frozen + s B A)^T + bias;   every q updates: W_frozen <- W_frozen + s B A, new A, B <- 0, reset A's and
    B's state.

New factors A are given by the caller, so that the oracle and the code under test can use the same draws.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Draw = Callable[[str], Tensor]
Outer = Callable[[int], float]


def cosine(u: int, *, N: int, warmup: int = 0, minimum: float = 0.0) -> float:
    """The outer schedule: linear warm-up, half a cosine down to `minimum` at N, flat after it."""
    if u <= warmup:
        return u / warmup
    if u >= N:
        return minimum
    return minimum + (1 - minimum) * (1 + math.cos(math.pi * (u - warmup) / (N - warmup))) / 2


def turn(u: int, *, warm_start: int, at: int, turns: int) -> int:
    """Which part of the layers is at full rank in update u; -1 where none is."""
    for number in range(turns):
        if at + number * warm_start < u <= at + (number + 1) * warm_start:
            return number
    return -1


def events(last: int, *, q: int, warm_start: int = 0, at: int = 0, turns: int = 1) -> set[int]:
    """The updates up to `last` that a switch or a restart follows; 0 where neither comes first."""
    switch = at + turns * warm_start
    before = {*range(0, at, q or last + 1), at}
    between = {at + number * warm_start for number in range(1, turns)}
    after = set(range(switch, last + 1, q)) if q else {switch}
    return {u for u in (before | after if at else after) | between if u <= last}


def jagged(
    u: int,
    *,
    q: int,
    ramp: int = 0,
    warm_start: int = 0,
    at: int = 0,
    turns: int = 1,
    outer: Outer = lambda u: 1.0,
) -> float:
    """The multiplier of update u: `outer`, with a ramp of `ramp` updates cut out after every switch and restart."""
    R = max((event for event in events(u, q=q, warm_start=warm_start, at=at, turns=turns) if event < u), default=0)
    k = u - R
    if R > 0 and k < ramp:
        return k / ramp * outer(R + ramp)
    return outer(u)


class ReferenceLinear(nn.Module):
    """A linear layer whose weight is W_frozen + s B A; only A, B and the bias are trained."""

    def __init__(self, linear: nn.Linear, A: Tensor, *, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.bias = linear.bias
        self.register_buffer("W_frozen", linear.weight.detach().clone())
        self.A = nn.Parameter(A.detach().clone())
        self.B = nn.Parameter(torch.zeros(linear.out_features, len(A), dtype=A.dtype))

    def effective_weight(self) -> Tensor:
        return self.W_frozen + self.scale * (self.B @ self.A)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.effective_weight().T
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def merge_and_restart(self, A: Tensor) -> None:
        self.W_frozen.copy_(self.effective_weight())
        self.A.copy_(A)
        self.B.zero_()


class ReferenceReLoRA:
    """Trains a model in place by Algorithm 1; `selected` names its low-rank linear layers.

    Each update is `loss = trainer.update(closure)`, then `trainer.restart_if_due(draw)`, where `draw(layer name)` is
    the new A of that layer. Call `begin(draw)` first. In `turns` of a warm start, as many parts of `selected` are at
    full rank one after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        selected: list[str],
        base: type[torch.optim.Optimizer],
        *,
        scale: float,
        q: int,
        ramp: int = 0,
        warm_start: int = 0,
        at: int = 0,
        turns: int = 1,
        outer: Outer = lambda u: 1.0,
        factor_lr: float = 1.0,
        max_grad_norm: float | None = None,
        lr: float,
        **hyperparameters: object,
    ) -> None:
        self.model, self.selected, self.scale = model, selected, scale
        self.q, self.lr, self.place = q, lr, {"warm_start": warm_start, "at": at, "turns": turns}
        self.factor_lr, self.max_grad_norm = factor_lr, max_grad_norm
        self.multiplier = lambda u: jagged(u, q=q, ramp=ramp, outer=outer, **self.place)
        self.make_base = lambda groups: base(groups, lr=lr, **hyperparameters)
        self.optimizer = self.make_base([{"params": list(model.parameters())}])
        self.u = 0

    def layer(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def effective_weight(self, name: str) -> Tensor:
        layer = self.layer(name)
        return (layer.effective_weight() if isinstance(layer, ReferenceLinear) else layer.weight).detach()

    def part(self, number: int) -> list[str]:
        """The layers whose turn this is."""
        turns, count = self.place["turns"], len(self.selected)
        return [name for place, name in enumerate(self.selected) if place * turns // count == number]

    def begin(self, draw: Draw) -> None:
        """Replace the selected layers that are not at full rank in the first update."""
        first = self.part(turn(1, **self.place))
        self.switch(draw, [name for name in self.selected if name not in first])

    def switch(self, draw: Draw, names: list[str] | None = None) -> None:
        """Replace layers, all that are selected or these: their dense state goes, everything else keeps its own."""
        for name in self.selected if names is None else names:
            parent = self.model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], ReferenceLinear(self.layer(name), draw(name), scale=self.scale))
        self._rebuild()

    def widen(self, names: list[str]) -> None:
        """Merge, and train these layers' weights themselves; everything else keeps its own state."""
        for name in names:
            layer, parent = self.layer(name), self.model.get_submodule(name.rpartition(".")[0])
            W = layer.effective_weight().detach()
            linear = nn.Linear(W.shape[1], W.shape[0], bias=layer.bias is not None, dtype=W.dtype)
            linear.weight, linear.bias = nn.Parameter(W), layer.bias
            setattr(parent, name.rpartition(".")[2], linear)
        self._rebuild()

    def _rebuild(self) -> None:
        """Make a new base optimizer over what is trained now, with the state of what was trained before."""
        old_state = self.optimizer.state
        layers = [layer for layer in map(self.layer, self.selected) if isinstance(layer, ReferenceLinear)]
        factors = [factor for layer in layers for factor in (layer.A, layer.B)]
        others = [p for p in self.model.parameters() if all(p is not factor for factor in factors)]
        self.optimizer = self.make_base([{"params": factors, "is_factor": True}, {"params": others}])
        for p in self.model.parameters():
            if p in old_state:
                self.optimizer.state[p] = old_state[p]

    def update(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run one update; the closure returns the loss."""
        self.u += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.multiplier(self.u) * (self.factor_lr if group.get("is_factor") else 1.0)
        self.optimizer.zero_grad()
        loss = closure()
        loss.backward()
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        return loss.detach()

    def restart_if_due(self, draw: Draw) -> bool:
        """After the update: widen or switch when the warm start begins or ends, merge and restart when a cycle ends."""
        before, after = turn(self.u, **self.place), turn(self.u + 1, **self.place)
        if before != after:
            self.widen(self.part(after))
            self.switch(draw, self.part(before))
            return True
        if self.u not in events(self.u, q=self.q, **self.place):
            return False
        for name in self.selected:
            layer = self.layer(name)
            layer.merge_and_restart(draw(name))
            for factor in (layer.A, layer.B):
                self.optimizer.state.pop(factor, None)
        return True
