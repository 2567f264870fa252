"""The functional path: the model called with low-rank weights in place of its own, and the compiled training step.

    f = optimizer.functional(model)          loss_fn(f(x)).backward(); optimizer.step()
    step = optimizer.make_step(model, ...)   loss = step(batch)

`torch.func.functional_call` swaps every selected weight W for a `LowRankWeight`, so that the backward pass delivers
dA and dB and never forms dL/dW. The swap must last until the backward pass is over, because activation checkpointing
runs the forward again inside it: `Step` calls backward within the functional call, and `FunctionalModel` swaps in
again when the first output gradient arrives.

`Step` compiles the forward and lets AOTAutograd derive the backward. `torch.func.grad_and_value` inside a compiled
function drops custom backwards in silence (pytorch#193279).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import stateless
from torch.utils import _pytree as pytree

from .weight import LowRankWeight

if TYPE_CHECKING:
    from .optimizer import ReLoRAOptimizer


class FunctionalModel(nn.Module):
    """A model seen through its factors: call it like the model, inside training loops.

    Its `parameters()` are exactly what is trained: the factors, or during the warm start the selected weights
    themselves, and the unselected parameters. That is what to clip and what DistributedDataParallel communicates. The
    model is not registered in it. Evaluate and generate with the model itself.

    Raises:
        ValueError: where the model holds no parameter of the optimizer, or DTensor weights.
    """

    def __init__(self, model: nn.Module, optimizer: ReLoRAOptimizer) -> None:
        super().__init__()
        self._models = (model,)  # in a tuple, so not a submodule: its parameters are not all trained
        self._selected: dict[str, tuple[Tensor, float]] = {}
        self._reentry = _Reentry(model)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = dict(model.named_parameters())
        if not known & {id(p) for p in parameters.values()}:
            raise ValueError(
                f"{type(model).__name__} holds none of this optimizer's parameters: pass the model it trains"
            )
        distributed = [name for name, p in parameters.items() if type(p.data).__name__ == "DTensor"]
        if distributed:
            raise ValueError(
                f"{distributed[0]} is a DTensor: the functional path does not shard; use the dense path "
                "(loss.backward() through the model, then optimizer.step())"
            )
        self.training = model.training
        self.register_phase(optimizer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns, bitwise."""
        model, weights = self._models[0], self._weights()
        if torch.compiler.is_compiling():
            return functional_call(model, weights, args, kwargs)
        _refuse_stale_ddp(self)
        self._reentry.leave()
        output = functional_call(model, weights, args, kwargs)
        if torch.is_grad_enabled():
            self._reentry.watch(output, weights)
        return output

    def train(self, mode: bool = True) -> FunctionalModel:
        """Set the mode of the model."""
        self._models[0].train(mode)
        return super().train(mode)

    def register_phase(self, optimizer: ReLoRAOptimizer) -> None:
        """Register what the optimizer trains now; it calls this itself when that changes, at the switch say."""
        model = self._models[0]
        scales = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"] if group["rank"]}
        self._selected = {}
        self.A, self.B, self.rest = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, parameter in model.named_parameters():
            key = name.replace(".", "/")
            if optimizer.is_low_rank and id(parameter) in scales:
                self.A[key], self.B[key] = optimizer.factors(parameter)
                self._selected[name] = (parameter, scales[id(parameter)])
            else:
                self.rest[key] = parameter
        for name, buffer in model.named_buffers():
            self.register_buffer(name.replace(".", "/"), buffer)

    def _weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for name, (W, scale) in self._selected.items():
            key = name.replace(".", "/")
            weights[name] = LowRankWeight.wrap(W, self.A[key], self.B[key], scale)
        return weights


