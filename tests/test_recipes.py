"""Every shipped recipe resolves for each of its topologies, onto as many devices as those have."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from maxlm.cli import main
from maxlm.model.flops import ledger
from maxlm.plan.topology import parse_topology
from maxlm.recipe import RecipeError
from maxlm.resolve import resolve

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py") if "PLACES" in path.read_text())
# Parameters, and those that a token meets, in billions, as the reports round them; presets hold them exactly.
ROUNDED = {
    "mixtral_8x7b": (46.7, 12.9),
    "deepseek_v3": (671.0, 37.6),
    "qwen3_30b_a3b": (30.5, 3.35),
    "llama_1b3": (1.35, 1.35),
}


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_devices_of_its_topologies(name):
    module = recipe(name)
    for topology in module.PLACES:
        config = resolve(module.get_config(topology), devices=parse_topology(topology).devices)
        tokens = config.train.steps * config.data.batch_size * config.data.sequence_length
        assert tokens == pytest.approx(module.TOKENS, rel=1e-3), topology
    assert resolve(module.get_config()).parallel == resolve(module.get_config(next(iter(module.PLACES)))).parallel


@pytest.mark.parametrize("name", ROUNDED)
def test_a_recipe_has_the_parameters_of_its_name(name):
    config = resolve(recipe(name).get_config())
    model = dataclasses.replace(config.model, mtp_layers=0)  # no part of what is published as a model's size
    counted = ledger(model, sequence_length=config.data.sequence_length)
    total, active = ROUNDED[name]
    assert counted.params_total / 1e9 == pytest.approx(total, abs=0.06)
    assert counted.params_active / 1e9 == pytest.approx(active, abs=0.06)


def test_check_takes_a_recipe_with_and_without_its_topology(capsys):
    path = CONFIGS / "llama3_8b.py"
    assert main(["check", f"--config={path}"]) == 0
    assert "8,030,261,248" in capsys.readouterr().out
    assert main(["check", f"--config={path}:v6e-256", "--devices=256"]) == 0
    assert "devices  256" in capsys.readouterr().out


def test_hardware_that_a_recipe_was_not_tuned_for_is_refused_by_name(capsys):
    with pytest.raises(RecipeError, match="not tuned for 'v4-8', but for v5p-128, "):
        recipe("llama3_8b").get_config("v4-8")
    assert main(["check", f"--config={CONFIGS / 'llama3_8b.py'}:v4-8"]) == 1
    assert "not tuned for 'v4-8', but for v5p-128" in capsys.readouterr().err
