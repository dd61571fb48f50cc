"""The chunked loss is the plain one: value, gradients, and what exists while it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.jaxpr import subprograms
from maxlm.kernels.cross_entropy import Device, Settings, local_gradients
from maxlm.model.flops import count_matmul_flops
from maxlm.model.loss import chunked_cross_entropy, token_nll


def _naive(hidden, head, targets, *, softcap):
    logits = jnp.einsum("bsd,dv->bsv", hidden, head)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return nll, jax.nn.logsumexp(logits, axis=-1)


def _inputs(batch, sequence, *, dim=7, vocab=19, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (batch, sequence, dim)).astype(dtype)
    targets = jax.random.randint(keys[2], (batch, sequence), 0, vocab)
    weights = jax.random.bernoulli(keys[3], 0.7, (batch, sequence)).astype(jnp.float32)
    return hidden, jax.random.normal(keys[1], (dim, vocab)), targets, weights


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 4),
    sequence=st.integers(1, 13),
    chunk=st.integers(1, 60),
    softcap=st.sampled_from([0.0, 2.5]),
    z_loss=st.sampled_from([0.0, 0.3]),
)
def test_whatever_the_shape_it_is_the_naive_loss(batch, sequence, chunk, softcap, z_loss):
    check_against_naive(batch, sequence, chunk, softcap, z_loss)


@pytest.mark.parametrize(
    ("batch", "sequence", "chunk", "softcap", "z_loss"),
    [(3, 13, 10, 2.5, 0.3), (2, 8, 60, 0.0, 0.0)],
    ids=["ragged chunks, all terms", "one chunk, plain"],
)
def test_value_and_gradients_equal_the_naive_loss(batch, sequence, chunk, softcap, z_loss):
    check_against_naive(batch, sequence, chunk, softcap, z_loss)


def check_against_naive(batch, sequence, chunk, softcap, z_loss):
    hidden, head, targets, weights = _inputs(batch, sequence)

    def chunked(hidden, head):
        out = chunked_cross_entropy(hidden, head, targets, weights, chunk=chunk, softcap=softcap, z_loss=z_loss)
        return (out.nll_sum + z_loss * out.z_sum) * 0.37, out

    def naive(hidden, head):
        nll, log_normaliser = _naive(hidden, head, targets, softcap=softcap)
        sums = jnp.sum(weights * nll), jnp.sum(weights * log_normaliser**2)
        return (sums[0] + z_loss * sums[1]) * 0.37, sums

    @jax.jit  # in one program, since nearly all the time goes into compiling
    def everything(hidden, head):
        nll = token_nll(hidden, head, targets, chunk=chunk, softcap=softcap)
        grads = [jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(hidden, head) for f in (chunked, naive)]
        return grads, chunked(hidden, head)[1], (nll, _naive(hidden, head, targets, softcap=softcap)[0])

    (((_, out), got), ((_, sums), expected)), plain, nlls = everything(hidden, head)
    # Float32 sums of at most 60 positions in another order.
    np.testing.assert_allclose(out, sums, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(plain, sums, rtol=2e-5, atol=1e-5)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(*nlls, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("softcap", [0.0, 2.5])
def test_what_cpus_do_otherwise_gives_the_same(parts, softcap):
    """Also of parts of a vocabulary, where most targets are another device's: before its first id or after its last."""
    hidden, head, targets, weights = _inputs(3, 13, vocab=20)
    local = local_gradients(Settings(chunk=10, softcap=softcap, z_loss=0.3))

    def run(cpu):
        def part(head):
            return local(hidden, head, targets, weights, Device(("tensor",) if parts > 1 else (), cpu))

        if parts == 1:
            return part(head)
        return jax.vmap(part, in_axes=2, axis_name="tensor")(head.reshape(7, parts, -1))

    for got, want in zip(jax.tree.leaves(run(True)), jax.tree.leaves(run(False)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def _grad(z_weight, *, z_loss, dtype=jnp.float32):
    hidden, head, targets, weights = _inputs(2, 6, dtype=dtype)

    def total(hidden, head):
        out = chunked_cross_entropy(hidden, head, targets, weights, chunk=4, softcap=0.0, z_loss=z_loss)
        return out.nll_sum + z_weight * out.z_sum

    return jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, head)


def test_another_combination_of_the_terms_gets_nan_rather_than_a_wrong_gradient():
    assert np.isnan(_grad(0.0, z_loss=0.1)[1]).all()
    assert np.isnan(_grad(0.1, z_loss=0.0)[1]).all()
    assert np.isfinite(_grad(0.1, z_loss=0.1)[1]).all()


def test_gradients_come_in_the_dtypes_that_are_promised():
    hidden, head = _grad(0.0, z_loss=0.0, dtype=jnp.bfloat16)
    assert hidden.dtype == jnp.bfloat16 and head.dtype == jnp.float32
    exact_hidden, exact_head = _grad(0.0, z_loss=0.0)
    # Operands rounded to eight bits, sums in float32: a few times 2^-9 of the largest entry.
    scale = np.abs(exact_head).max()
    np.testing.assert_allclose(head, exact_head, atol=0.02 * scale)
    np.testing.assert_allclose(hidden.astype(np.float32), exact_hidden, atol=0.05 * np.abs(exact_hidden).max())


def _program(*, differentiate):
    hidden, head, targets, weights = _inputs(2, 64, dim=8, vocab=128)

    def total(hidden, head):
        return chunked_cross_entropy(hidden, head, targets, weights, chunk=16, softcap=0.0, z_loss=0.0).nll_sum

    return jax.make_jaxpr(jax.grad(total, argnums=(0, 1)) if differentiate else total)(hidden, head)


def _largest(jaxpr):
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    inner = [_largest(program) for equation in jaxpr.eqns for program in subprograms(equation.params)]
    return max(sizes + inner, default=0)


@pytest.mark.parametrize("differentiate, products", [(False, 1), (True, 3)])
def test_one_product_without_and_three_with_gradients_and_never_all_logits(differentiate, products):
    program = _program(differentiate=differentiate)
    positions, dim, vocab, chunk = 128, 8, 128, 16
    assert count_matmul_flops(program) == products * 2 * positions * dim * vocab
    assert _largest(program.jaxpr) == chunk * vocab  # of the 128 x 128 logits, a chunk's alone