class Step:
    """One call, one micro-batch: forward and backward, and every `accumulate`-th time the update.

    Args:
        optimizer, model: as in `optimizer.make_step(model, ...)`.
        loss_fn: `loss_fn(model, *batch, **kwargs)` -> scalar loss, or `(loss, aux)` with `has_aux`.
        compile: whether `torch.compile` compiles the forward (and with it the backward): once for the warm start and
        once
            for the low-rank phase; restarts and rates do not recompile.
        accumulate: micro-batches an update. The loss of each counts 1 / accumulate, so they should be of equal size.
        skip_nonfinite: skip an update, uncounted, whose loss or gradient norm is not finite. It synchronises with the
            device once an update.
        has_aux: whether `loss_fn` returns something beside the loss.
    """

    def __init__(
        self,
        optimizer: ReLoRAOptimizer,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        *,
        compile: bool = True,
        accumulate: int = 1,
        skip_nonfinite: bool = False,
        has_aux: bool = False,
    ) -> None:
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate={accumulate!r} must be a whole number of micro-batches, 1 or more")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn={loss_fn!r} must be callable: loss_fn(model, *batch) -> scalar loss")
        self.optimizer, self.accumulate, self.skip_nonfinite, self.has_aux = (
            optimizer,
            accumulate,
            skip_nonfinite,
            has_aux,
        )
        self.num_micro_batches = 0
        loss = _Loss(model, loss_fn, has_aux=has_aux)
        self._is_compiled = compile
        functional = optimizer.functional(loss if compile else _WithBackward(loss, accumulate))
        self._forward: Callable[..., Any] = torch.compile(functional, fullgraph=True) if compile else functional
        self._losses_are_finite = True

    def __call__(self, *batch: Any, **kwargs: Any) -> Any:
        """Train on one micro-batch. Returns the detached loss, or (loss, aux)."""
        with torch.enable_grad():
            loss, aux = self._forward(*batch, **kwargs)
            if self._is_compiled:
                (loss / self.accumulate).backward()
        loss = loss.detach()
        if self.skip_nonfinite:
            self._losses_are_finite &= bool(loss.isfinite())
        self.num_micro_batches += 1
        if self.num_micro_batches % self.accumulate == 0:
            self._update()
        return (loss, aux) if self.has_aux else loss

    def _update(self) -> None:
        if not self.skip_nonfinite or (self._losses_are_finite and self.optimizer.has_finite_gradients()):
            self.optimizer.step()
        self._losses_are_finite = True
        self.optimizer.zero_grad()


class _Loss(nn.Module):
    """The loss function as a module, so that one functional call spans model and loss."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any], *, has_aux: bool) -> None:
        super().__init__()
        self.model, self.loss_fn, self.has_aux = model, loss_fn, has_aux
        self.training = model.training

    def forward(self, *batch: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        result = self.loss_fn(self.model, *batch, **kwargs)
        loss, aux = result if self.has_aux else (result, None)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                f"loss_fn gave {shape} and not a scalar tensor: reduce it, or say has_aux=True for (loss, aux)"
            )
        return loss, aux


class _WithBackward(nn.Module):
    """A loss whose backward runs inside the functional call, while the weights are swapped."""

    def __init__(self, loss: _Loss, accumulate: int) -> None:
        super().__init__()
        self.loss, self.accumulate = loss, accumulate
        self.training = loss.training

    def forward(self, *batch: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        loss, aux = self.loss(*batch, **kwargs)
        (loss / self.accumulate).backward()
        return loss.detach(), aux


class _Reentry:
    """Swaps the low-rank weights in again while a backward pass runs, once for all forwards that it goes through."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights: dict[str, Tensor] = {}
        self._swap: AbstractContextManager[None] | None = None

    def watch(self, output: Any, weights: dict[str, Tensor]) -> None:
        """Enter with these weights when the first gradient reaches a tensor of `output`."""
        self._weights = weights
        for tensor in _tensors(output, set()):
            if tensor.requires_grad:
                tensor.register_hook(self._enter)  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """Swap the model's own weights back, if they are out."""
        swap, self._swap = self._swap, None
        if swap is not None:
            swap.__exit__(None, None, None)

    def _enter(self, gradient: Tensor) -> None:
        if self._swap is None:
            # functional_call's own context manager; torch has no public one.
            self._swap = stateless._reparametrize_module(self._model, dict(self._weights), tie_weights=True)
            self._swap.__enter__()
            torch.autograd.Variable._execution_engine.queue_callback(self.leave)


def _tensors(output: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors of an output: of containers that torch knows, and of the attributes of any other object."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield from _tensors(list(vars(leaf).values()), seen)


def _refuse_stale_ddp(module: FunctionalModel) -> None:
    """Refuse a DistributedDataParallel that was built around other parameters: its ranks would diverge in silence."""
    active = DistributedDataParallel._active_ddp_module
    if active is None or active.module is not module:
        return
    if {id(p) for p in active._module_parameters} != {id(p) for p in module.parameters()}:
        raise RuntimeError(
            "this DistributedDataParallel was built before the switch to low rank and communicates the wrong "
            "gradients: wrap optimizer.functional(model) again after the switch"
        )
