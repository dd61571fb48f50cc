"""What the compiled step must not do, read off its program: gather logits, or the weights of all layers at once."""

import re

import jax
import pytest

from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train.setup import make_setup
from tests.tiny import tiny_config

LAYERS, VOCAB, ROWS, POSITIONS = 7, 264, 8, 64  # no other dim of the tiny model is 7 or 264


def program(tmp_path, **leaves):
    """The optimised program of a step, as text."""
    config = tiny_config(tmp_path, model__num_layers=LAYERS, train__loss_chunk=128, **leaves)
    config = resolve(config, devices=8)
    return make_setup(config, make_mesh(config.parallel)).compile(ROWS, POSITIONS).as_text()


def gathered(text):
    """The shapes that all-gathers of the program make."""
    lines = [line for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    return [
        tuple(int(d) for d in m.split(",") if d)
        for line in lines
        for m in re.findall(r"[a-z]\d+\[([\d,]*)\]", line.split(" all-gather")[0])
    ]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return program(tmp_path_factory.mktemp("hlo"), parallel__data=1, parallel__fsdp=4, parallel__tensor=2)


def test_weights_are_gathered_a_layer_at_a_time(sharded):
    shapes = gathered(sharded)
    assert shapes  # fsdp does gather
    assert not [shape for shape in shapes if LAYERS in shape]


def test_logits_and_the_vocabulary_are_never_gathered(sharded):
    assert not [shape for shape in gathered(sharded) if VOCAB in shape]
    whole = re.findall(rf"f32\[(?:\d+,)*{VOCAB}\]", sharded)
    assert not whole, "an array holds the whole vocabulary on one device"


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
