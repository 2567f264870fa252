"""The functional path: the model called with low-rank weights in place of its own.

    f = optimizer.functional(model)          loss_fn(f(x)).backward(); optimizer.step()

`torch.func.functional_call` swaps every selected weight W for a `LowRankWeight`, so that the backward pass delivers
dA and dB and keeps no dL/dW. The swap must last until the backward pass is over, because activation checkpointing runs
the forward again inside it: `FunctionalModel` swaps in again when the first output gradient arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from .places import (
    Held,
    Place,
    check_factors,
    check_held,
    check_hooks,
    check_module,
    key_of,
    structure,
    traced_paths,
    unwrapped,
)
from .release import has_foreign_hook
from .select import PARALLEL
from .sharding import is_sharded
from .weight import LowRankWeight, project

if TYPE_CHECKING:
    from .optimizer import ReLoRAOptimizer


class FunctionalModel(nn.Module):
    """A model seen through its factors: call it like the model, inside training loops.

    Its `parameters()` are exactly what is trained: the factors, or of weights in their warm start these themselves, and
    the unselected parameters. That is what to clip and what DistributedDataParallel communicates. The
    model is not registered in it. Evaluate, generate, copy, move and save the model itself.

    Raises:
        ValueError: where the model holds no parameter of the optimizer, DTensor weights, or a parallel wrapper.
    """

    def __init__(self, model: nn.Module, optimizer: ReLoRAOptimizer) -> None:
        super().__init__()
        self._models = (model,)  # in a tuple, so not a submodule: its parameters are not all trained
        self._places: list[Place] = []
        self._held: list[Held] = []
        self._factors: list[tuple[Tensor, Tensor, Tensor]] = []  # (W, A, B) of the places
        self._casts: dict[str, Tensor] = {}  # of the W's by key, while they last
        self._cast_of: dict[str, tuple[int, int]] = {}  # which of their values these are
        self._structure: list[Any] = []
        self._is_swapped = False
        self._synchronised: ReferenceType[DistributedDataParallel] | None = None
        self._optimizer = optimizer
        _check_model(model, optimizer)
        self.training = model.training
        self.register_phase(optimizer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns, bitwise."""
        model = self._models[0]
        if torch.compiler.is_compiling():
            return functional_call(model, self._weights(), args, kwargs, tie_weights=False)
        self.restore()
        self.follow()
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is not None and any(module is self for module in ddp.module.modules()):
            _refuse_stale(ddp, self)
            self._synchronise(ddp)
        output = functional_call(model, self._weights(), args, kwargs, tie_weights=False)
        if torch.is_grad_enabled():
            for tensor in _tensors(output, set()):
                # A parameter would keep its hook for ever, and has nothing behind it; a low-rank weight neither.
                if tensor.grad_fn is not None and not isinstance(tensor, LowRankWeight):
                    tensor.register_hook(self._swap_in)
        return output

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients of what is trained, and those that have reached the low-rank weights themselves."""
        super().zero_grad(set_to_none)
        for place in self._places:
            place.W.grad = None

    @torch.no_grad()
    def project_dense(self) -> None:
        """Give the gradients that have reached the low-rank weights themselves to their factors."""
        for place in self._places:
            if place.W.grad is not None:
                factors = self.A[place.key], self.B[place.key]
                for factor, gradient in zip(factors, project(place.W.grad, *factors, place.scale), strict=True):
                    if factor.requires_grad:
                        factor.grad = gradient if factor.grad is None else factor.grad + gradient
                place.W.grad = None

    def train(self, mode: bool = True) -> FunctionalModel:
        """Set the mode of the model."""
        self._models[0].train(mode)
        return super().train(mode)

    def register_phase(self, optimizer: ReLoRAOptimizer) -> None:
        """Register what the optimizer trains now; it calls this itself when that changes, at the switch say."""
        self.restore()
        self.drop_casts()
        model, keys = self._models[0], dict[int, str]()
        groups = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._places, self._held, self._factors, self._structure = [], [], [], structure(model)
        self.A, self.B, self.rest = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        traced = traced_paths(model)
        for module_path, module in model.named_modules():
            for name, W in module._parameters.items():
                number = None if W is None else groups.get(id(W))
                if W is None or number is None:
                    continue
                path = f"{module_path}.{name}" if module_path else name
                key = keys.setdefault(id(W), key_of(path))  # by its first name, where it has several
                self._held.append(Held(module, name, W, W.requires_grad))
                if not (optimizer._has_factors(number) and W.requires_grad):
                    self.rest[key] = W
                    continue
                self.A[key], self.B[key] = A, B = optimizer.factors(W)
                self._factors.append((W, A, B))
                traced_path = f"{traced[module_path]}.{name}".lstrip(".")
                self._places.append(Place(module, name, path, W, key, repr(optimizer.scale(W)), traced_path))
        self._buffers.clear()
        for name, buffer in model.named_buffers():
            self.register_buffer(key_of(name), buffer)

    def follow(self) -> None:
        """Register anew where something has changed: layers were moved, weights frozen or unfrozen, or factors drawn.

        Raises:
            RuntimeError: where a parameter was replaced, factors alone were frozen, or a low-rank weight has a hook.
            ValueError: where a schedule was put in the place of another that has other weights at full rank now.
        """
        self._optimizer._follow_schedule()
        check_held(self._held, self._models[0])
        is_same = all(held.W.requires_grad == held.was_trained for held in self._held)
        is_same &= all(self._optimizer._holds(*factors) for factors in self._factors)
        if not is_same or structure(self._models[0]) != self._structure:
            _check_model(self._models[0], self._optimizer)
            self.register_phase(self._optimizer)
        check_hooks(self._places, self._models[0], has_foreign_hook)
        if any(p.requires_grad for p in self.parameters()):  # or all is frozen, as by self.requires_grad_(False)
            check_factors(self._places, self._factors, self._models[0])

    def factors(self) -> Iterator[Tensor]:
        """Yield the factors of all weights that have some now: of none during a warm start of all."""
        return chain(self.A.values(), self.B.values())

    @torch.no_grad()
    def keep_casts(self, dtype: torch.dtype) -> None:
        """Hold the float32 low-rank weights in the dtype of an autocast, until `drop_casts`; those it has stay.

        What is written into a weight meanwhile is seen, but not what goes by way of its `.data`.
        """
        for place in self._places:
            W, key = place.W, place.key
            value = W._version, W.data_ptr()
            if W.dtype == torch.float32 and self._cast_of.get(key) != value:
                self._casts[key], self._cast_of[key] = W.detach().to(dtype), value

    def drop_casts(self) -> None:
        """Forget the weights in another dtype."""
        self._casts.clear()
        self._cast_of.clear()

    def restore(self) -> None:
        """Give the model its own weights back, if a backward pass has left them swapped."""
        if self._is_swapped:
            self._is_swapped = False
            for place in self._places:
                place.module._parameters[place.name] = place.W  # type: ignore[assignment]

    def _synchronise(self, ddp: DistributedDataParallel) -> None:
        """Give every rank the first one's low-rank weights, once, as DDP does with the parameters that it sees."""
        if self._synchronised is None or self._synchronised() is not ddp:
            self._synchronised = ref(ddp)
            for W in {id(place.W): place.W for place in self._places}.values():
                broadcast_(W, ddp.process_group)

    def _swap_in(self, gradient: Tensor) -> None:
        """Put the low-rank weights into the model until the backward pass that has just reached it is over."""
        if not self._is_swapped:
            self._is_swapped = True
            with torch.enable_grad():  # which a backward pass is without
                weights = self._weights()
            for place in self._places:
                place.module._parameters[place.name] = weights.get(place.path, place.W)  # type: ignore[assignment]
            torch.autograd.Variable._execution_engine.queue_callback(_Restoring(self))

    def _weights(self) -> dict[str, Tensor]:
        is_traced = torch.compiler.is_compiling()
        return {
            place.traced_path if is_traced else place.path: LowRankWeight.wrap(
                place.W, self.A[place.key], self.B[place.key], place.scale, self._casts.get(place.key)
            )
            for place in self._places
            if place.W.requires_grad  # asked here too, for torch.compile, which skips `follow`
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FunctionalModel:
        raise TypeError(
            "a functional model cannot be moved or cast: move the model itself, before its optimizer is made"
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: factors without their weights mean nothing."""
        raise TypeError("a functional model has no state of its own: save the model itself, and optimizer.state_dict()")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: factors without their weights mean nothing."""
        raise TypeError(
            "a functional model loads no state: load the model's and the optimizer's own state dictionaries"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a functional model cannot be copied or pickled: copy model and optimizer together, then call "
            "functional() on the copies"
        )


class _Restoring:
    """Gives the model its own weights back when a backward pass is over, or drops this because it has failed."""

    def __init__(self, functional: FunctionalModel) -> None:
        self._functional = functional

    def __call__(self) -> None:
        self._functional.restore()

    __del__ = __call__


@torch.no_grad()
def broadcast_(tensor: Tensor, group: Any) -> None:
    """Overwrite a tensor with the first process's; as bytes, for not every backend knows every dtype."""
    if tensor.numel() == 0:
        return
    carried = tensor.detach().contiguous()
    dist.broadcast(carried.reshape(-1).view(torch.uint8), group=group, group_src=0)
    if carried.data_ptr() != tensor.data_ptr():
        tensor.copy_(carried)


def _check_model(model: nn.Module, optimizer: ReLoRAOptimizer) -> None:
    check_module(model)
    if any(isinstance(module, FunctionalModel) for module in model.modules()):
        raise TypeError("this is a functional model already: pass the model itself, which it was made of")
    parameters = dict(model.named_parameters())
    if not {id(p) for p in optimizer.parameters()} & {id(p) for p in parameters.values()}:
        model = unwrapped(model)
        raise ValueError(f"{type(model).__name__} holds none of this optimizer's parameters: pass the model it trains")
    sharded = [name for name, p in parameters.items() if is_sharded(p)]
    if sharded:
        raise ValueError(
            f"{sharded[0]} is a DTensor: the functional path does not shard; use the dense path (loss.backward() "
            "through the model, then optimizer.step())"
        )
    parallel = [type(module).__name__ for module in model.modules() if isinstance(module, PARALLEL)]
    if parallel:
        raise ValueError(
            f"the model is wrapped in {parallel[0]}, which would not reduce the factors' gradients: wrap "
            "optimizer.functional(model) in it instead"
        )


def _tensors(output: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors of an output: of containers that torch knows, and of the attributes of any other object."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield from _tensors(list(vars(leaf).values()), seen)


def _refuse_stale(ddp: DistributedDataParallel, module: FunctionalModel) -> None:
    """Refuse a DistributedDataParallel that was built around other parameters: its ranks would diverge in silence."""
    if not {id(p) for p in module.parameters() if p.requires_grad} <= {id(p) for p in ddp._module_parameters}:
        raise RuntimeError(
            "this DistributedDataParallel was built before the last switch between full and low rank, or while weights "
            "were frozen, and communicates the wrong gradients: wrap optimizer.functional(model) again after the "
            "switch, or now"
        )
