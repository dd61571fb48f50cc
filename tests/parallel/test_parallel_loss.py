"""The loss over a mesh is that of one device: sums, gradients and the loss of every token, softly capped or not."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maxlm.parallel.loss
from maxlm.config import ParallelConfig
from maxlm.kernels.cross_entropy import alone
from maxlm.model.loss import chunked_cross_entropy, token_nll
from maxlm.parallel.loss import sharded_loss
from maxlm.parallel.mesh import make_mesh

VOCAB, DIM, ROWS, POSITIONS = 24, 8, 8, 12


def operands(vocab=VOCAB):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (ROWS, POSITIONS, DIM))
    head = jax.random.normal(keys[1], (DIM, vocab))
    targets = jax.random.randint(keys[2], (ROWS, POSITIONS), 0, vocab)
    return hidden, head, targets, jax.random.bernoulli(keys[3], 0.7, (ROWS, POSITIONS)).astype(jnp.float32)


def everything(spread):
    """(sums, gradients, nll of every token) as one compiled function."""

    @jax.jit
    def run(hidden, head, targets, weights):
        how = {"chunk": 5, "softcap": 2.5, "spread": spread}

        def total(hidden, head):
            out = chunked_cross_entropy(hidden, head, targets, weights, z_loss=0.3, **how)
            return out.nll_sum + 0.3 * out.z_sum, out

        grads, out = jax.grad(total, argnums=(0, 1), has_aux=True)(hidden, head)
        return out, grads, token_nll(hidden, head, targets, **how)

    return run


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2, "data": 1}], ids=str)
def test_over_a_mesh_nothing_changes(sizes):
    run = everything(sharded_loss(make_mesh(ParallelConfig(**sizes))))
    expected = everything(alone)(*operands())
    for got, want in zip(jax.tree.leaves(run(*operands())), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)  # float32 sums in another order


def test_a_large_gradient_of_the_head_crosses_the_mesh_in_pieces(monkeypatch):
    """768 bytes in five pieces of 4 and 6 columns, half by half, so that no second copy of the whole is ever there."""
    monkeypatch.setattr(maxlm.parallel.loss, "PIECE", 160)
    run = everything(sharded_loss(make_mesh(ParallelConfig(data=2, fsdp=4)))).lower(*operands()).compile()
    for got, want in zip(
        jax.tree.leaves(run(*operands())), jax.tree.leaves(everything(alone)(*operands())), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)
    sent = re.findall(rf"f32\[2,{DIM // 4},(\d+)\]\S* reduce-scatter", run.as_text())
    assert sorted(map(int, sent)) == [2, 2, 2, 3, 3]


def test_the_gradient_of_an_odd_head_is_scattered_as_it_is():
    mesh = make_mesh(ParallelConfig(data=2, fsdp=4))
    given = operands(vocab=VOCAB - 1)
    run = everything(sharded_loss(mesh)).lower(*given).compile()
    for got, want in zip(jax.tree.leaves(run(*given)), jax.tree.leaves(everything(alone)(*given)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)


def test_the_gradient_of_the_head_crosses_the_mesh_once_and_in_no_loop():
    mesh = make_mesh(ParallelConfig(data=2, fsdp=4))
    spread = functools.partial(sharded_loss(mesh))
    text = everything(spread).lower(*operands()).compile().as_text()
    sent = [line for line in text.splitlines() if " all-reduce(" in line or " reduce-scatter(" in line]
    shapes = (f"f32[{DIM},{VOCAB}]", f"f32[{DIM // 4},{VOCAB}]", f"f32[2,{DIM // 4},{VOCAB // 2}]")
    whole = [line for line in sent if any(shape in line for shape in shapes)]
    assert len(whole) == 2  # scattered over fsdp, summed over data
    assert not [line for line in whole if "/while/body" in line]
