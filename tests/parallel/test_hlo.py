"""What the compiled step must not do, read off its program: gather logits, or the weights of all layers at once."""

import re

import jax
import pytest

from maxlm.config import MoeConfig, ParallelConfig
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train.setup import make_setup
from tests.tiny import tiny_config

# No other dim of the tiny model is 7 or 264; two stages hold 7 layers each.
LAYERS, VOCAB, ROWS, POSITIONS = 7, 264, 8, 64
EXPERTS = MoeConfig(experts=8, active=2, dim=16)
MESHES = {
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "context 2, fsdp 2, tensor 2": {"context": 2, "fsdp": 2, "tensor": 2},
    "expert 2, fsdp 2, tensor 2": {"expert": 2, "fsdp": 2, "tensor": 2},
    "pipeline 2, fsdp 2, tensor 2": {"pipeline": 2, "fsdp": 2, "tensor": 2},
}
DEFAULT = ("fsdp 4, tensor 2",)


def program(*, layers=LAYERS, **sizes):
    """The optimised program of a step, as text."""
    stages = sizes.get("pipeline", 1)
    config = tiny_config(
        "unused",
        model__num_layers=layers * stages,
        model__moe=EXPERTS if "expert" in sizes else MoeConfig(),
        train__loss_chunk=128,
        train__accumulation=stages,
        parallel=ParallelConfig(data=1, **sizes),
    )
    config = resolve(config, devices=8)
    return make_setup(config, make_mesh(config.parallel)).compile(ROWS, POSITIONS).compiled.as_text()


def gathered(text):
    """The shapes that all-gathers of the program make."""
    lines = [line for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    return [
        tuple(int(d) for d in m.split(",") if d)
        for line in lines
        for m in re.findall(r"[a-z]\d+\[([\d,]*)\]", line.split(" all-gather")[0])
    ]


@pytest.fixture(scope="module", params=[pytest.param(m, marks=[pytest.mark.slow] * (m not in DEFAULT)) for m in MESHES])
def sharded(request):
    return program(**MESHES[request.param])


def test_weights_are_gathered_a_layer_at_a_time(sharded):
    shapes = gathered(sharded)
    assert shapes  # fsdp does gather
    # A number a layer, as the norms have, is no weight.
    assert not [shape for shape in shapes if len(shape) > 1 and {LAYERS, 2 * LAYERS} & set(shape)]


def test_logits_and_the_vocabulary_are_never_gathered(sharded):
    assert not [shape for shape in gathered(sharded) if VOCAB in shape]
    whole = re.findall(rf"f32\[(?:\d+,)*{VOCAB}\]", sharded)
    assert not whole, "an array holds the whole vocabulary on one device"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp 4, tensor 2", "expert 2, fsdp 2, tensor 2"])
def test_64_layers_take_no_more_instructions_than_8(mesh):
    shallow, deep = (
        len(re.findall(r"^\s+(?:ROOT )?%?\S+ = ", program(layers=layers, **MESHES[mesh]), re.MULTILINE))
        for layers in (8, 64)
    )
    assert abs(deep - shallow) <= 0.02 * shallow


def test_the_search_finds_what_it_looks_for(tmp_path):
    config = resolve(
        tiny_config(tmp_path, model__num_layers=LAYERS, parallel__data=1, parallel__fsdp=4, parallel__tensor=2),
        devices=8,
    )
    setup = make_setup(config, make_mesh(config.parallel))
    params = setup.abstract_state().params
    whole = jax.sharding.NamedSharding(setup.mesh, jax.sharding.PartitionSpec())
    text = jax.jit(lambda p: p, out_shardings=whole).lower(params).compile().as_text()
    assert [shape for shape in gathered(text) if LAYERS in shape]
    assert [shape for shape in gathered(text) if VOCAB in shape]
