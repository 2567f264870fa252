"""The training methods that bench compares, each as `Trainer(model, settings, steps, seed)` with `step(tokens)`.

All share the model, AdamW's betas (0.9, 0.95), clipping at norm 1, a cosine with warm-up over a twentieth of the run
down to a tenth of the peak, and two rates: `lr` for the matrices of the layers (or their factors), `rest_lr` for
embeddings, head and norms. AdamW's update is one fused kernel. The loss is under bfloat16 autocast and compiled, unless
`dtype` or `compile` say otherwise; `accumulate` counts the calls of `step` that make an update.
What a rival's package does it does itself; only its groups and its clock are set from here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from relora_opt_cli.limits import parse_prune
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from relora_opt import JaggedSchedule, ReLoRAOptimizer, cosine, memory, muon_beside_adamw, prune

Settings = dict[str, Any]
BETAS = (0.9, 0.95)
MATRIX_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_NORM = 1.0


def loss_fn(model: nn.Module, tokens: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the mean cross-entropy of the next token, in nats, under autocast to a 16-bit dtype, or in float32."""
    with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def outer(steps: int) -> Callable[[int], float]:
    """Return the schedule that all methods share."""
    return cosine(steps, warmup=steps // 20, min_ratio=0.1)


def is_matrix(name: str) -> bool:
    return name.split(".")[-2] in MATRIX_NAMES


class Trainer:
    """A model and its loss, compiled or not, as all methods share them."""

    optimizer: Optimizer
    restart: Callable[[], None] | None = None  # where the method has restarts

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model = model
        self.loss_fn = partial(loss_fn, dtype=settings.get("dtype", torch.bfloat16))
        loss = partial(self.loss_fn, model)
        compile = settings.get("compile", True)  # or options of torch.compile
        options = compile if isinstance(compile, dict) else {}
        self.loss: Callable[[Tensor], Tensor] = torch.compile(loss, **options) if compile else loss
        self.accumulate, self.num_micro_batches = settings.get("accumulate", 1), 0

    def trained(self) -> Iterable[Tensor]:
        """The tensors whose gradients a step makes, and several processes would exchange."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def backward(self, tokens: Tensor) -> Tensor:
        """Make the gradients of a micro-batch, and return its loss."""
        loss = self.loss(tokens)
        (loss / self.accumulate).backward()  # type: ignore[no-untyped-call]
        self.num_micro_batches += 1
        return loss.detach()

    def evaluate(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.loss(tokens)


class Dense(Trainer):
    """Any optimizer over the model's own gradients: full rank, and rivals that project what they are given."""

    def __init__(self, model: nn.Module, settings: Settings, steps: int, seed: int) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if is_matrix(name)]
        rest = [p for name, p in named if not is_matrix(name)]
        super().__init__(model, settings)
        self.optimizer = self.make(matrices, rest, settings, seed)
        self.scheduler = LambdaLR(self.optimizer, self.multiplier(settings, steps))
        self.num_trainable = sum(p.numel() for _, p in named)

    def make(self, matrices: list[Tensor], rest: list[Tensor], settings: Settings, seed: int) -> Optimizer:
        groups = [{"params": matrices, "lr": settings["lr"]}, {"params": rest, "lr": settings["rest_lr"]}]
        return _adamw(groups, weight_decay=settings.get("weight_decay", 0.0))

    def multiplier(self, settings: Settings, steps: int) -> Callable[[int], float]:
        schedule = outer(steps)
        return lambda done: schedule(done + 1)

    def step(self, tokens: Tensor) -> Tensor:
        loss = self.backward(tokens)
        if self.num_micro_batches % self.accumulate == 0:
            self.update()
        return loss

    def update(self) -> None:
        nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], MAX_NORM)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


class MuonDense(Dense):
    """Muon for the matrices, with updates of AdamW's size, beside AdamW for the rest."""

    def make(self, matrices: list[Tensor], rest: list[Tensor], settings: Settings, seed: int) -> Optimizer:
        groups = [
            {"params": matrices, "lr": settings["lr"], "is_matrices": True},
            {"params": rest, "lr": settings["rest_lr"], "is_matrices": False},
        ]
        return _muon(groups)


class GaLore(Dense):
    """galore-torch's GaLoreAdamW."""

    def make(self, matrices: list[Tensor], rest: list[Tensor], settings: Settings, seed: int) -> Optimizer:
        os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
        from galore_torch import GaLoreAdamW

        groups = _projected(matrices, rest, settings)
        return GaLoreAdamW(groups, betas=BETAS, no_deprecation_warning=True)


class Apollo(Dense):
    """pytorch_optimizer's APOLLO."""

    def make(self, matrices: list[Tensor], rest: list[Tensor], settings: Settings, seed: int) -> Optimizer:
        from pytorch_optimizer import APOLLO

        return APOLLO(
            _projected(matrices, rest, settings), betas=BETAS, scale_type=settings.get("scale_type", "channel")
        )


class Fira(Dense):
    """pytorch_optimizer's Fira."""

    def make(self, matrices: list[Tensor], rest: list[Tensor], settings: Settings, seed: int) -> Optimizer:
        from pytorch_optimizer import Fira as AdamWithFira

        return AdamWithFira(_projected(matrices, rest, settings), betas=BETAS)


