"""Which weights are low-rank: what `targets` name, and what is low-rank by default.

By default, from a module: the weights of `nn.Linear` and of transformers' `Conv1D`, except embeddings, tied weights,
the output head and frozen ones. `targets` (a regex, names, or a predicate) says otherwise; one that matches nothing is
an error. Names are canonical: without what wrappers of modules put into them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Targets = str | Sequence[str] | Callable[[str, Tensor], bool] | None

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # these call theirs "module", as others may
_HEAD_NAMES = ("lm_head", "head", "classifier", "output")
_WRAPPER_NAMES = ("_orig_mod", "_checkpoint_wrapped_module")
_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)


def default_targets(model: nn.Module) -> list[str]:
    """Return the names of the weights that are low-rank by default, whatever the rank, in the model's order.

    >>> default_targets(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8)))
    ['1.weight']
    """
    _check_module(model)
    heads = _output_heads(model)
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    names = []
    parallel = parallel_paths(model)
    for path, module in model.named_modules():
        weight = module._parameters.get("weight") if _is_linear(module) else None
        if weight is None or not weight.requires_grad:
            continue
        is_head = any(module is head for head in heads) or (not heads and path.rpartition(".")[2] in _HEAD_NAMES)
        if not is_head and owners[id(weight)] == 1:
            names.append(canonical_name(f"{path}.weight" if path else "weight", parallel))
    return names


def target_names(model: nn.Module, targets: Targets = None) -> list[str]:
    """Return the names of the weights that `targets` name, whatever the rank; by default `default_targets(model)`.

    Raises:
        ValueError: where a target matches no parameter of two or more dimensions.
    """
    _check_module(model)
    check_targets(targets)
    if targets is None:
        return default_targets(model)
    chosen = Choice(model, targets)
    parallel = parallel_paths(model)
    named = ((canonical_name(name, parallel), p) for name, p in model.named_parameters())
    names = [name for name, p in named if p.dim() >= 2 and chosen.takes(name, p)]
    chosen.check_all_matched()
    return names


def canonical_name(name: str, parallel: Collection[str] = ("", "_orig_mod")) -> str:
    """Return a parameter's name without what torch.compile, DDP and activation checkpointing put into it.

    `parallel` holds the paths of the modules whose child "module" is no part of the name; see `parallel_paths`. Where
    the model is not known, the outermost one may be such.
    """
    parts = name.split(".")
    is_wrapper = (
        part in _WRAPPER_NAMES or (part == "module" and ".".join(parts[:index]) in parallel)
        for index, part in enumerate(parts)
    )
    return ".".join(part for part, drop in zip(parts, is_wrapper, strict=True) if not drop)


def parallel_paths(model: nn.Module) -> set[str]:
    """Return the paths of the DataParallel and DistributedDataParallel modules in a model."""
    return {path for path, module in model.named_modules() if isinstance(module, PARALLEL)}


class Choice:
    """The targets, and which of them have matched so far."""

    def __init__(self, model: nn.Module | None, targets: Targets) -> None:
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"targets={targets!r} is not a regular expression: {error}") from error
        self.targets, self.knows_modules = targets, model is not None
        self._seen: list[str] = []
        self.batch_ids: set[int] = set() if model is None else set(_batch_ids(model))
        self.defaults: set[str] = set() if model is None or targets is not None else set(default_targets(model))
        self._unmatched = {targets} if isinstance(targets, str) else set()
        if isinstance(targets, Sequence) and not isinstance(targets, str):
            self._unmatched = set(targets)

    def takes(self, name: str, parameter: Tensor) -> bool:
        """Say whether the targets name a parameter of two or more dimensions."""
        targets = self.targets
        if isinstance(targets, str):
            matches = {targets} if re.search(targets, name) else set()
        elif callable(targets):
            return bool(targets(name, parameter))
        else:
            matches = {t for t in targets or () if _names(canonical_name(t), name)}
        self._unmatched -= matches
        self._seen.append(name)
        return bool(matches)

    def check_all_matched(self) -> None:
        if self._unmatched:
            raise ValueError(
                f"targets: {sorted(self._unmatched)} match no parameter of two or more dimensions; "
                f"there are {', '.join(self._seen[:5]) or 'none'}{', ...' if len(self._seen) > 5 else ''}"
            )


def check_targets(targets: object) -> None:
    remedy = "give a regular expression, a list of names or a predicate (name, parameter)"
    if isinstance(targets, type):
        raise TypeError(f"targets={targets!r} is a class: {remedy}")
    if isinstance(targets, (nn.Module, Tensor)):
        raise TypeError(f"targets is a {type(targets).__name__}: {remedy}")
    for name in targets if isinstance(targets, Sequence) else ():
        if not isinstance(name, str):
            raise TypeError(f"targets holds a {type(name).__name__}: {remedy}")
    if not (targets is None or callable(targets) or isinstance(targets, Sequence)):
        raise TypeError(f"targets={targets!r}: {remedy}")


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: give the module whose weights are to be named")


def _names(target: str, name: str) -> bool:
    """Say whether a target is a parameter's name, its module's, or the end of either."""
    return any(full == target or full.endswith(f".{target}") for full in (name, name.rpartition(".")[0]))


def _is_linear(module: nn.Module) -> bool:
    kinds = type(module).__mro__  # fully_shard makes a class of its own of each, derived from theirs
    is_conv1d = any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in kinds)
    return isinstance(module, nn.Linear) or is_conv1d


def _output_heads(model: nn.Module) -> list[nn.Module]:
    """Return what the model, or a model inside it, declares as its output embeddings."""
    declared = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    heads = [get() for get in declared if callable(get)]
    return [head for head in heads if isinstance(head, nn.Module)]


def _batch_ids(model: nn.Module) -> Iterator[int]:
    """Yield the ids of 3-D parameters that stack matrices: all but those of convolutions, parametrized ones too."""
    kernels = {id(p) for module in model.modules() if isinstance(module, _CONVOLUTIONS) for p in _own(module)}
    for module in model.modules():
        own = (p for p in module.parameters(recurse=False) if not is_lazy(p) and p.dim() == 3)
        yield from (id(p) for p in own if id(p) not in kernels)


def _own(convolution: nn.Module) -> Iterator[nn.Parameter]:
    """Yield a convolution's parameters, and what parametrizations have made of them."""
    yield from convolution.parameters(recurse=False)
    parametrizations = getattr(convolution, "parametrizations", None)
    for made in parametrizations.values() if isinstance(parametrizations, nn.ModuleDict) else ():
        yield from made.parameters(recurse=False)
