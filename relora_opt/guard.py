"""The guard of an optimizer: an update that would do harm is skipped, uncounted; the run goes on with the next batch.

    loss or gradient not finite                                 skipped
    loss > mean + max(max_jump * deviation, min_jump)           skipped; of the last NUM_LOSSES that were stepped on

The loss alone is judged, not the gradient's norm: a restart and the switch leave the loss as it was, and change whose
gradient it is. Losses that are skipped are not remembered, so that one explosion does not excuse the next. Until
there are enough losses nothing jumps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .optimizer import ReLoRAOptimizer

NUM_LOSSES = 50


class Guard:
    """Makes updates, or says why not: `make_step(guard=...)`, or in a loop of your own `guard.step(optimizer, loss)`.

    What it knows is `losses`, plain numbers: kept beside a checkpoint and given back, they make it go on exactly.

    Args:
        max_jump: standard deviations of the last losses by which a loss may exceed their mean; inf for any.
        min_jump: what it may exceed it by in any case, in the loss's unit: 1 nat is far for a language model.
        losses: of the last updates, oldest first.

    Raises:
        ValueError, TypeError: for a number out of range, or none.
    """

    def __init__(self, max_jump: float = 10.0, *, min_jump: float = 1.0, losses: Iterable[float] = ()) -> None:
        for name, value in {"max_jump": max_jump, "min_jump": min_jump}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}={value!r} must be a number")
            if not value > 0:
                raise ValueError(f"{name}={value!r} must be a positive number; inf lets every loss jump")
        self.max_jump, self.min_jump = max_jump, min_jump
        self.losses = deque(losses, maxlen=NUM_LOSSES)
        if not all(map(math.isfinite, self.losses)):
            raise ValueError(f"losses={[*self.losses]} are not all finite: give those of a guard")
        self.reason: str | None = None  # why the last update was skipped; None where it was made

    @property
    def limit(self) -> float:
        """The largest loss that is no jump."""
        if len(self.losses) < NUM_LOSSES or math.isinf(self.max_jump):
            return math.inf
        mean = self._mean()
        deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in self.losses) / NUM_LOSSES)
        return mean + max(self.max_jump * deviation, self.min_jump)

    def step(self, optimizer: ReLoRAOptimizer, loss: float | Tensor) -> str | None:
        """Make the update, or return why it is skipped. Of several processes all must call, with the same loss."""
        loss = float(loss.detach() if isinstance(loss, Tensor) else loss)
        self.reason = self._reason(optimizer, loss)
        if self.reason is None:
            optimizer.step()
            self.losses.append(loss)
        return self.reason

    def _reason(self, optimizer: ReLoRAOptimizer, loss: float) -> str | None:
        if not math.isfinite(loss):
            return f"loss {loss} is not finite"
        if loss > self.limit:
            mean = self._mean()
            return f"loss {loss:.5g} is above {self.limit:.5g}, and the last {NUM_LOSSES} had a mean of {mean:.5g}"
        return None if optimizer.has_finite_gradients() else f"the gradient of loss {loss:.5g} is not finite"

    def _mean(self) -> float:
        return math.fsum(self.losses) / len(self.losses)
