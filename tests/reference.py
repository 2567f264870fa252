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


def events(last: int, *, q: int, warm_start: int = 0, at: int = 0) -> set[int]:
    """The updates up to `last` that a switch or a restart follows; 0 where neither comes first."""
    switch = at + warm_start
    before = {*range(0, at, q or last + 1), at}
    after = set(range(switch, last + 1, q)) if q else {switch}
    return {u for u in (before | after if at else after) if u <= last}


def jagged(u: int, *, q: int, ramp: int = 0, warm_start: int = 0, at: int = 0, outer: Outer = lambda u: 1.0) -> float:
    """The multiplier of update u: `outer`, with a ramp of `ramp` updates cut out after every switch and restart."""
    R = max((event for event in events(u, q=q, warm_start=warm_start, at=at) if event < u), default=0)
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
    the new A of that layer. Where low rank comes first (`warm_start=0`, or `at`) call `switch(draw)` first.
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
        outer: Outer = lambda u: 1.0,
        factor_lr: float = 1.0,
        max_grad_norm: float | None = None,
        lr: float,
        **hyperparameters: object,
    ) -> None:
        self.model, self.selected, self.scale = model, selected, scale
        self.q, self.warm_start, self.at, self.lr = q, warm_start, at, lr
        self.factor_lr, self.max_grad_norm = factor_lr, max_grad_norm
        self.multiplier = lambda u: jagged(u, q=q, ramp=ramp, warm_start=warm_start, at=at, outer=outer)
        self.make_base = lambda groups: base(groups, lr=lr, **hyperparameters)
        self.optimizer = self.make_base([{"params": list(model.parameters())}])
        self.u = 0

    def layer(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def effective_weight(self, name: str) -> Tensor:
        layer = self.layer(name)
        return (layer.effective_weight() if isinstance(layer, ReferenceLinear) else layer.weight).detach()

    def switch(self, draw: Draw) -> None:
        """Replace the selected layers; their dense state is dropped, everything else keeps its own."""
        old_state = self.optimizer.state
        for name in self.selected:
            parent = self.model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], ReferenceLinear(self.layer(name), draw(name), scale=self.scale))
        factors = [factor for name in self.selected for factor in (self.layer(name).A, self.layer(name).B)]
        others = [p for p in self.model.parameters() if all(p is not factor for factor in factors)]
        self.optimizer = self.make_base([{"params": factors, "is_factor": True}, {"params": others}])
        for p in others:
            if p in old_state:
                self.optimizer.state[p] = old_state[p]

    def widen(self) -> None:
        """Merge, and train the selected layers' weights themselves; everything else keeps its own state."""
        old_state = self.optimizer.state
        for name in self.selected:
            layer, parent = self.layer(name), self.model.get_submodule(name.rpartition(".")[0])
            W = layer.effective_weight().detach()
            linear = nn.Linear(W.shape[1], W.shape[0], bias=layer.bias is not None, dtype=W.dtype)
            linear.weight, linear.bias = nn.Parameter(W), layer.bias
            setattr(parent, name.rpartition(".")[2], linear)
        self.optimizer = self.make_base([{"params": list(self.model.parameters())}])
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
        if self.u == self.at > 0:
            self.widen()
            return True
        if self.u == self.at + self.warm_start:
            self.switch(draw)
            return True
        if self.u not in events(self.u, q=self.q, warm_start=self.warm_start, at=self.at):
            return False
        for name in self.selected:
            layer = self.layer(name)
            layer.merge_and_restart(draw(name))
            for factor in (layer.A, layer.B):
                self.optimizer.state.pop(factor, None)
        return True
