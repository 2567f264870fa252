"""The functional path: the model called with low-rank weights in place of its own, and the compiled training step.

    f = optimizer.functional(model)          loss_fn(f(x)).backward(); optimizer.step()
    step = optimizer.make_step(model, ...)   loss = step(batch)

`torch.func.functional_call` swaps every selected weight W for a `LowRankWeight`, so that the backward pass delivers
dA and dB and keeps no dL/dW. The swap must last until the backward pass is over, because activation checkpointing runs
the forward again inside it: `Step` calls backward within the functional call, and `FunctionalModel` swaps in again when
the first output gradient arrives.

`Step` compiles the forward and lets AOTAutograd derive the backward. `torch.func.grad_and_value` inside a compiled
function drops custom backwards in silence (pytorch#193279).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ReferenceType, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from . import gradients
from .guard import Guard
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
                _broadcast_(W, ddp.process_group)

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


class Step:
    """One call, one micro-batch: forward and backward, and every `accumulate`-th time the update.

    Args:
        optimizer, model: as in `optimizer.make_step(model, ...)`.
        loss_fn: `loss_fn(model, *batch, **kwargs)` -> scalar loss, or `(loss, aux)` with `has_aux`.
        compile: whether `torch.compile` compiles the forward (and with it the backward): once for the warm start and
            once for the low-rank phase; restarts and rates do not recompile.
        accumulate: micro-batches an update. The loss of each counts 1 / accumulate, so they should be of equal size.
        skip_nonfinite: skip an update, uncounted, whose loss or gradient norm is not finite. It waits for the device
            once an update, for these two numbers.
        guard: skips updates whose loss jumps as well (see guard.py), and knows why the last one was skipped.
        has_aux: whether `loss_fn` returns something beside the loss.
        process_group: over whose processes the gradients are averaged, once an update; None for one process. All of
            them must make the step: it gives them the weights, buffers, factors and seed of the first one, as
            DistributedDataParallel does. From then on nothing but the gradients of what is trained travels: of the
            factors and the unselected parameters. States of the base optimizer that were loaded must be alike.
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
        guard: Guard | None = None,
        has_aux: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate={accumulate!r} must be a whole number of micro-batches, 1 or more")
        for name, value in {"compile": compile, "skip_nonfinite": skip_nonfinite, "has_aux": has_aux}.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r} must be True or False")
        if not (guard is None or isinstance(guard, Guard)):
            raise TypeError(f"guard={guard!r} must be a Guard, or None to step on whatever comes")
        if not (process_group is None or isinstance(process_group, dist.ProcessGroup)):
            raise TypeError(f"process_group={process_group!r} is no process group: torch.distributed.group.WORLD, say")
        _check_module(model)
        if not callable(loss_fn):
            raise TypeError(f"loss_fn={loss_fn!r} must be callable: loss_fn(model, *batch) -> scalar loss")
        self.optimizer, self.accumulate, self.has_aux = optimizer, accumulate, has_aux
        self.guard = Guard(max_jump=inf) if guard is None and skip_nonfinite else guard
        self.process_group = process_group
        self.num_micro_batches = 0
        loss = _Loss(model, loss_fn)
        self._is_compiled = compile
        self._functional = optimizer.functional(loss if compile else _WithBackward(loss, accumulate, has_aux=has_aux))
        _check_process_group(process_group)
        if process_group is not None:
            _start_alike_(optimizer, model, self._functional.factors(), process_group)
        self._forward: Callable[..., Any] = self._functional
        if compile:
            self._forward = _compiled(self._functional)
        self._losses: list[Tensor] = []  # of the update that is accumulated

    def __call__(self, *batch: Any, **kwargs: Any) -> Any:
        """Train on one micro-batch. Returns the detached loss, or (loss, aux)."""
        if self._is_compiled:
            self._functional.check_held()
        with torch.enable_grad():
            loss, aux = _split(self._forward(*batch, **kwargs), has_aux=self.has_aux)
            if self._is_compiled:
                _backward(loss, self.accumulate)
        loss, aux = pytree.tree_map_only(Tensor, Tensor.detach, (loss, aux))
        if self.guard is not None:
            self._losses.append(loss)
        self.num_micro_batches += 1
        if self.num_micro_batches % self.accumulate == 0:
            self._update()
        return (loss, aux) if self.has_aux else loss

    def _update(self) -> None:
        _check_process_group(self.process_group)
        if self.process_group is not None:
            gradients.average_(self._functional.parameters(), self.process_group)
        if self.guard is None:
            self.optimizer.step()
        else:
            self.guard.step(self.optimizer, self._mean_loss())
        self._losses.clear()
        self.optimizer.zero_grad()

    def _mean_loss(self) -> float:
        """Return the mean of this update's losses, over all processes; it waits for the device."""
        loss = torch.stack(self._losses).mean()
        if self.process_group is not None:
            loss = loss.to(next(self._functional.parameters()).device, torch.float64)
            dist.all_reduce(loss.div_(dist.get_world_size(self.process_group)), group=self.process_group)
        return float(loss)


