"""The functional path: the model called with low-rank weights in place of its own.

    f = optimizer.functional(model)          loss_fn(f(x)).backward(); optimizer.step()

`torch.func.functional_call` swaps every selected weight W for a `LowRankWeight`, so that the backward pass delivers
dA and dB and keeps no dL/dW. The swap must last until the backward pass is over, because activation checkpointing runs
the forward again inside it: `FunctionalModel` swaps in again when the first output gradient arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ReferenceType, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from .select import PARALLEL
from .sharding import is_sharded
from .weight import LowRankWeight

if TYPE_CHECKING:
    from .optimizer import ReLoRAOptimizer


class _Place(NamedTuple):
    """Where a selected weight sits: `module._parameters[name]`, reached by `path`, trained through factors `key`."""

    module: nn.Module
    name: str
    path: str
    W: Tensor
    key: str
    digits: str  # of s: a number that differs from an earlier model's, torch.compile would make a variable, and fail

    @property
    def scale(self) -> float:
        return float(self.digits)


class Around(nn.Module):
    """A module of this project around the caller's model, which messages are about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training


class FunctionalModel(nn.Module):
    """A model seen through its factors: call it like the model, inside training loops.

    Its `parameters()` are exactly what is trained: the factors, or during the warm start the selected weights
    themselves, and the unselected parameters. That is what to clip and what DistributedDataParallel communicates. The
    model is not registered in it. Evaluate, generate, copy, move and save the model itself.

    Raises:
        ValueError: where the model holds no parameter of the optimizer, DTensor weights, or a parallel wrapper.
    """

    def __init__(self, model: nn.Module, optimizer: ReLoRAOptimizer) -> None:
        super().__init__()
        self._models = (model,)  # in a tuple, so not a submodule: its parameters are not all trained
        self._places: list[_Place] = []
        self._held: list[tuple[nn.Module, str, Tensor]] = []
        self._is_swapped = False
        self._synchronised: ReferenceType[DistributedDataParallel] | None = None
        known = {id(p) for p in optimizer.parameters()}
        _check_model(model, known)
        self.training = model.training
        self.register_phase(optimizer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns, bitwise."""
        model, weights = self._models[0], self._weights()
        if torch.compiler.is_compiling():
            return functional_call(model, weights, args, kwargs, tie_weights=False)
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is not None and any(module is self for module in ddp.module.modules()):
            _refuse_stale(ddp, self)
            self._synchronise(ddp)
        self.restore()
        self.check_held()
        output = functional_call(model, weights, args, kwargs, tie_weights=False)
        if torch.is_grad_enabled():
            for tensor in _tensors(output, set()):
                if tensor.requires_grad:
                    tensor.register_hook(self._swap_in)
        return output

    def train(self, mode: bool = True) -> FunctionalModel:
        """Set the mode of the model."""
        self._models[0].train(mode)
        return super().train(mode)

    def register_phase(self, optimizer: ReLoRAOptimizer) -> None:
        """Register what the optimizer trains now; it calls this itself when that changes, at the switch say."""
        model = self._models[0]
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        parts = [(module, name, p) for module in model.modules() for name, p in module._parameters.items()]
        self._held = [(module, name, p) for module, name, p in parts if p is not None and id(p) in groups]
        self._places = []
        self.A, self.B, self.rest = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, parameter in model.named_parameters():
            group = groups.get(id(parameter))
            key = _key(name)
            if group is None:
                continue
            if optimizer.is_low_rank and group["rank"] and parameter.requires_grad:
                self.A[key], self.B[key] = optimizer.factors(parameter)
                self._places += _places(model, parameter, key, optimizer.scale(parameter))
            else:
                self.rest[key] = parameter
        for name, buffer in model.named_buffers():
            self.register_buffer(_key(name), buffer)

    def check_held(self) -> None:
        """Refuse a model in which somebody has replaced a parameter: the old one would be trained, to no effect.

        Raises:
            RuntimeError: names the parameter.
        """
        for module, name, parameter in self._held:
            current = module._parameters.get(name)
            if current is not parameter and not isinstance(current, LowRankWeight):
                paths = {id(each): f"{path}.{name}" for path, each in _unwrapped(self._models[0]).named_modules()}
                raise RuntimeError(
                    f"{paths.get(id(module), name).lstrip('.')} is no longer the parameter that the optimizer trains: "
                    "let what replaces parameters (Accelerate's prepare, fully_shard, load_state_dict(assign=True)) "
                    "come first, then the optimizer, then functional() or make_step()"
                )

    def factors(self) -> Iterator[Tensor]:
        """Yield the factors of all places, none during the warm start."""
        return chain(self.A.values(), self.B.values())

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
                place.module._parameters[place.name] = weights[place.path]  # type: ignore[assignment]
            torch.autograd.Variable._execution_engine.queue_callback(self.restore)

    def _weights(self) -> dict[str, Tensor]:
        return {
            place.path: LowRankWeight.wrap(place.W, self.A[place.key], self.B[place.key], place.scale)
            for place in self._places
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


@torch.no_grad()
def broadcast_(tensor: Tensor, group: Any) -> None:
    """Overwrite a tensor with the first process's; as bytes, for not every backend knows every dtype."""
    if tensor.numel() == 0:
        return
    carried = tensor.detach().contiguous()
    dist.broadcast(carried.reshape(-1).view(torch.uint8), group=group, group_src=0)
    if carried.data_ptr() != tensor.data_ptr():
        tensor.copy_(carried)


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be the nn.Module that the optimizer trains")


def _check_model(model: nn.Module, known: set[int]) -> None:
    check_module(model)
    if any(isinstance(module, FunctionalModel) for module in model.modules()):
        raise TypeError("this is a functional model already: pass the model itself, which it was made of")
    parameters = dict(model.named_parameters())
    if not known & {id(p) for p in parameters.values()}:
        model = _unwrapped(model)
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


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, Around):
        model = model.model
    return model


def _places(model: nn.Module, W: Tensor, key: str, scale: float) -> Iterator[_Place]:
    """Yield every place of a weight, once for each module that holds it, however many names that module has."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is W:
                yield _Place(module, name, f"{path}.{name}" if path else name, W, key, repr(float(scale)))


def _key(name: str) -> str:
    """Return a parameter's key: one that neither ParameterDict nor Module has as an attribute."""
    return "/" + name.replace(".", "/")


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
    if not {id(p) for p in module.parameters()} <= {id(p) for p in ddp._module_parameters}:
        raise RuntimeError(
            "this DistributedDataParallel was built before the switch to low rank and communicates the wrong "
            "gradients: wrap optimizer.functional(model) again after the switch"
        )
