"""The sharding table and the mesh."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from maxlm.config import MESH_AXES, Config, DataConfig, ParallelConfig, StoreConfig
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import RULES, ShardingError, named_sharding, partition, settled
from maxlm.resolve import resolve


def test_rows_of_the_table():
    assert partition(("layers", "embed", "q_heads", "head_dim")) == P("pipeline", "fsdp", "tensor", None)
    assert partition(("batch", "seq", None)) == P(("data", "fsdp", "expert"), "context", None)
    assert partition(()) == P()


def test_a_mesh_axis_used_twice_names_both():
    with pytest.raises(ShardingError, match=r"'vocab' and 'mlp' .* both want the mesh axis 'tensor'"):
        partition(("vocab", "mlp"))
    with pytest.raises(ShardingError, match="'batch' and 'embed'"):
        partition(("batch", "embed"))


def test_unknown_logical_axis():
    with pytest.raises(ShardingError, match="'heads' is not in the sharding table"):
        partition(("heads",))


def test_every_rule_names_mesh_axes():
    assert {axis for axes in RULES.values() for axis in axes} <= set(MESH_AXES)


def test_mesh_has_all_axes_and_the_sizes_asked_for():
    config = Config(data=DataConfig(stores={"a": StoreConfig()}), parallel=ParallelConfig(fsdp=2, tensor=2))
    mesh = make_mesh(resolve(config, devices=8).parallel)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "pipeline": 1, "context": 1, "expert": 1, "tensor": 2}
    placed = jax.device_put(jax.numpy.zeros((8, 4)), named_sharding(mesh, ("embed", "mlp")))
    assert placed.addressable_shards[0].data.shape == (4, 2)


def test_in_a_pipeline_nothing_is_laid_out_so_that_xla_would_permute_it():
    sizes = dict.fromkeys(MESH_AXES, 2)
    alone = sizes | {"pipeline": 1}
    for logical in (("batch", "residual", None), ("staged", "latent_out")):
        assert settled((8, 8, 8)[: len(logical)], logical, alone) == logical
    assert settled((8, 8, 8), ("batch", "residual", None), sizes) == ("batch", "seq", None)
    assert settled((8, 8), ("staged", "latent_out"), sizes) == (None, "latent_out")