class _Loss(nn.Module):
    """The loss function as a module, so that one functional call spans model and loss."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn
        self.training = model.training

    def forward(self, *batch: Any, **kwargs: Any) -> Any:
        return self.loss_fn(self.model, *batch, **kwargs)


class _WithBackward(nn.Module):
    """A loss whose backward runs inside the functional call, while the weights are swapped."""

    def __init__(self, loss: _Loss, accumulate: int, *, has_aux: bool) -> None:
        super().__init__()
        self.loss, self.accumulate, self.has_aux = loss, accumulate, has_aux
        self.training = loss.training

    def forward(self, *batch: Any, **kwargs: Any) -> Any:
        result = self.loss(*batch, **kwargs)
        loss, _ = _split(result, has_aux=self.has_aux)
        _backward(loss, self.accumulate)
        return pytree.tree_map_only(Tensor, Tensor.detach, result)


def _check_process_group(process_group: dist.ProcessGroup | None) -> None:
    if process_group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"make_step without process_group in one of {dist.get_world_size()} processes, which would train apart: "
            "give process_group=torch.distributed.group.WORLD, read after init_process_group (it is None before); a "
            "process that is to train alone gives a group of its own"
        )


def _compiled(module: nn.Module) -> Callable[..., Any]:
    compiled = torch.compile(module, fullgraph=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(line for line in str(error).splitlines()[:2] if line).rstrip(".")
            raise RuntimeError(
                f"make_step cannot compile this model and loss_fn ({reason}): say compile=False"
            ) from error

    return call


def _start_alike_(optimizer: ReLoRAOptimizer, model: nn.Module, factors: Iterable[Tensor], group: Any) -> None:
    """Give every process of a group the first one's weights, buffers and factors, and the seed of the draws to come.

    Raises:
        ValueError: in all of them, where they hold different models or are not at the same update.
    """
    masters = (optimizer.state.get(p, {}).get("master") for p in model.parameters())
    tensors = [*model.parameters(), *model.buffers(), *factors, *(master for master in masters if master is not None)]
    own = optimizer.clock, [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    held: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(held, (optimizer.seed, own), group=group)
    others = [rank for rank, (_, form) in enumerate(held) if form != held[0][1]]
    if others:
        raise ValueError(
            f"process_group: rank {others[0]} of it has another model or clock than rank 0 (shapes, dtypes, updates): "
            "build the same in every process, and load the same state"
        )
    optimizer.seed = held[0][0]
    for tensor in tensors:
        _broadcast_(tensor, group)


@torch.no_grad()
def _broadcast_(tensor: Tensor, group: Any) -> None:
    """Overwrite a tensor with the first process's; as bytes, for not every backend knows every dtype."""
    if tensor.numel() == 0:
        return
    carried = tensor.detach().contiguous()
    dist.broadcast(carried.reshape(-1).view(torch.uint8), group=group, group_src=0)
    if carried.data_ptr() != tensor.data_ptr():
        tensor.copy_(carried)


def _backward(loss: Tensor, accumulate: int) -> None:
    if not loss.requires_grad:
        raise TypeError(
            f"loss_fn gave a loss of {loss.dtype} that has no gradient: compute it in floating point from the model "
            "that loss_fn is given, and do not detach it"
        )
    (loss / accumulate).backward()


def _split(result: Any, *, has_aux: bool) -> tuple[Tensor, Any]:
    """Return (loss, aux) of what a loss function gave."""
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"loss_fn gave a {type(result).__name__}: with has_aux=True it must return (loss, aux)")
    loss, aux = result if has_aux else (result, None)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(f"loss_fn gave {what} and not a scalar tensor: reduce it, or say has_aux=True for (loss, aux)")
    return loss, aux


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be the nn.Module that the optimizer trains")


def _check_model(model: nn.Module, known: set[int]) -> None:
    _check_module(model)
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
    """Return the caller's model, around which a Step puts modules of its own."""
    while isinstance(model, (_Loss, _WithBackward)):
        model = model.model if isinstance(model, _Loss) else model.loss
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
