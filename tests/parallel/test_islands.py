"""Islands: the lookup equals a plain one, gradients and strangers included, whatever the mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from maxlm.config import ParallelConfig
from maxlm.model.runtime import take
from maxlm.parallel.islands import island, sharded_lookup
from maxlm.parallel.mesh import make_mesh


@pytest.mark.parametrize("positions", [6, 5], ids=["scattered over tensor", "odd"])
@pytest.mark.parametrize("pieces", [False, True])
def test_lookup_equals_a_plain_one(positions, pieces):
    mesh = make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2))
    keys = jax.random.split(jax.random.key(0), 3)
    table, g = jax.random.normal(keys[0], (12, 4)), jax.random.normal(keys[1], (4, positions, 4))
    tokens = jax.random.randint(keys[2], (4, positions), 0, 12)
    how = {"scale": 1.5, "dtype": jnp.float32}

    def run(lookup):
        return jax.jit(lambda table: jax.vjp(lambda t: lookup(t, tokens, **how), table)[1](g)[0])(table)

    sharded = sharded_lookup(mesh, pieces=pieces)
    assert np.array_equal(jax.jit(functools.partial(sharded, **how))(table, tokens), take(table, tokens, **how))
    np.testing.assert_allclose(run(sharded), run(take), rtol=1e-6, atol=1e-6)
    strangers = tokens.at[0, 0].set(12).at[1, 1].set(-1)
    found = np.isnan(jax.jit(functools.partial(sharded, **how))(table, strangers)).any(-1)
    assert found[0, 0] and found[1, 1] and found.sum() == 2


def test_an_island_inside_a_manual_region_is_cut_along_the_other_axes():
    mesh = make_mesh(ParallelConfig(data=1, pipeline=2, fsdp=2, tensor=2))

    def inner(x):
        assert x.shape == (2, 1)  # (4, 2) over fsdp and tensor; pipeline was cut outside
        return x + jax.lax.axis_index("pipeline") * 10.0

    def outer(x):
        return island(inner, mesh, in_specs=P("fsdp", "tensor"), out_specs=P("fsdp", "tensor"))(x)

    run = jax.shard_map(
        outer, mesh=mesh, in_specs=P("pipeline"), out_specs=P("pipeline"), axis_names={"pipeline"}, check_vma=False
    )
    x = jnp.arange(16.0).reshape(8, 2)
    np.testing.assert_array_equal(jax.jit(run)(x), x + jnp.repeat(jnp.array([0.0, 10.0]), 4)[:, None])
