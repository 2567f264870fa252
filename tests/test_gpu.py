"""On an accelerator: the same draws, the same training, a checkpoint that moves between devices. Run with -m gpu."""

import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import lines, sentences, write
from models import PATHS, batch, differences, mlp, selected_weights, snapshot, stepper, through_file
from relora_opt_cli.metrics import read_metrics
from safetensors.torch import load_file
from torch import Tensor, nn

from relora_opt import JaggedSchedule, ReLoRAOptimizer, memory, prune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # which torch.compile uses
    # Torch says these once in a process, in whichever test comes first:
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]


@pytest.fixture
def device() -> str:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None, "no accelerator: these tests need one"
    return accelerator.type


def _train(
    device: str, *, compile: bool = False, num_updates: int = 20, **options: Any
) -> tuple[nn.Module, ReLoRAOptimizer]:
    model = mlp(torch.float64).to(device)
    schedule = JaggedSchedule(6, restart_warmup=2, warm_start=4)
    optimizer = ReLoRAOptimizer(
        model, torch.optim.AdamW, rank=2, alpha=2, schedule=schedule, max_grad_norm=1.0, lr=1e-2, **options
    )
    step = optimizer.make_step(model, lambda model, x: model(x).square().mean(), compile=compile)
    for index in range(num_updates):
        step(batch(index, torch.float64)[0].to(device))
    return model, optimizer


def _assert_same_training(ours: nn.Module, theirs: nn.Module) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-8, atol=1e-10)  # float64; other kernels over 20 updates of Adam


@pytest.mark.parametrize("compile", [False, True])
def test_an_accelerator_trains_as_the_cpu_does(device: str, compile: bool) -> None:
    _assert_same_training(_train(device, compile=compile)[0], _train("cpu")[0])