class Peft(Dense):
    """PEFT's LoRA layers, merged and re-initialized every `restart_every` updates; the factors' state starts anew."""

    def __init__(self, model: nn.Module, settings: Settings, steps: int, seed: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=list(MATRIX_NAMES))
        torch.manual_seed(seed)
        model = inject_adapter_in_model(config, model)
        for name, p in model.named_parameters():
            p.requires_grad = not name.endswith("base_layer.weight")
        self.every, self.num_updates = settings["restart_every"], 0
        super().__init__(model, settings, steps, seed)

    def make(self, matrices: list[Tensor], rest: list[Tensor], settings: Settings, seed: int) -> Optimizer:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.factors = [p for name, p in named if "lora_" in name]
        rest = [p for name, p in named if "lora_" not in name]
        return super().make(self.factors, rest, settings, seed)

    def multiplier(self, settings: Settings, steps: int) -> Callable[[int], float]:
        clock = JaggedSchedule(self.every, restart_warmup=settings["restart_warmup"], outer=outer(steps))
        return lambda done: clock(done + 1)

    def update(self) -> None:
        super().update()
        self.num_updates += 1
        if self.every and self.num_updates % self.every == 0:
            self.restart()

    def restart(self) -> None:
        from peft.tuners.lora import LoraLayer

        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.merge()
                module.merged_adapters.clear()
                module.reset_lora_parameters("default", init_lora_weights=True)
        for factor in self.factors:
            self.optimizer.state.pop(factor, None)


class ReLoRA(Trainer):
    """ReLoRAOptimizer, on the functional path unless `path` is "dense": all that this project offers is a setting."""

    def __init__(self, model: nn.Module, settings: Settings, steps: int, seed: int) -> None:
        settings = dict(settings)
        lr, rest_lr = settings.pop("lr"), settings.pop("rest_lr")
        clock = {key: settings.pop(key, 0) for key in _CLOCK}
        self.restart_until, self.restart_every = settings.pop("restart_until", 0), clock["restart_every"]
        if self.restart_until:  # by hand then: those of a schedule go on to the end
            clock["restart_every"] = 0
        strategy = settings.pop("prune", "reset")
        base, path = settings.pop("base", "adamw"), settings.pop("path", "functional")
        accumulate, is_compiled = settings.pop("accumulate", 1), settings.pop("compile", True)
        dtype = settings.pop("dtype", torch.bfloat16)
        matrices = [(name, p) for name, p in model.named_parameters() if is_matrix(name)]
        rest = [(name, p) for name, p in model.named_parameters() if not is_matrix(name)]
        rank, ranks = settings.pop("rank"), settings.pop("ranks", {})  # `ranks`: of some matrices, by the layer's name
        by_rank: dict[int, list[tuple[str, Tensor]]] = {}
        for name, p in matrices:
            by_rank.setdefault(ranks.get(name.split(".")[-2], rank), []).append((name, p))
        groups = [{"params": some, "rank": r, "lr": lr, "is_matrices": True} for r, some in by_rank.items()]
        groups.append({"params": rest, "lr": rest_lr, "rank": 0, "is_matrices": False})
        super().__init__(model, {"dtype": dtype, "compile": is_compiled, "accumulate": accumulate})
        self.optimizer: ReLoRAOptimizer = ReLoRAOptimizer(
            groups,
            _BASES[base],
            schedule=JaggedSchedule(**clock, outer=outer(steps)),
            prune=_strategy(strategy),
            max_grad_norm=MAX_NORM,
            seed=seed,
            **settings,
        )
        self.restart, self.is_functional = self.optimizer.restart, path == "functional"
        if self.is_functional:
            self._step = self.optimizer.make_step(
                model,
                self.loss_fn,
                compile=is_compiled,
                accumulate=accumulate,
                autocast=None if dtype == torch.float32 else dtype,
            )
        else:
            self._step = self._dense_step

    def trained(self) -> Iterable[Tensor]:
        return self.optimizer.functional(self.model).parameters() if self.is_functional else super().trained()

    def step(self, tokens: Tensor) -> Tensor:
        before = self.optimizer.num_updates
        loss: Tensor = self._step(tokens)
        if before < self.optimizer.num_updates <= self.restart_until and (before + 1) % self.restart_every == 0:
            self.restart()
        return loss

    def _dense_step(self, tokens: Tensor) -> Tensor:
        loss = self.backward(tokens)
        if self.num_micro_batches % self.accumulate == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss

    @property
    def num_trainable(self) -> int:
        return memory(self.optimizer).num_trainable


def _projected(matrices: list[Tensor], rest: list[Tensor], settings: Settings) -> list[dict[str, Any]]:
    """Return the groups of an optimizer that projects gradients; the packages call the same option differently."""
    own = {key: settings[key] for key in ("rank", "update_proj_gap", "scale")}
    return [
        {"params": matrices, "lr": settings["lr"], "proj_type": "std", "projection_type": "std", **own},
        {"params": rest, "lr": settings["rest_lr"]},
    ]


def _adamw(groups: Any, *, weight_decay: float = 0.0) -> Optimizer:
    return AdamW(groups, betas=BETAS, weight_decay=weight_decay, fused=True)


_muon = muon_beside_adamw(betas=BETAS, weight_decay=0.0, fused=True)


def _strategy(text: str) -> prune.Strategy:
    name, ratio = parse_prune(text)
    strategy: prune.Strategy = getattr(prune, name)() if ratio is None else getattr(prune, name)(ratio)
    return strategy


_CLOCK = ("restart_every", "restart_warmup", "warm_start", "warm_start_at")
_BASES: dict[str, Callable[..., Optimizer]] = {"adamw": _adamw, "muon": _muon}
METHODS: dict[str, Any] = {
    "full": Dense,
    "muon": MuonDense,
    "galore": GaLore,
    "apollo": Apollo,
    "fira": Fira,
    "peft": Peft,
    "relora": ReLoRA,
}
