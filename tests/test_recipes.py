"""Recipes load, name each value's source, and the ablation's differ from the paper's run in what their row says."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from relora_opt_cli.config import FIELDS, Config
from relora_opt_cli.config_file import load_config_file
from relora_opt_cli.model import PRESETS
from relora_opt_cli.resolution import resolve

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))
PAPER = {"paper-60m": "60m", "paper-130m": "130m", "paper-250m": "250m", "paper-350m": "350m", "paper-1b": "1.3b"}
# Lialin et al. 2023, Table 6: restarts, optimizer resets, jagged schedule, warm start.
TABLE_6 = {
    "ablation-lora": (False, False, False, False),
    "ablation-restarts": (True, False, False, False),
    "ablation-restarts-reset": (True, True, False, False),
    "ablation-restarts-jagged": (True, False, True, False),
    "ablation-restarts-reset-jagged": (True, True, True, False),
    "ablation-warm-start": (False, False, False, True),
    "ablation-relora": (True, True, True, True),
}


def load(name: str) -> Config:
    return resolve(load_config_file(RECIPES / f"{name}.toml"))


def test_there_is_a_recipe_for_every_size_of_the_paper_and_every_row_of_its_ablation() -> None:
    assert set(NAMES) == {*PAPER, *TABLE_6, "ablation-full-rank"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resolves_to_the_values_it_states(name: str) -> None:
    stated = load_config_file(RECIPES / f"{name}.toml")
    config = load(name)
    assert set(stated) <= set(FIELDS)
    assert {key: getattr(config, key) for key in stated} == {**stated, "betas": tuple(stated["betas"])}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_leaves_the_data_the_folder_and_the_machine_to_its_user(name: str) -> None:
    assert not {"data", "out", "device", "threads", "compile"} & set(load_config_file(RECIPES / f"{name}.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_a_recipe_names_its_source(name: str) -> None:
    lines = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if line and not line.startswith("#")]
    assert values
    assert [line for line in values if not re.fullmatch(r"\w+ = \S.*?\s{2,}# \S.*", line)] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_its_preset(name: str) -> None:
    config = load(name)
    assert config.preset == PAPER.get(name, "130m")
    shape = PRESETS[config.preset]
    assert config.vocab_size == shape.vocab_size
    assert config.seq_len <= shape.max_position_embeddings
    assert config.rank < min(shape.hidden_size, shape.intermediate_size)


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_of_the_paper_doubles_the_factors_rate_warms_up_and_restarts(name: str) -> None:
    config = load(name)
    assert (config.rank, config.alpha, config.factor_lr) == (128, 32.0, 2.0)
    assert config.warmup < config.warm_start < config.steps - config.restart_every
    assert 0 < config.restart_warmup < config.restart_every


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_has_the_full_rank_rate_of_the_papers_recipe(name: str) -> None:
    assert load(name).lr == resolve({"preset": PAPER[name]}).lr


@pytest.mark.parametrize("name", TABLE_6)
def test_an_ablation_has_exactly_the_parts_of_its_row(name: str) -> None:
    config = load(name)
    restarts, resets, jagged, warm_start = TABLE_6[name]
    assert (config.restart_every > 0) == restarts
    assert (config.prune != "keep") == resets
    assert (config.restart_every > 0 and config.restart_warmup > 0) == jagged
    assert (config.warm_start > 0) == warm_start


@pytest.mark.parametrize("name", TABLE_6)
def test_an_ablation_differs_from_the_papers_run_in_nothing_else(name: str) -> None:
    paper, config = load("paper-130m"), load(name)
    parts = ("restart_every", "restart_warmup", "prune", "warm_start")
    assert replace(paper, **{part: getattr(config, part) for part in parts}) == config
    for part in parts:  # a part that is there is there as in the paper's run
        assert getattr(config, part) in (getattr(paper, part), 0, "keep")


def test_the_full_rank_row_differs_from_the_papers_run_in_the_rank() -> None:
    stated, paper = (load_config_file(RECIPES / f"{name}.toml") for name in ("ablation-full-rank", "paper-130m"))
    assert {key: value for key, value in stated.items() if value != paper[key]} == {"rank": 0}


def test_the_table_in_the_recipes_readme_is_the_ablation() -> None:
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (ablation-[\w-]+)[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|", text, re.MULTILINE)
    table = {name: tuple("yes" in cell for cell in cells) for name, *cells in rows}
    assert table == {**TABLE_6, "ablation-full-rank": (False, False, False, False)}
