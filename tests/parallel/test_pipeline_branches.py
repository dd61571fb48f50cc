"""Permutes in what only some stages do are seen before a program is run, which would hang."""

import dataclasses

import jax
import pytest

from maxlm.config import ParallelConfig
from maxlm.parallel.context import context_attention
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.pipeline.branches import refuse_permutes_in_branches
from maxlm.resolve import resolve
from maxlm.train.setup import make_runtime, make_setup
from tests.tiny import tiny_config


def text_of(inside: bool) -> str:
    """A program that permutes between two devices, on one of them alone or on both."""

    def permuted(x):
        return jax.lax.ppermute(x, "pipeline", [(0, 1), (1, 0)])

    def program(x):
        first = jax.lax.axis_index("pipeline") == 0
        y = x if inside else permuted(x)
        return jax.lax.cond(first, permuted if inside else lambda x: x * 2, lambda x: x + 1, y)

    mesh = make_mesh(ParallelConfig(data=1, pipeline=2), jax.devices()[:2])
    spec = jax.sharding.PartitionSpec("pipeline")
    mapped = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return mapped.lower(jax.ShapeDtypeStruct((2, 4), "float32")).compile().as_text()


def test_a_permute_in_a_branch_is_refused_and_one_outside_is_not():
    with pytest.raises(RuntimeError, match="a branch of the program permutes"):
        refuse_permutes_in_branches(text_of(inside=True))
    outside = text_of(inside=False)
    assert " collective-permute" in outside and " conditional(" in outside
    refuse_permutes_in_branches(outside)


def test_a_branch_that_all_devices_take_together_may_permute():
    """As the norms that are worked out every so many steps might."""
    mesh = make_mesh(ParallelConfig(data=1, pipeline=2), jax.devices()[:2])
    spec = jax.sharding.PartitionSpec("pipeline")

    def permuted(x):
        def swap(x):
            return jax.lax.ppermute(x, "pipeline", [(0, 1), (1, 0)])

        return jax.shard_map(swap, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)

    program = jax.jit(lambda now, x: jax.lax.cond(now, permuted, lambda x: x + 1, x))
    given = jax.ShapeDtypeStruct((2, 4), "float32", sharding=jax.sharding.NamedSharding(mesh, spec))
    text = program.lower(True, given).compile().as_text()
    assert " collective-permute" in text and " conditional(" in text
    refuse_permutes_in_branches(text)


@pytest.mark.slow
def test_a_step_that_would_hang_is_not_handed_out():
    """Ring attention on the stages of a pipeline, which resolve refuses, brought in past it."""
    parallel = ParallelConfig(data=1, pipeline=2, context=2, pipeline_schedule="gpipe")
    config = resolve(tiny_config("unused", parallel=parallel, train__accumulation=2, train__norms_every=0), devices=4)
    mesh = make_mesh(config.parallel, jax.devices()[:4])
    runtime, _ = make_runtime(config, mesh, segments=True)
    ring = dataclasses.replace(runtime, attend=context_attention(mesh, method="ring", together=False))
    with pytest.raises(RuntimeError, match="a branch of the program permutes"):
        make_setup(config, mesh, runtime=ring).compile(config.data.batch_size, config.data.sequence_length)
