"""The training methods that bench compares, each as `Trainer(model, settings, steps, seed)` with `step(tokens)`.

All share the model, AdamW's betas (0.9, 0.95), clipping at norm 1, a cosine with warm-up over a twentieth of the run
down to a tenth of the peak, and two rates: `lr` for the matrices of the layers (or their factors), `rest_lr` for
embeddings, head and norms. What a rival's package does it does itself; only its groups and its clock are set from here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from relora_opt_cli.config import parse_prune
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from relora_opt import JaggedSchedule, ReLoRAOptimizer, cosine, muon_beside_adamw, prune

Settings = dict[str, Any]
BETAS = (0.9, 0.95)
MATRIX_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_NORM = 1.0


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token, in nats, under bfloat16 autocast."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def outer(steps: int) -> Callable[[int], float]:
    """Return the schedule that all methods share."""
    return cosine(steps, warmup=steps // 20, min_ratio=0.1)


def is_matrix(name: str) -> bool:
    return name.split(".")[-2] in MATRIX_NAMES


class Trainer:
    """A model and its loss, compiled, as all methods share them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.loss = torch.compile(lambda tokens: loss_fn(model, tokens))

    def evaluate(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            loss: Tensor = self.loss(tokens)
            return loss


class Dense(Trainer):
    """Any optimizer over the model's own gradients: full rank, and rivals that project what they are given."""

    def __init__(self, model: nn.Module, settings: Settings, steps: int, seed: int) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if is_matrix(name)]
        rest = [p for name, p in named if not is_matrix(name)]
        super().__init__(model)
        self.optimizer = self.make(matrices, rest, settings, seed)
        self.scheduler = LambdaLR(self.optimizer, self.multiplier(settings, steps))
        self.num_trainable = sum(p.numel() for _, p in named)

    def make(self, matrices: list[Tensor], rest: list[Tensor], settings: Settings, seed: int) -> Optimizer:
        groups = [{"params": matrices, "lr": settings["lr"]}, {"params": rest, "lr": settings["rest_lr"]}]
        return AdamW(groups, betas=BETAS, weight_decay=settings.get("weight_decay", 0.0))

    def multiplier(self, settings: Settings, steps: int) -> Callable[[int], float]:
        schedule = outer(steps)
        return lambda done: schedule(done + 1)

    def step(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.loss(tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], MAX_NORM)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.detach()


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

        own = {key: settings[key] for key in ("rank", "update_proj_gap", "scale")}
        groups = [
            {"params": matrices, "lr": settings["lr"], "proj_type": "std", **own},
            {"params": rest, "lr": settings["rest_lr"]},
        ]
        optimizer: Optimizer = GaLoreAdamW(groups, betas=BETAS, no_deprecation_warning=True)
        return optimizer


class Apollo(Dense):
    """pytorch_optimizer's APOLLO."""

    def make(self, matrices: list[Tensor], rest: list[Tensor], settings: Settings, seed: int) -> Optimizer:
        from pytorch_optimizer import APOLLO

        own = {key: settings[key] for key in ("rank", "update_proj_gap", "scale")}
        groups = [
            {"params": matrices, "lr": settings["lr"], "projection_type": "std", **own},
            {"params": rest, "lr": settings["rest_lr"]},
        ]
        optimizer: Optimizer = APOLLO(groups, betas=BETAS, scale_type=settings.get("scale_type", "channel"))
        return optimizer


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

    def step(self, tokens: Tensor) -> Tensor:
        loss = super().step(tokens)
        self.num_updates += 1
        if self.every and self.num_updates % self.every == 0:
            self.merge_and_reset()
        return loss

    def merge_and_reset(self) -> None:
        from peft.tuners.lora import LoraLayer

        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.merge()
                module.merged_adapters.clear()
                module.reset_lora_parameters("default", init_lora_weights=True)
        for factor in self.factors:
            self.optimizer.state.pop(factor, None)


class ReLoRA(Trainer):
    """ReLoRAOptimizer on the functional path, compiled: everything that this project offers is a setting."""

    def __init__(self, model: nn.Module, settings: Settings, steps: int, seed: int) -> None:
        settings = dict(settings)
        lr, rest_lr = settings.pop("lr"), settings.pop("rest_lr")
        clock = {key: settings.pop(key, 0) for key in ("restart_every", "restart_warmup", "warm_start")}
        strategy = settings.pop("prune", "reset")
        base = settings.pop("base", "adamw")
        matrices = [(name, p) for name, p in model.named_parameters() if is_matrix(name)]
        rest = [(name, p) for name, p in model.named_parameters() if not is_matrix(name)]
        low_rank = {"rank": settings.pop("rank"), "lr": lr, "is_matrices": True}
        groups = [{"params": matrices, **low_rank}, {"params": rest, "lr": rest_lr, "rank": 0, "is_matrices": False}]
        super().__init__(model)
        self.optimizer = ReLoRAOptimizer(
            groups,
            _BASES[base],
            schedule=JaggedSchedule(**clock, outer=outer(steps)),
            prune=_strategy(strategy),
            max_grad_norm=MAX_NORM,
            seed=seed,
            **settings,
        )
        self.step = self.optimizer.make_step(model, loss_fn, compile=True)

    @property
    def num_trainable(self) -> int:
        from relora_opt import memory

        return memory(self.optimizer).num_trainable


def _adamw(groups: Any) -> Optimizer:
    return AdamW(groups, betas=BETAS, weight_decay=0.0)


_muon = muon_beside_adamw(betas=BETAS, weight_decay=0.0)


def _strategy(text: str) -> prune.Strategy:
    name, ratio = parse_prune(text)
    strategy: prune.Strategy = getattr(prune, name)() if ratio is None else getattr(prune, name)(ratio)
    return strategy


_BASES: dict[str, Callable[..., Optimizer]] = {"adamw": _adamw, "muon": _muon}
METHODS: dict[str, Any] = {
    "full": Dense,
    "muon": MuonDense,
    "galore": GaLore,
    "apollo": Apollo,
    "peft": Peft,
    "relora": ReLoRA,
}
