"""The goldens of recipes: what their steps send, hold and compute is what was kept, and a planted collective shows."""

import importlib.metadata
import re

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.parallel.mesh import make_mesh
from maxlm.plan import golden
from maxlm.resolve import resolve
from tools import update_goldens

QUICK = ("llama3_8b",)  # five seconds; the others take as long each, and more with experts


def kept(name):
    path = update_goldens.GOLDENS / name
    assert path.exists(), f"there is no {name}; type python tools/update_goldens.py"
    return path.read_text()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in update_goldens.recipes()],
)
def test_the_small_relative_of_a_recipe_is_as_it_was(name):
    changed = golden.differences(kept(f"{name}.cpu.txt"), update_goldens.small_page(name))
    assert not changed, f"if this is meant, type python tools/update_goldens.py {name}\n{changed}"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(update_goldens.GOLDENS.glob("*.txt")), ids=lambda path: path.stem)
def test_a_recipe_compiled_for_its_hardware_is_as_it_was(path):
    if path.stem.endswith(".cpu"):
        pytest.skip("compared above")
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("libtpu is not installed; type pip install -e '.[plan]'")
    changed = golden.differences(path.read_text(), update_goldens.whole_page(path.stem, cache=None))
    assert not changed, f"if this is meant, type python tools/update_goldens.py {path.stem}\n{changed}"


def test_a_planted_all_gather_shows():
    """A stream that comes together on every device once a layer, where it is otherwise spread."""

    def planted(constrain, x, logical):
        if logical == ("batch", "seq", "mlp"):
            x = jax.lax.with_sharding_constraint(x, NamedSharding(make_mesh(config.parallel), PartitionSpec()))
        return constrain(x, logical)

    config = golden.small(resolve(update_goldens.load("llama3_8b").get_config()))
    setup = golden.small_setup(config, constrain=planted)
    page = update_goldens.page_of("llama3_8b", setup)
    changed = golden.differences(kept("llama3_8b.cpu.txt"), page)
    assert re.search(r"^\+all-gather over ", changed, re.MULTILINE), changed


def test_reduced_configs_keep_what_makes_a_recipe_special():
    for name in update_goldens.recipes():
        config = resolve(update_goldens.load(name).get_config())
        shallow, small = golden.shallow(config), golden.small(config)
        assert shallow.model.embed_dim == config.model.embed_dim and shallow.parallel == config.parallel
        for axis, size in config.parallel.sizes.items():
            assert (small.parallel.sizes[axis] > 1) == (size > 1), (name, axis)
        for which in (shallow.model, small.model):
            assert bool(which.moe.experts) == bool(config.model.moe.experts)
            assert bool(which.moe.dense_layers) == bool(config.model.moe.dense_layers)
            assert len(which.attention.windows) == len(config.model.attention.windows)
            assert bool(which.attention.latent.kv_dim) == bool(config.model.attention.latent.kv_dim)
