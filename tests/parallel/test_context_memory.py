"""What docs/parallelism.md says of memory at 32,768 positions over 8 devices, as compiled; nothing of it is run."""

import jax
import jax.numpy as jnp
import pytest

from maxlm.config import ParallelConfig
from maxlm.kernels import chunked
from maxlm.kernels.attention import Mask
from maxlm.parallel.context import context_attention
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import named_sharding
from maxlm.resolve import resolve
from maxlm.train.setup import make_setup
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow
POSITIONS, HEADS, DIM = 32_768, 16, 64


def temporaries(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("kv_heads", "arrays"), [(16, 12), (4, 7)])
def test_a_ring_holds_few_arrays_of_a_shards_queries_besides_blocks(kv_heads, arrays):
    """12 with as many key heads as query heads, and fewer with fewer; the scores of 12 blocks are allowed besides."""
    mesh = make_mesh(ParallelConfig(data=1, context=8))

    def array(heads, axis):
        sharding = named_sharding(mesh, ("batch", "seq", axis, None))
        return jax.ShapeDtypeStruct((1, POSITIONS, heads, DIM), jnp.float32, sharding=sharding)

    attend = context_attention(mesh, method="ring", together=False)

    def both(q, k, v, g):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, Mask(scale=1.0)), q, k, v)
        return out, *pull(g)

    q, k = array(HEADS, "q_heads"), array(kv_heads, "kv_heads")
    compiled = jax.jit(both).lower(q, k, k, q).compile()
    queries = POSITIONS // 8 * HEADS * DIM * 4
    block = 4 * chunked.BLOCK * chunked.BLOCK  # scores of one head
    print(f"{kv_heads} key heads: {temporaries(compiled) / queries:.2f} times a shard's queries")
    assert temporaries(compiled) <= arrays * queries + 12 * block


@pytest.mark.parametrize("remat", ["none", "matmuls", "full"])
def test_a_step_over_eight_devices_takes_less_than_a_quarter_of_ones(remat):
    def step(context: int):
        config = tiny_config(
            "unused",
            parallel=ParallelConfig(data=1, context=context),
            model__num_layers=4,
            data__sequence_length=POSITIONS,
            data__batch_size=1,
            eval__batch_size=1,
            train__remat=remat,
            train__norms_every=0,
        )
        config = resolve(config, devices=context)
        setup = make_setup(config, make_mesh(config.parallel, jax.devices()[:context]))
        return setup.attention, temporaries(setup.compile(1, POSITIONS).compiled)

    (alone, one), (ring, eight) = step(1), step(8)
    assert (alone, ring) == ("chunked_loop", "chunked ring")  # the same products of blocks
    print(f"remat {remat}: {eight / one:.3f} of one device's temporaries")
    assert eight < 0.25 * one
