"""The compiled training step on the functional path.

    step = optimizer.make_step(model, ...)   loss = step(batch)

`Step` compiles the forward and lets AOTAutograd derive the backward. `torch.func.grad_and_value` inside a compiled
function drops custom backwards in silence (pytorch#193279). Uncompiled, it calls backward within the functional call,
so that the weights are swapped until the backward pass is over (see functional.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import gradients
from .compiler import drop_cut_library
from .functional import broadcast_
from .guard import Guard
from .places import Around, check_module

if TYPE_CHECKING:
    from .optimizer import ReLoRAOptimizer


class Step:
    """One call, one micro-batch: forward and backward, and every `accumulate`-th time the update.

    An update does not count what was there before it: what other losses have left in the `grad` of what is trained (a
    generator's, in that of the discriminator it goes through) is dropped before the first of its micro-batches.

    Args:
        optimizer, model: as in `optimizer.make_step(model, ...)`.
        loss_fn: `loss_fn(model, *batch, **kwargs)` -> scalar loss, or `(loss, aux)` with `has_aux`.
        compile: whether `torch.compile` compiles the forward (and with it the backward): once for the warm start, or
            each of its turns, and once for low rank; restarts and rates do not recompile. A dictionary is handed on:
            {"mode": "reduce-overhead"} takes CUDA graphs, for models so small that a GPU waits for Python.
        accumulate: micro-batches an update. The loss of each counts 1 / accumulate, so they should be of equal size.
        skip_nonfinite: skip an update, uncounted, whose loss or gradient norm is not finite. It waits for the device
            once an update, for these two numbers.
        guard: skips updates whose loss jumps as well (see guard.py), and knows why the last one was skipped.
        has_aux: whether `loss_fn` returns something beside the loss.
        autocast: the dtype of an autocast around `loss_fn`, bfloat16; None leaves that to `loss_fn`. With `accumulate`,
            float32 weights are cast once an update and not once a micro-batch: what is written into one of them through
            `.data` between micro-batches is seen after the update only.
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
        compile: bool | dict[str, Any] = True,
        accumulate: int = 1,
        skip_nonfinite: bool = False,
        guard: Guard | None = None,
        has_aux: bool = False,
        autocast: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate={accumulate!r} must be a whole number of micro-batches, 1 or more")
        if not isinstance(compile, (bool, dict)) or compile == {}:
            raise TypeError(
                f'compile={compile!r} must be True, False, or options of torch.compile: {{"mode": ...}}, say'
            )
        for name, value in {"skip_nonfinite": skip_nonfinite, "has_aux": has_aux}.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r} must be True or False")
        if not (guard is None or isinstance(guard, Guard)):
            raise TypeError(f"guard={guard!r} must be a Guard, or None to step on whatever comes")
        if autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"autocast={autocast!r} must be torch.bfloat16 or None: float16 wants a GradScaler, which the "
                "functional path refuses"
            )
        if not (process_group is None or isinstance(process_group, dist.ProcessGroup)):
            raise TypeError(f"process_group={process_group!r} is no process group: torch.distributed.group.WORLD, say")
        check_module(model)
        if not callable(loss_fn):
            raise TypeError(f"loss_fn={loss_fn!r} must be callable: loss_fn(model, *batch) -> scalar loss")
        self.optimizer, self._accumulate, self.has_aux, self._model = optimizer, accumulate, has_aux, model
        self._cast = autocast if accumulate > 1 else None  # one pass casts each weight once
        self.guard = Guard(max_jump=inf) if guard is None and skip_nonfinite else guard
        self.process_group = process_group
        self.num_micro_batches = 0
        loss = _Loss(model, loss_fn, autocast)
        self._is_compiled = bool(compile)
        options = compile if isinstance(compile, dict) else {}
        if compile:
            _check_num_compilations(optimizer, options)
        self._is_replayed = bool(compile) and _takes_graphs(options)
        self._functional = optimizer.functional(loss if compile else _WithBackward(loss, accumulate, has_aux=has_aux))
        _check_process_group(process_group)
        if process_group is not None:
            _start_alike_(optimizer, model, self._functional.factors(), process_group)
        self._pass: Callable[..., Any] = self._functional  # forward and backward
        if compile:
            self._pass = _compiled(self._functional, accumulate, options, has_aux=has_aux)
        self._losses: list[Tensor] = []  # of the update that is accumulated
        self._num_breaks = optimizer._num_breaks

    def __call__(self, *batch: Any, **kwargs: Any) -> Any:
        """Train on one micro-batch. Returns the detached loss, or (loss, aux).

        Where it fails, in memory say, the update is to be made anew: gradients of its micro-batches are dropped.

        Raises:
            RuntimeError: in the middle of an update that another step of this optimizer has begun.
        """
        self._check_turn()
        if self._num_begun and self._num_breaks != self.optimizer._num_breaks:
            self._begin_anew()
        if not self._num_begun and self.optimizer._has_gradients:
            self.optimizer.zero_grad()
        try:
            loss, aux = self._micro_batch(*batch, **kwargs)
        except BaseException:
            self._begin_anew()
            raise
        if self.guard is not None:
            self._losses.append(loss)
        self.num_micro_batches += 1
        self.optimizer._begun = ref(self) if self._num_begun else None
        if not self._num_begun:
            self._update()
        self._num_breaks = self.optimizer._num_breaks
        return (loss, aux) if self.has_aux else loss

    @property
    def accumulate(self) -> int:
        """The micro-batches of an update; it is fixed, for a compiled step divides by it."""
        return self._accumulate

    def _micro_batch(self, *batch: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Add the gradients of a micro-batch; return its detached loss, and what else there is."""
        if self._is_compiled:
            self._functional.follow()
        if self._cast is not None:
            self._functional.keep_casts(self._cast)
        without = self._without_gradient() if self._is_replayed else []
        with torch.enable_grad():
            loss, aux = _split(self._pass(*batch, **kwargs), has_aux=self.has_aux)
        loss, aux = pytree.tree_map_only(Tensor, Tensor.detach, (loss, aux))
        if self._is_replayed:
            _check_aux(aux)
            loss, aux = pytree.tree_map_only(Tensor, Tensor.clone, (loss, aux))
            gradients.keep_(without)
        return loss, aux

    def _update(self) -> None:
        """Make the update; its gradients are used up, also where it fails."""
        self._functional.drop_casts()
        try:
            self._step()
        finally:
            self._losses.clear()
            self.optimizer.zero_grad()

    def _step(self) -> None:
        _check_process_group(self.process_group)
        if self.process_group is not None:
            self._functional.project_dense()  # a penalty's, say: averages are of what is trained
            gradients.average_(self._functional.parameters(), self.process_group)
        if self.guard is None:
            self.optimizer.step()
        else:
            self.guard.step(self.optimizer, self._mean_loss())

    def _check_turn(self) -> None:
        """Refuse to step on the gradients of another step's update; forget those of a step that is no more."""
        begun = self.optimizer._begun
        other = None if begun is None else begun()
        if other is not None and other is not self and other._num_begun:
            raise RuntimeError(
                f"another step of this optimizer has taken {other._num_begun} of the {other.accumulate} micro-batches "
                "of an update, whose gradients this one would step on: call that one until its update is made"
            )
        if begun is not None and other is None:
            self.optimizer._begun = None
            self.optimizer.zero_grad()

    @property
    def _num_begun(self) -> int:
        """The micro-batches of an update that is not made yet."""
        return self.num_micro_batches % self.accumulate

    def _begin_anew(self) -> None:
        """Forget the micro-batches of an update in the middle of which one has failed, or was no longer of any use.

        Such are those before a load, a restart, a step of the optimizer's or its `zero_grad()` by somebody else.
        """
        self.num_micro_batches -= self._num_begun
        self.optimizer._begun = None
        self._losses.clear()
        self._functional.drop_casts()
        self.optimizer.zero_grad()

    def _without_gradient(self) -> list[Tensor]:
        """Return all whose gradients a pass may make that have none yet."""
        unique = {id(p): p for p in (*self._model.parameters(), *self._functional.parameters())}
        return [p for p in unique.values() if p.grad is None]

    def _mean_loss(self) -> float:
        """Return the mean of this update's losses, over all processes; it waits for the device."""
        loss = torch.stack(self._losses).mean()
        if self.process_group is not None:
            loss = loss.to(next(self._functional.parameters()).device, torch.float64)
            dist.all_reduce(loss.div_(dist.get_world_size(self.process_group)), group=self.process_group)
        return float(loss)


class _Loss(Around):
    """The loss function as a module, so that one functional call spans model and loss."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any], autocast: torch.dtype | None) -> None:
        super().__init__(model)
        self.loss_fn, self.autocast = loss_fn, autocast
        self._device = next(model.parameters()).device.type

    def forward(self, *batch: Any, **kwargs: Any) -> Any:
        if self.autocast is None:  # whatever is around it holds
            return self.loss_fn(self.model, *batch, **kwargs)
        with torch.autocast(self._device, dtype=self.autocast):
            return self.loss_fn(self.model, *batch, **kwargs)


class _WithBackward(Around):
    """A loss whose backward runs inside the functional call, while the weights are swapped."""

    def __init__(self, loss: _Loss, accumulate: int, *, has_aux: bool) -> None:
        super().__init__(loss)
        self.accumulate, self.has_aux = accumulate, has_aux

    def forward(self, *batch: Any, **kwargs: Any) -> Any:
        result = self.model(*batch, **kwargs)
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


def _check_num_compilations(optimizer: ReLoRAOptimizer, options: dict[str, Any]) -> None:
    """Refuse turns of a warm start at one of which torch would refuse to compile."""
    schedule = optimizer.schedule
    to_come = {schedule.turn(update) for update in range(optimizer.num_updates + 1, schedule.switch + 2)}
    limit = options.get("recompile_limit") or torch._dynamo.config.recompile_limit
    if schedule.warm_start_turns > 1 and len(to_come) > limit:
        raise ValueError(
            f"warm_start_turns={schedule.warm_start_turns} leaves {len(to_come)} steps to compile, and torch stops "
            f"after {limit} of them in a process: take fewer turns, set torch._dynamo.config.recompile_limit = "
            f"{2 * len(to_come)}, or say compile=False"
        )


def _check_aux(aux: Any) -> None:
    """Refuse what cannot be copied, and would change with the next replay of a graph."""
    for leaf in pytree.tree_leaves(aux):
        if not (leaf is None or isinstance(leaf, (Tensor, int, float, str))):
            raise TypeError(
                f"loss_fn gave a {type(leaf).__name__} beside the loss, whose tensors the next replay of a CUDA graph "
                "would overwrite: give tensors and numbers, in tuples, lists and dictionaries"
            )


def _takes_graphs(options: dict[str, Any]) -> bool:
    """Say whether torch.compile records CUDA graphs with these options, so that what a call gives is overwritten."""
    from torch._inductor import config

    chosen = options.get("options")
    by_options = isinstance(chosen, dict) and bool(chosen.get("triton.cudagraphs"))
    by_name = options.get("mode") in ("reduce-overhead", "max-autotune") or options.get("backend") == "cudagraphs"
    return by_options or by_name or bool(config.triton.cudagraphs)


def _compiled(loss: nn.Module, accumulate: int, options: dict[str, Any], *, has_aux: bool) -> Callable[..., Any]:
    """Return the forward pass, compiled, with the backward pass after it."""
    try:
        compiled = torch.compile(loss, fullgraph=True, **options)
    except Exception as error:  # fullgraph given twice, an unknown mode, mode and options: each of another class
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"compile={options!r} is not for torch.compile(..., fullgraph=True): {reason}") from error

    def call(*args: Any, **kwargs: Any) -> Any:
        dropped: set[Path] = set()
        while True:
            try:
                result = compiled(*args, **kwargs)
                _backward(_split(result, has_aux=has_aux)[0], accumulate)
                return result
            except Exception as error:
                if drop_cut_library(error, dropped):
                    continue
                if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
                    raise RuntimeError(
                        "make_step compiles the same code for every model, rank and form of batch, and torch stops "
                        f"after {torch._dynamo.config.recompile_limit} of them in a process: call "
                        "torch.compiler.reset() between models, raise torch._dynamo.config.recompile_limit, or say "
                        "compile=False"
                    ) from error
                if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                    raise
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
    clock = optimizer.clock
    scales = clock.pop("scales")  # which are found by trial: processors may round the last digit otherwise
    own = clock, [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    held: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(held, (optimizer.seed, own, scales), group=group)
    others = [rank for rank, (_, form, _) in enumerate(held) if form != held[0][1]]
    if others:
        raise ValueError(
            f"process_group: rank {others[0]} of it has another model or clock than rank 0 (shapes, dtypes, updates): "
            "build the same in every process, and load the same state"
        )
    optimizer.seed = held[0][0]
    optimizer._adopt_scales(held[0][2], optimizer.param_groups)
    optimizer._changed()
    for tensor in tensors:
        broadcast_(tensor, group)


def _backward(loss: Tensor, accumulate: int) -> None:
    if not loss.requires_grad:
        raise TypeError(
            f"loss_fn gave a loss of {loss.dtype} that has no gradient: compute it in floating point from the model "
            "that loss_fn is given, do not detach it, and leave a parameter unfrozen"
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