@pytest.mark.parametrize(
    "options",
    [{"prune": prune.random(0.9)}, {"prune": prune.magnitude(0.5)}, {"prune": prune.keep()}, {"init": "gradient"}],
    ids=["random", "magnitude", "keep", "gradient"],
)
def test_restarts_of_all_kinds_are_the_cpus(device: str, options: dict[str, Any]) -> None:
    ours, optimizer = _train(device, **options)
    assert optimizer.num_restarts == 2
    _assert_same_training(ours, _train("cpu", **options)[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cuda_graphs_train_alike(device: str, accumulate: int) -> None:
    if device != "cuda":
        pytest.skip(f"torch has graphs for CUDA alone, not for {device}")
    runs = []
    for compile in (False, {"mode": "reduce-overhead"}):
        model = mlp(torch.float64).to(device)
        schedule = JaggedSchedule(6, restart_warmup=2, warm_start=6)
        optimizer = ReLoRAOptimizer(
            model, torch.optim.AdamW, rank=2, alpha=2, schedule=schedule, max_grad_norm=1.0, lr=1e-2
        )
        step = optimizer.make_step(
            model,
            lambda model, x: ((y := model(x)).square().mean(), {"mean": y.mean()}),
            compile=compile,
            accumulate=accumulate,
            has_aux=True,
        )
        given = [step(batch(index, torch.float64)[0].to(device)) for index in range(20 * accumulate)]
        assert optimizer.num_restarts == 2
        runs.append((given, list(model.parameters())))
    for kept, own in zip(*runs, strict=True):  # what a step gave is not overwritten by the next
        torch.testing.assert_close(kept, own, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_a_state_that_was_loaded_goes_on_bitwise(device: str, path: str) -> None:
    def build(seed: int) -> tuple[nn.Module, ReLoRAOptimizer, Callable[..., Tensor]]:
        model = mlp(torch.float32, seed=seed).to(device)
        schedule = JaggedSchedule(6, restart_warmup=2, warm_start=4)
        optimizer = ReLoRAOptimizer(model, torch.optim.AdamW, rank=2, alpha=2, schedule=schedule, lr=1e-2)
        return model, optimizer, stepper(path, optimizer, model)

    def run(step: Callable[..., Tensor], updates: range) -> None:
        for index in updates:
            step(*(part.to(device) for part in batch(index)))

    model, optimizer, step = build(0)
    run(step, range(12))
    saved = through_file(snapshot(model, optimizer))
    run(step, range(12, 20))
    other_model, other, other_step = build(1)
    other_model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    run(other_step, range(12, 20))
    assert not differences(snapshot(model, optimizer), snapshot(other_model, other))


@pytest.mark.parametrize("compile", [False, True])
def test_a_step_does_not_wait_for_the_device(device: str, compile: bool) -> None:
    if device != "cuda":
        pytest.skip(f"torch counts the waiting for CUDA alone, not for {device}")
    model = mlp().to(device)
    schedule = JaggedSchedule(100, restart_warmup=2, warm_start=4)
    optimizer = ReLoRAOptimizer(
        model, torch.optim.AdamW, rank=2, alpha="matched", schedule=schedule, max_grad_norm=1.0, lr=1e-2, fused=True
    )
    step = optimizer.make_step(model, lambda model, x: model(x).square().mean(), compile=compile, accumulate=2)
    batches = [batch(index)[0].to(device) for index in range(8)]
    for x in batches:  # four updates: state is made, and what is compiled is
        step(x)
    assert optimizer.is_low_rank
    for x in batches:
        step(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        for x in batches:
            step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.num_updates == 12


def test_no_dense_gradient_is_ever_there(device: str) -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8))).to(device)
    optimizer = ReLoRAOptimizer(model, torch.optim.AdamW, rank=8, alpha=8, lr=1e-3)
    step = optimizer.make_step(model, lambda model, x: model(x).square().mean(), compile=False)
    x = torch.randn(4, 1024, device=device)
    for _ in range(2):
        step(x)
    torch.accelerator.reset_peak_memory_stats()
    held = torch.accelerator.memory_allocated()
    step(x)
    taken = torch.accelerator.max_memory_allocated() - held
    assert taken < 3 * 4 * 1024**2  # three weights' worth; their dense gradients would be eight


def test_memory_is_what_the_device_holds(device: str) -> None:
    gc.collect()  # what earlier tests have left in cycles
    torch.randn(4, 4, device=device) @ torch.randn(4, 4, device=device)  # the library of products takes a workspace
    held = torch.accelerator.memory_allocated()
    model = nn.Sequential(nn.Linear(1024, 512), nn.Linear(512, 512), nn.Linear(512, 7)).to(device)
    optimizer = ReLoRAOptimizer(model, torch.optim.AdamW, rank=8, alpha=8, lr=1e-3)
    step = optimizer.make_step(model, lambda model, x: model(x).square().mean(), compile=False)
    x = torch.randn(4, 1024, device=device)
    for _ in range(3):
        step(x)
    del x
    told = memory(optimizer)
    found = torch.accelerator.memory_allocated() - held
    kept = told.weight_bytes + told.state_bytes
    assert kept <= found <= kept + 512 * 100, (found, told)  # blocks of 512 bytes


@pytest.mark.parametrize("compile", [False, True])
def test_weights_of_16_bits_have_their_masters_there(device: str, compile: bool) -> None:
    model = mlp(torch.bfloat16).to(device)
    optimizer = ReLoRAOptimizer(model, torch.optim.AdamW, rank=2, alpha="matched", lr=1e-4)
    step = optimizer.make_step(model, lambda model, x: model(x).float().square().mean(), compile=compile)
    for index in range(10):
        step(batch(index, torch.bfloat16)[0].to(device))
    for W in selected_weights(model).values():
        master = optimizer.state[W]["master"]
        assert master.device.type == device
        assert torch.equal(W, master.to(torch.bfloat16))
        assert not torch.equal(W.float(), master)  # it has what the weight cannot hold


def test_grad_scaler_trains_the_dense_path(device: str) -> None:
    model = mlp().to(device)
    optimizer = ReLoRAOptimizer(model, torch.optim.AdamW, rank=2, alpha="matched", lr=1e-2, max_grad_norm=1.0)
    scaler, losses = torch.amp.GradScaler(device), []
    x, y = (part.to(device) for part in batch(0))
    for _ in range(60):
        with torch.autocast(device, dtype=torch.float16):
            loss = (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert optimizer.num_updates >= 58  # its first scales may be too large
    assert losses[-1] < 0.9 * losses[0]


def test_a_run_on_an_accelerator_goes_on_and_exports_and_is_evaluated_on_the_cpu(device: str, tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", lines(sentences(400)))
    own = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def call(*words: object) -> str:
        command = [sys.executable, "-m", "relora_opt_cli", *map(str, words)]
        done = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    length = ["--steps", 40, "--warm-start", 8, "--restart-every", 16, "--restart-warmup", 4, "--save-every", 20]
    shape = ["--data", texts, "--vocab-size", 300, "--seq-len", 32, "--batch-size", 8, "--checkpoint-activations"]
    said = call("pretrain", *shape, *length, "--rank", 8, "--out", "run")
    assert f"{device}:0: bfloat16 products, step compiled" in said
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1].restarts == 2
    assert rows[-1].val_loss is not None
    assert rows[0].val_loss is not None
    assert rows[-1].val_loss < rows[0].val_loss - 1
    said = call("pretrain", "--resume", "run", "--steps", 60, "--cuda-graphs")
    assert f"{device}:0: bfloat16 products, step compiled and replayed" in said
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1].update == 60
    call("export", "run", "--out", "exported")
    call("eval", "exported", "--data", texts, "--device", "cpu")
    assert load_file(tmp_path / "exported" / "model.safetensors")


@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("release_grads", [False, True])
def test_the_implementations_of_a_base_train_alike_there(
    device: str, options: dict[str, bool], release_grads: bool
) -> None:
    runs = []
    for own in (options, {}):
        model = mlp(torch.float64).to(device)
        schedule = JaggedSchedule(6, restart_warmup=2, warm_start=4)
        optimizer = ReLoRAOptimizer(
            model, torch.optim.AdamW, rank=2, alpha=2, schedule=schedule, lr=1e-2, release_grads=release_grads, **own
        )
        for index in range(20):
            model(batch(index, torch.float64)[0].to(device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.num_restarts == 2
        runs.append(model.state_dict())
    # A capturable base counts its steps in float32 on the device, and corrects its moments by powers of that.
    rtol, atol = (1e-4, 1e-5) if "capturable" in options else (1e-8, 1e-10)
    for name, ours in runs[0].items():
        torch.testing.assert_close(ours, runs[1][name], rtol=rtol, atol=atol)


def test_a_state_moves_between_devices(device: str) -> None:
    model, optimizer = _train("cpu")
    moved, other = _train(device, num_updates=1)
    moved.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for W, theirs in zip(selected_weights(moved).values(), selected_weights(model).values(), strict=True):
        for ours, cpu in zip(other.factors(W), optimizer.factors(theirs), strict=True):
            assert ours.device.type == device
            assert torch.equal(ours.cpu(), cpu)
