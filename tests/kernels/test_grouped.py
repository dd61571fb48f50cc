"""Every back end of the grouped product equals a sum over groups, gradients included; none pays for groups unused."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.kernels import grouped
from maxlm.kernels.grouped import BACKENDS, PLAIN, block_rows, blocks, grouped_product
from maxlm.model.flops import count_matmul_flops

D, F = 24, 40
INTERPRETED = grouped.megablox(interpret=True)
EVERY = [PLAIN, INTERPRETED, *(backend for backend in BACKENDS if backend.name != "megablox")]
SIZES = {
    "uneven": [3, 0, 17, 1, 9],
    "all in one": [0, 0, 30, 0, 0],
    "rows of no group": [2, 0, 5, 1, 0],
    "nothing": [0, 0, 0, 0, 0],
}


def case(sizes):
    draws, rows = np.random.default_rng(0), 30
    x, w, g = (draws.standard_normal(s, np.float32) for s in ((rows, D), (len(sizes), D, F), (rows, F)))
    return jnp.asarray(x), jnp.asarray(w), jnp.asarray(g), jnp.array(sizes, jnp.int32)


def one_hot(x, w, sizes):
    """(N, F) by a dense sum over all groups; zero for rows of none."""
    ends = np.cumsum(sizes)
    rows = np.arange(x.shape[0])
    own = (rows < ends[:, None]) & (rows >= (ends - sizes)[:, None])
    return jnp.einsum("en,nd,edf->nf", own.astype(np.float32), x, w)


@functools.partial(jax.jit, static_argnames=("backend", "dtype"))
def value_and_gradients(x, w, g, sizes, *, backend, dtype=jnp.float32):
    y, pull = jax.vjp(lambda x, w: grouped_product(x, w, sizes, backend=backend, dtype=dtype), x, w)
    return SimpleNamespace(y=y, gradients=pull(g.astype(y.dtype))).__dict__


@pytest.mark.parametrize("backend", EVERY, ids=lambda backend: backend.name)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_a_sum_over_one_hot_groups(backend, sizes):
    x, w, g, counts = case(sizes)
    used = sum(sizes)
    expected, pull = jax.vjp(lambda x, w: one_hot(x, w, np.array(sizes)), x, w)
    got = value_and_gradients(x, w, g, counts, backend=backend)
    dx, dw = got["gradients"]
    expected_dx, expected_dw = pull(g)
    # Float32 sums of a few dozen terms of order one, in another order.
    np.testing.assert_allclose(got["y"][:used], expected[:used], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx[:used], expected_dx[:used], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, expected_dw, rtol=1e-5, atol=1e-5)


def test_megablox_over_several_tiles(monkeypatch):
    """Groups that begin and end within a tile, dims that tiles do not divide, and gradients added up over tiles."""
    monkeypatch.setattr(grouped, "LARGEST_TILES", (128, 128, 128))
    rows, inner, outer, sizes = 300, 200, 130, np.array([0, 5, 180, 0, 100])
    draws = np.random.default_rng(1)
    shapes = (rows, inner), (len(sizes), inner, outer), (rows, outer)
    x, w, g = (jnp.asarray(draws.standard_normal(shape, np.float32)) for shape in shapes)
    expected, pull = jax.vjp(lambda x, w: one_hot(x, w, sizes), x, w)
    got = value_and_gradients(x, w, g, jnp.array(sizes, jnp.int32), backend=INTERPRETED)
    (dx, dw), (expected_dx, expected_dw), used = got["gradients"], pull(g), sizes.sum()
    # Float32 sums of up to 200 terms of order one, in another order.
    np.testing.assert_allclose(got["y"][:used], expected[:used], rtol=2e-5, atol=5e-5)
    np.testing.assert_allclose(dx[:used], expected_dx[:used], rtol=2e-5, atol=5e-5)
    np.testing.assert_allclose(dw, expected_dw, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("into_matrices", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dims", [(4096, 4096, 14336), (8192, 14336, 4096), (300, 200, 130), (512, 1408, 2048)])
def test_tiles_fit_the_memory_that_every_program_has(dims, itemsize, into_matrices):
    tiles = grouped.choose_tiles(*dims, itemsize=itemsize, into_matrices=into_matrices)
    assert grouped.vmem_bytes(tiles, itemsize=itemsize, into_matrices=into_matrices) <= 16 * 2**20
    assert all(tile % 128 == 0 and tile < dim + 128 for tile, dim in zip(tiles, dims, strict=True))
    # None could be twice as large: they are as large as they may be.
    for i, (tile, dim, most) in enumerate(zip(tiles, dims, grouped.LARGEST_TILES, strict=True)):
        larger = tiles._replace(**{tiles._fields[i]: 2 * tile})
        fits = grouped.vmem_bytes(larger, itemsize=itemsize, into_matrices=into_matrices) <= grouped.VMEM
        assert tile == most or tile >= dim or not fits or tile == max(tiles)


def test_the_memory_of_tiles_is_counted_as_what_the_kernels_hold():
    """By hand, in MiB, for the largest tiles: those of the products of rows fit in 16 bits, others do not."""
    largest = grouped.Tiles(*grouped.LARGEST_TILES)
    mib = {
        (itemsize, into): grouped.vmem_bytes(largest, itemsize=itemsize, into_matrices=into) / 2**20
        for itemsize in (2, 4)
        for into in (False, True)
    }
    # Two buffers each of x (512 x 1024), w (1024 x 1024) and y (512 x 1024); sums, and two copies of them.
    assert mib[2, False] == 2 * (1 + 2 + 1) + 2 + 4 <= 16
    assert mib[4, False] == 2 * (2 + 4 + 2) + 2 + 4 + 1.5 * (2 + 4) > 16  # and three 16-bit parts of float32 operands
    # Of x and g (512 x 1024 each) and the float32 matrix; sums, and float32 copies of x and g.
    assert mib[2, True] == 2 * (1 + 1 + 4) + 4 + 4 > 16
    assert mib[4, True] == 2 * (2 + 2 + 4) + 4 + 4 + 1.5 * (2 + 2) > 16


@pytest.mark.parametrize("backend", EVERY, ids=lambda backend: backend.name)
def test_bfloat16_operands_leave_a_float32_gradient(backend):
    x, w, g, counts = case(SIZES["uneven"])
    got = value_and_gradients(x, w, g, counts, backend=backend, dtype=jnp.bfloat16)
    dw = got["gradients"][1]
    assert got["y"].dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    assert np.any(np.asarray(dw) != np.asarray(dw.astype(jnp.bfloat16).astype(jnp.float32)))
    expected = value_and_gradients(x, w, g, counts, backend=PLAIN)
    np.testing.assert_allclose(got["y"].astype(np.float32), expected["y"], atol=0.2)  # 2^-8 of sums of 24 products


def test_a_nan_row_stays_by_itself():
    x, w, _, counts = case(SIZES["uneven"])
    poisoned = x.at[4].set(jnp.nan)
    for backend in EVERY:
        y, clean = (grouped_product(z, w, counts, backend=backend, dtype=jnp.float32) for z in (poisoned, x))
        assert np.isnan(y[4]).all()
        np.testing.assert_array_equal(np.delete(y, 4, axis=0), np.delete(clean, 4, axis=0))


@pytest.mark.parametrize("backend", EVERY, ids=lambda backend: backend.name)
def test_rows_of_no_group_may_hold_anything(backend):
    """As memory that nothing was written to does, behind an exchange of experts."""
    x, w, g, counts = case(SIZES["rows of no group"])
    used = sum(SIZES["rows of no group"])
    clean, got = (
        value_and_gradients(x.at[used:].set(rest), w, g.at[used:].set(rest), counts, backend=backend)
        for rest in (0.0, jnp.nan)
    )
    np.testing.assert_array_equal(got["y"][:used], clean["y"][:used])
    np.testing.assert_array_equal(got["gradients"][0][:used], clean["gradients"][0][:used])
    np.testing.assert_array_equal(got["gradients"][1], clean["gradients"][1])


def test_platforms_choose():
    chosen = [grouped.choose(platform, jnp.bfloat16).name for platform in ("tpu", "cpu", "gpu")]
    assert chosen == ["megablox", "blocked", "ragged"]


def test_what_a_kernel_cannot_multiply_another_does():
    """Megablox refuses float16 while it is traced."""
    kernel = next(backend for backend in EVERY if backend.name == "megablox")
    x, w, g, counts = case(SIZES["uneven"])
    with pytest.raises(Exception, match="float16"):
        value_and_gradients(x, w, g, counts, backend=kernel, dtype=jnp.float16)
    assert grouped.choose("tpu", jnp.float16).name == "ragged"


def _active_model(groups, rows=2048, width=48, hidden=64):
    """The compiled gradient of a product, and its program."""
    x, w = jax.ShapeDtypeStruct((rows, width), jnp.float32), jax.ShapeDtypeStruct((groups, width, hidden), jnp.float32)
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)

    def total(x, w, sizes):
        return jnp.sum(
            jnp.square(grouped_product(x, w, sizes, backend=grouped.choose("cpu", "float32"), dtype=jnp.float32))
        )

    gradient = jax.grad(total, argnums=(0, 1))
    return gradient, jax.jit(gradient).lower(x, w, sizes).compile(), jax.make_jaxpr(gradient)(x, w, sizes)


def test_neither_flops_nor_temporaries_grow_with_the_number_of_groups():
    """At 2,048 rows; `lax.ragged_dot` on CPU took 16 times both from 4 groups to 64."""
    rows, width, hidden = 2048, 48, 64
    temporaries = {}
    for groups in (4, 64):
        _, compiled, program = _active_model(groups)
        temporaries[groups] = compiled.memory_analysis().temp_size_in_bytes
        assert count_matmul_flops(program) == 3 * 2 * rows * width * hidden
        # What the loops really multiply: their trips are these.
        block = block_rows(rows, groups)
        for skew in (0.0, 1.0, 3.0):
            share = np.random.default_rng(0).dirichlet(np.full(groups, 1.0)) ** skew
            sizes = np.random.default_rng(1).multinomial(rows, share / share.sum())
            multiplied = int(np.sum(np.asarray(blocks(sizes, block)))) * block
            assert rows <= multiplied <= 1.125 * rows
    matrices = 4 * width * hidden * (64 - 4)
    # The weight gradient, and at most one more copy of the matrices in the layout that a product likes.
    assert temporaries[64] - temporaries[4] <= 2 * matrices
    assert temporaries[4] > rows * hidden * 4  # the measure is alive


def test_the_ledger_counts_grouped_products_by_their_rows():
    """By the convention of `count_matmul_flops`, and by the products inside the plain back end: alike."""
    x, w, _, counts = case(SIZES["uneven"])
    inside = jax.make_jaxpr(PLAIN.rows)(x, w, counts)
    outside = jax.make_jaxpr(functools.partial(grouped_product, backend=PLAIN, dtype=jnp.float32))(x, w, counts)
    assert count_matmul_flops(inside) == count_matmul_flops(outside) == 2 * 30 * D * F
