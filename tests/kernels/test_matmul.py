"""Products in the compute dtype: values, gradients, their dtypes, and the dtypes that the program multiplies in."""

import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from maxlm.kernels.matmul import SAVED_NAME, einsum

SIZES = dict(b=2, s=3, d=8, h=2, k=4, f=5, v=7)
SPECS = ("bsd,dhk->bshk", "bshk,hkd->bsd", "bsd,df->bsf", "bsf,fd->bsd", "bsd,dv->bsv", "bshk,bvhk->bhsv")


def operands(spec, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    terms = re.split(",|->", spec)
    return [jax.random.normal(key, [SIZES[c] for c in term]) for key, term in zip(keys, terms, strict=True)]


@settings(max_examples=20, deadline=None)
@given(spec=st.sampled_from(SPECS), dtype=st.sampled_from(["float32", "bfloat16", "float16"]), seed=st.integers(0, 99))
def test_value_and_gradients(spec, dtype, seed):
    x, w, g = operands(spec, seed)
    out, pull = jax.vjp(lambda x, w: einsum(spec, x, w, dtype=dtype), x, w)
    assert out.dtype == dtype
    x, w, g = (a.astype(dtype).astype(jnp.float32) for a in (x, w, g))
    want, want_pull = jax.vjp(lambda x, w: jnp.einsum(spec, x, w), x, w)
    # Operands are rounded above exactly as the product rounds them, so only results in `dtype` are rounded: once.
    rounding = dict(rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-5)
    np.testing.assert_allclose(out.astype(jnp.float32), want, **rounding)
    dx, dw = pull(g.astype(dtype))
    want_dx, want_dw = want_pull(g)
    assert dx.dtype == dw.dtype == jnp.float32
    np.testing.assert_allclose(dx, want_dx, **rounding)
    np.testing.assert_allclose(dw, want_dw, rtol=1e-5, atol=1e-5)  # never rounded


def test_every_product_multiplies_bfloat16_into_float32():
    x, w, _ = operands(SPECS[0])
    loss = lambda x, w: jnp.sum(einsum(SPECS[0], x, w, dtype="bfloat16").astype(jnp.float32) ** 2)  # noqa: E731
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x.astype(jnp.bfloat16), w).as_text()
    signatures = re.findall(
        r"dot_general .*: \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\) -> tensor<[^>]*x(\w+)>", text
    )
    assert len(signatures) == 3
    assert set(signatures) == {("bf16", "bf16", "f32")}


def test_under_vmap_scan_and_remat():
    x, _, _ = operands("bsd,df->bsf")
    w = jax.random.normal(jax.random.key(1), (3, 8, 8))

    def loss(wrap, w):
        body = wrap(lambda x, w: jnp.tanh(einsum("bsd,de->bse", x, w, dtype="float32")))
        return jnp.sum(jax.lax.scan(lambda x, w: (body(x, w), None), x, w)[0])

    want = jax.grad(lambda w: loss(lambda f: f, w))(w)
    for policy in (None, jax.checkpoint_policies.save_only_these_names(SAVED_NAME)):
        got = jax.grad(lambda w: loss(lambda f: jax.checkpoint(f, policy=policy), w))(w)  # noqa: B023
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    stacked = jax.vmap(lambda w: einsum("bsd,de->bse", x, w, dtype="float32"))(w)
    np.testing.assert_allclose(stacked[2], x @ w[2], rtol=1e-5, atol=1e-5)


def test_on_a_mesh_equals_one_device():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda a, *axes: jax.device_put(a, jax.NamedSharding(mesh, jax.P(*axes)))  # noqa: E731
    x, w, _ = operands("bsd,dhk->bshk")
    step = jax.jit(jax.grad(lambda x, w: jnp.sum(einsum("bsd,dhk->bshk", x, w, dtype="float32") ** 2), argnums=(0, 1)))
    for got, want in zip(step(place(x, "fsdp"), place(w, "fsdp", None, "tensor")), step(x, w), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["bsd,df->bf", "bss,sf->bf", "bsd,dfe->bsf"])
def test_refuses_what_has_no_einsum_gradient(spec):
    sizes = {c: 4 for c in "bsdfe"}
    terms = re.split(",|->", spec)[:2]
    with pytest.raises(ValueError, match=re.escape(spec)):
        einsum(spec, *(jnp.ones([sizes[c] for c in t]) for t in terms), dtype="float32")
