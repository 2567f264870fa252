"""Trainers that people use call the optimizer as they call any other, and get the updates of a plain loop."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from models import batch, differences, jagged_schedule, mlp, mse, relora, snapshot
from ranks import reset_accelerate
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from relora_opt import JaggedSchedule, ReLoRAOptimizer, trainer_factory

STEPS = 10
SCHEDULE = JaggedSchedule(3, restart_warmup=1, warm_start=2)  # restarts after 5 and 8
OPTIONS: dict[str, Any] = {"rank": 4, "schedule": SCHEDULE, "lr": 1e-2, "max_grad_norm": 0.5}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16))


def texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 32, (4 * STEPS, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


# ---- transformers


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Batches of four in the order of the texts; nothing else happens to the gradients."""
    settings: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 4, "max_grad_norm": 0.0}
    settings |= {"train_sampling_strategy": "sequential", "use_cpu": True, "report_to": [], "save_strategy": "no"}
    settings |= {"logging_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2, "seed": 0}
    return TrainingArguments(str(folder), **{**settings, **changes})


def trainer(model: nn.Module, folder: Path, kind: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    own = {key: changes.pop(key) for key in ("optimizers", "optimizer_cls_and_kwargs") if key in changes}
    made = kind(model, arguments(folder, **changes), train_dataset=texts(), eval_dataset=texts()[:4], **own)
    made.remove_callback(PrinterCallback)
    return made


def linear_schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def plain_loop(path: str = "dense", accumulate: int = 1) -> tuple[nn.Module, ReLoRAOptimizer]:
    """What every trainer must equal."""
    model = llama()
    optimizer = ReLoRAOptimizer(model, **OPTIONS)
    scheduler = linear_schedule(optimizer)
    call = optimizer.functional(model) if path == "functional" else model
    for step in range(STEPS):
        rows = torch.stack([text["input_ids"] for text in texts()[4 * step : 4 * step + 4]])
        for chunk in rows.chunk(accumulate):
            (call(input_ids=chunk, labels=chunk).loss / accumulate).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, optimizer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 1e-6) -> None:
    """To float32's rounding: the Trainer divides a loss by its number of tokens, in another order."""
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def test_the_trainer_takes_optimizer_and_scheduler_and_makes_the_updates_of_a_plain_loop(tmp_path: Path) -> None:
    model = llama()
    optimizer = ReLoRAOptimizer(model, **OPTIONS)
    scheduler = linear_schedule(optimizer)
    trainer(model, tmp_path, optimizers=(optimizer, scheduler)).train()
    expected, other = plain_loop()
    close(weights(model), weights(expected))
    assert (optimizer.num_updates, optimizer.num_restarts) == (other.num_updates, other.num_restarts) == (STEPS, 2)
    assert optimizer.last_lr() == other.last_lr()


@pytest.mark.parametrize("release_grads", [False, True])
def test_the_factory_selects_by_module_and_the_trainers_scheduler_drives_the_rates(
    tmp_path: Path, release_grads: bool
) -> None:
    model = llama()
    factory = (trainer_factory, {**OPTIONS, "release_grads": release_grads})
    made = trainer(model, tmp_path, optimizer_cls_and_kwargs=factory, lr_scheduler_type="linear")
    made.train()
    expected, other = plain_loop()
    assert made.optimizer.optimizer.selected == other.selected
    assert not any("embed" in name or "lm_head" in name for name in other.selected)
    close(weights(model), weights(expected))


def test_the_trainers_own_clipping_of_released_gradients_is_that_of_max_grad_norm(tmp_path: Path) -> None:
    runs = []
    for ours, theirs in ((0.1, 0.0), (None, 0.1)):
        model = llama()
        options = {**OPTIONS, "alpha": None}  # norms round differently, and a larger scale would carry that further
        factory = (trainer_factory, {**options, "release_grads": True, "max_grad_norm": ours})
        trainer(model, tmp_path, optimizer_cls_and_kwargs=factory, max_grad_norm=theirs).train()
        runs.append(weights(model))
    close(*runs)


def test_the_factory_wants_a_rate_because_the_trainer_keeps_its_own(tmp_path: Path) -> None:
    made = trainer(llama(), tmp_path, optimizer_cls_and_kwargs=(trainer_factory, {"rank": 4}))
    with pytest.raises(TypeError, match=r"without lr: transformers' Trainer does not hand its learning_rate over"):
        made.create_optimizer()


class LowRankTrainer(Trainer):
    """The functional path in three lines."""

    low_rank: ReLoRAOptimizer

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "trained"):
            self.trained = self.low_rank.functional(model)
        return super().compute_loss(self.trained if model.training else model, inputs, *args, **kwargs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_on_the_functional_path_never_sees_a_dense_gradient(tmp_path: Path, accumulate: int) -> None:
    model = llama()
    optimizer = ReLoRAOptimizer(model, **OPTIONS)
    sizes = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    made = trainer(model, tmp_path, LowRankTrainer, optimizers=(optimizer, linear_schedule(optimizer)), **sizes)
    made.low_rank = optimizer
    seen: list[bool] = []
    projection = model.model.layers[0].mlp.up_proj.weight
    optimizer.register_step_pre_hook(lambda *_: seen.append(projection.grad is not None))
    made.train()
    assert seen[:2] == [True, True]  # the warm start is full-rank
    assert len(seen) > 2
    assert not any(seen[2:])
    close(weights(model), weights(plain_loop("functional", accumulate)[0]))
    loss = model(**{key: torch.stack([text[key] for text in texts()[:4]]) for key in ("input_ids", "labels")}).loss
    assert made.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_the_trainer_resumes_from_its_checkpoint_bitwise(tmp_path: Path, stop: int) -> None:
    runs = []
    for resumes in (False, True):
        model = llama()
        changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": stop, "save_only_model": False}
        made = trainer(model, tmp_path, optimizer_cls_and_kwargs=(trainer_factory, OPTIONS), **changes)
        made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}") if resumes else None)
        runs.append({"model": weights(model), "optimizer": made.optimizer.optimizer.state_dict()})
    assert not differences(*runs)


