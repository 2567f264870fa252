"""What README.md shows is what works."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from relora_opt_cli.app import app
from relora_opt_cli.build import make_schedule
from relora_opt_cli.config_file import load_config_file
from relora_opt_cli.resolution import resolve

import relora_opt

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_marked_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, groups = re.findall(r"<!-- test -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(loop, "README.md", "exec"), names)
    assert (names["optimizer"].num_updates, names["optimizer"].num_restarts) == (60, 2)
    assert (tmp_path / "model.safetensors").exists()
    exec(compile(groups, "README.md", "exec"), names)  # goes on from there
    decays = [(group["rank"], group["weight_decay"]) for group in names["optimizer"].param_groups]
    assert decays == [(8, 0.1), (0, 0.0)]


@pytest.mark.slow
def test_the_marked_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"<!-- test:commands -->\n```bash\n(.*?)```", README, flags=re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert {command[1] for command in commands} >= {"pretrain", "eval", "generate"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, *words in commands:
        assert name == "relora-opt"
        program = [sys.executable, "-m", "relora_opt_cli", *words]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr


def test_the_two_lines_of_the_diff_train_a_model() -> None:
    added = re.search(r"```diff\n(.*?)```", README, flags=re.DOTALL)
    assert added is not None
    code = "\n".join(line[1:] for line in added[1].splitlines() if line.startswith("+"))
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256))
    names = {"model": model, "torch": torch}
    exec(compile(code, "README.md", "exec"), names)
    before = model[0].weight.detach().clone()
    model(torch.randn(4, 256)).square().mean().backward()
    names["optimizer"].step()  # type: ignore[attr-defined]
    assert not torch.equal(before, model[0].weight)


def test_the_papers_settings_are_those_of_its_recipe() -> None:
    (snippet,) = re.findall(r"```python\n(schedule = .*?)```", README, flags=re.DOTALL)
    config = resolve(load_config_file(ROOT / "recipes" / "paper-130m.toml"))
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256))
    names: dict[str, Any] = {"model": model, **vars(relora_opt), "torch": torch}
    exec(compile(snippet, "README.md", "exec"), names)
    optimizer = names["optimizer"]
    assert (optimizer.schedule, optimizer.init) == (make_schedule(config), config.init)
    assert optimizer.prune == relora_opt.prune.magnitude(float(config.prune.partition(":")[2]))
    group = optimizer.param_groups[0]
    assert (group["rank"], group["lr"], group["factor_lr"]) == (config.rank, config.lr, config.factor_lr)
    assert group["scale"] == config.alpha / config.rank


def test_every_file_and_flag_that_it_names_exists() -> None:
    for name in re.findall(r"^ +(?:relora_opt/ +)?(\w+\.py) ", README, flags=re.MULTILINE):
        assert (ROOT / "relora_opt" / name).is_file(), name
    assert {path.name for path in (ROOT / "relora_opt").glob("[a-z]*.py")} <= set(re.findall(r"\w+\.py", README))
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        heading = re.sub(r"[^a-z0-9 -]", "", target.lower()) if target.startswith("#") else ""
        headings = {re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in README.splitlines()}
        assert f"-{heading}" in headings if heading else (ROOT / target).exists(), target
    commands = typer.main.get_command(app).commands.values()
    known = {option for command in commands for parameter in command.params for option in parameter.opts} | {"--help"}
    for flag in re.findall(r"`(--[a-z-]+)", README):
        assert flag in known, flag