def test_the_trainer_in_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    model = llama()
    made = trainer(model, tmp_path, optimizer_cls_and_kwargs=(trainer_factory, OPTIONS), bf16=True)
    made.train()
    assert made.optimizer.optimizer.num_restarts == 2
    assert made.evaluate()["eval_loss"] < 3.5  # ln 32 = 3.47 is chance


# ---- Accelerate


@pytest.fixture
def accelerator() -> Iterator[accelerate.Accelerator]:
    reset_accelerate()
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    reset_accelerate()


def accelerated(accelerator: Any, model: nn.Module, optimizer: Any, scheduler: Any, updates: range) -> None:
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for u in updates:
        for x, y in zip(*(tensor.chunk(2) for tensor in batch(u)), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(mse(model, x, y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


def test_accelerate_accumulates_clips_and_schedules_as_a_plain_loop_does(accelerator: Any) -> None:
    runs = []
    for prepares in (True, False):
        model = mlp()
        optimizer = relora(model, schedule=jagged_schedule(4, 2, 3))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
        if prepares:
            accelerated(accelerator, model, optimizer, scheduler, range(STEPS))
        else:
            for u in range(STEPS):
                for x, y in zip(*(tensor.chunk(2) for tensor in batch(u)), strict=True):
                    (mse(model, x, y) / 2).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        runs.append(snapshot(model, optimizer))
    assert optimizer.num_restarts == 1
    assert not differences(*runs)


@pytest.mark.parametrize("stop", [3, 5])
def test_accelerate_saves_and_loads_a_run_bitwise(accelerator: Any, tmp_path: Path, stop: int) -> None:
    def build(seed: int) -> tuple[Any, Any, Any]:
        model = mlp(seed=seed)
        optimizer = relora(model, schedule=jagged_schedule(4, 2, 3))
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4)

    whole = build(0)
    accelerated(accelerator, *whole, range(stop))
    accelerator.save_state(str(tmp_path))
    accelerated(accelerator, *whole, range(stop, STEPS))
    accelerator.free_memory()
    parts = build(1)
    accelerator.prepare(*parts)
    accelerator.load_state(str(tmp_path))
    accelerated(accelerator, *parts, range(stop, STEPS))
    assert not differences(snapshot(*parts[:2]), snapshot(*whole[:2]))


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")  # Accelerate replaces it, to see whether it is called
def test_what_a_grad_scaler_skips_accelerate_knows_and_schedules_nothing_for(accelerator: Any) -> None:
    model = mlp()
    optimizer = relora(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 10)
    wrapped_scheduler = accelerate.scheduler.AcceleratedScheduler(scheduler, wrapped)
    skipped = []
    for u in range(4):
        scaler.scale(2.0**80 * mse(model, *batch(u)) if u in (1, 3) else 0.0 * mse(model, *batch(u))).backward()
        wrapped.step()
        wrapped_scheduler.step()
        wrapped.zero_grad()
        skipped.append(wrapped.step_was_skipped)
    assert skipped == [False, True, False, True]
    assert optimizer.num_updates == 2
    assert scheduler.last_epoch == 2


# ---- averages of weights, autocast, clipping, torch.compile


@pytest.mark.parametrize("path", ["dense", "functional"])
@pytest.mark.parametrize("kind", ["SWA", "EMA"])
def test_averages_of_the_model_are_averages_of_its_effective_weights(path: str, kind: str) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).double()
    optimizer = ReLoRAOptimizer(model, rank=2, targets=["0.weight"], schedule=SCHEDULE, lr=0.05)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if kind == "EMA" else AveragedModel(model)
    call = optimizer.functional(model) if path == "functional" else model
    expected = model[0].weight.detach().clone()
    for u in range(STEPS):
        mse(call, *batch(u, torch.float64)).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        share = 0.1 if kind == "EMA" else 1 / (u + 1)
        expected = model[0].weight.detach().clone() if u == 0 else expected.lerp(model[0].weight.detach(), share)
    torch.testing.assert_close(average.module[0].weight.detach(), expected, rtol=1e-12, atol=1e-14)
    update_bn([batch(u, torch.float64) for u in range(3)], average)
    assert torch.isfinite(average(batch(0, torch.float64)[0])).all()
    assert optimizer.num_restarts == 2


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains_near_float32_and_float16_wants_a_scaler_on_the_dense_path(half: torch.dtype) -> None:
    runs = []
    for is_half in (False, True):
        model = mlp()
        optimizer = relora(model, schedule=jagged_schedule(4, 2, 3))
        scaler = torch.amp.GradScaler("cpu", enabled=is_half and half == torch.float16)
        for u in range(12):
            with torch.autocast("cpu", half, enabled=is_half):
                loss = mse(model, *batch(u))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert (optimizer.num_updates, optimizer.num_restarts) == (12, 2)
        runs.append(weights(model))
    close(runs[1], runs[0], atol=0.01)  # Adam turns the rounding of a small gradient into a share of an update
    assert differences(*runs)


def test_clipping_the_models_gradients_clips_what_is_projected() -> None:
    G = torch.randn(6, 7)
    moves = []
    for scale in (1.0, 0.25):
        model = mlp()
        optimizer = relora(model, "SGD", momentum=0.0, weight_decay=0.0, schedule=JaggedSchedule(0))
        before = model.first.weight.detach().clone()
        model.first.weight.grad = G / G.norm() * scale  # as norm 1 clipped to 0.25
        optimizer.step()
        moves.append(model.first.weight.detach() - before)
    torch.testing.assert_close(moves[1], moves[0] * 0.25, rtol=1e-4, atol=1e-7)  # W's rounding


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13's compiler uses what torch 2.13 deprecates
def test_a_compiled_model_trains_on_the_dense_path_and_compiles_once(backend: str) -> None:
    model, eager = mlp(), mlp()
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    graphs.clear()
    options: dict[str, Any] = {"rank": 2, "schedule": jagged_schedule(4, 2, 3), "lr": 0.01}
    optimizer, other = ReLoRAOptimizer(compiled, **options), ReLoRAOptimizer(eager, **options)
    assert optimizer.selected == other.selected
    for u in range(12):
        for one, call in ((optimizer, compiled), (other, eager)):
            mse(call, *batch(u)).backward()
            one.step()
            one.zero_grad()
    assert graphs["unique_graphs"] == 1
    close(weights(model), weights(eager), atol=1e-5)  # the compiler adds in another order; Adam magnifies


def test_a_deep_copy_of_a_model_can_be_trained_beside_it() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizers = [relora(one, schedule=SCHEDULE) for one in (model, twin)]
    for u in range(6):
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            mse(one, *batch(u)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not differences(weights(model), weights(twin))


def test_a_loop_over_a_data_loader_needs_nothing_but_step_and_zero_grad() -> None:
    rows = [tuple(tensor[i] for tensor in batch(0)) for i in range(12)]
    model = mlp()
    optimizer = relora(model, schedule=SCHEDULE)
    losses = []
    for _ in range(10):
        for x, y in DataLoader(rows, batch_size=6):
            loss = mse(model, x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
