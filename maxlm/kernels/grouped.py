"""Products of rows by the matrix of their group, behind one table of back ends: the experts' matrix products.

Shapes: N rows, D in, F out, E groups. Rows are sorted by group: the first sizes[0] belong to group 0, and so on; rows
after the last group belong to none.

`megablox` and `blocked` spend neither FLOPs nor memory on the number of groups, beyond the matrices themselves. `plain`
does, and so does `ragged`: its weight gradient becomes dense products of all rows for every group, on GPUs too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.kernels.matmul import dot, exactly, precision_of

LARGEST_BLOCK = 128

RowsFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation. Operands come in the compute dtype; sums and results are float32, megablox's rows excepted.

    rows: (x (N, D), w (E, D, F), sizes (E,)) -> (N, F); rows of no group come out undefined.
    rows_transposed: (g (N, F), w (E, D, F), sizes) -> (N, D), likewise.
    outer: (x (N, D), g (N, F), sizes) -> (E, D, F), the sums over each group's rows; zero for an empty group.
    platforms: of jax.Device.platform; empty: any.
    dtypes: of the operands; empty: any.
    """

    name: str
    rows: RowsFn
    rows_transposed: RowsFn
    outer: RowsFn
    platforms: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()


class Cut(NamedTuple):
    """How matrices (E, D, F) are cut of which a device holds a part: dim `dim` of each along the mesh axis `axis`.

    reduce_dtype: in which their gradients are added up over that axis.
    """

    axis: str
    dim: int
    reduce_dtype: Any = jnp.dtype(jnp.float32)


def grouped_product(
    x: jax.Array, w: jax.Array, sizes: jax.Array, *, backend: Backend, dtype: Any, cut: Cut | None = None
) -> jax.Array:
    """(N, D) by (E, D, F) -> (N, F) in `dtype`, each row by its group's matrix; rows of no group come out undefined.

    Operands are cast to `dtype` and sums are float32, in the gradients as well, which come back in the dtypes in which
    x and w came: a float32 master weight gets a gradient that was never rounded, unless `cut.reduce_dtype` is narrower.

    Args:
      cut: of `w`, whose other parts are gathered in `dtype`, for the forward pass and again for the backward pass:
        what is kept in between is the device's part.
    """
    return _product(backend, jnp.dtype(dtype), cut, x.astype(dtype), w, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(backend: Backend, dtype: Any, cut: Cut | None, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return grouped_rows(x, _whole(w.astype(dtype), cut), sizes, backend=backend, transposed=False)


def _forward(backend: Backend, dtype: Any, cut: Cut | None, x: jax.Array, w: jax.Array, sizes: jax.Array) -> Any:
    return _product(backend, dtype, cut, x, w, sizes), (x, w, sizes)


def _backward(
    backend: Backend, dtype: Any, cut: Cut | None, kept: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = kept
    g = g.astype(dtype)
    dx = grouped_rows(g, _whole(w.astype(dtype), cut), sizes, backend=backend, transposed=True)
    dw = _own(grouped_outer(x, g, sizes, backend=backend), cut)
    return dx, dw.astype(w.dtype), None


_product.defvjp(_forward, _backward)


def _whole(w: jax.Array, cut: Cut | None) -> jax.Array:
    return lax.all_gather(w, cut.axis, axis=cut.dim, tiled=True) if cut else w


def _own(dw: jax.Array, cut: Cut | None) -> jax.Array:
    if cut is None:
        return dw
    return lax.psum_scatter(dw.astype(cut.reduce_dtype), cut.axis, scatter_dimension=cut.dim, tiled=True)


def row_groups(sizes: jax.Array, rows: int) -> jax.Array:
    """(N,) the group of every row; E for those of none."""
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")


# Programs of their own in the trace, by whose names `model.flops` knows them: the trips of a loop over groups depend on
# the data, and a hand-written kernel cannot be looked into.
NAMES = ("grouped_rows", "grouped_outer")


@functools.partial(jax.jit, static_argnames=("backend", "transposed"))
def grouped_rows(x: jax.Array, w: jax.Array, sizes: jax.Array, *, backend: Backend, transposed: bool) -> jax.Array:
    """Every row by its group's matrix, or by its transpose, in x's dtype; 2 N D F FLOPs."""
    return (backend.rows_transposed if transposed else backend.rows)(x, w, sizes).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("backend",))
def grouped_outer(x: jax.Array, g: jax.Array, sizes: jax.Array, *, backend: Backend) -> jax.Array:
    """Every group's sum of outer products of its rows; 2 N D F FLOPs."""
    return backend.outer(x, g, sizes)


# --- plain: one copy of a matrix a row -------------------------------------------------------------------------------


def _plain_rows(spec: str, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    own = jnp.take(w, row_groups(sizes, x.shape[0]), axis=0, mode="clip")
    return dot(spec, x, own)


def _plain_outer(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    products = dot("nd,nf->ndf", x, g)
    zeros = jnp.zeros((sizes.shape[0], *products.shape[1:]), jnp.float32)
    return zeros.at[row_groups(sizes, x.shape[0])].add(products, mode="drop")


# --- blocked: a loop over groups, and over blocks of a group's rows --------------------------------------------------


def block_rows(rows: int, groups: int) -> int:
    """Rows that are multiplied at once: a power of two, and small enough that the last, partly empty blocks of all
    groups together add an eighth to the FLOPs at the very most."""
    return min(LARGEST_BLOCK, 2 ** max((rows // (8 * groups)).bit_length() - 1, 0))


def blocks(sizes: jax.Array, block: int) -> jax.Array:
    """(E,) how many blocks of rows each group takes."""
    return -(-sizes // block)


def _padded(x: jax.Array, block: int) -> jax.Array:
    """With room for a last block that goes beyond the end."""
    return jnp.pad(x, ((0, block), (0, 0)))


def _blocked_rows(contract: int, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Contracts x (N, ·) with dim `contract` of each (D, F).

    A group's last block goes on into the rows of the groups after it, which are written again when their turn comes.
    """
    rows, block = x.shape[0], block_rows(x.shape[0], w.shape[0])
    x, spec = _padded(x, block), ("nd,df->nf", "nf,df->nd")[contract]

    def group(out: jax.Array, this: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        w, first, count = this

        def one(index: jax.Array, out: jax.Array) -> jax.Array:
            start = first + index * block
            part = lax.dynamic_slice_in_dim(x, start, block)
            return lax.dynamic_update_slice_in_dim(out, dot(spec, part, w), start, axis=0)

        return lax.fori_loop(0, count, one, out), None

    out = jnp.zeros((rows + block, w.shape[2 - contract]), jnp.float32)
    out, _ = lax.scan(group, out, (w, jnp.cumsum(sizes) - sizes, blocks(sizes, block)))
    return out[:rows]


def _blocked_outer(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    block = block_rows(x.shape[0], sizes.shape[0])
    x, g = _padded(x, block), _padded(g, block)

    def group(_: None, this: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        first, size, count = this

        def one(index: jax.Array, total: jax.Array) -> jax.Array:
            start = first + index * block
            own = (index * block + jnp.arange(block) < size)[:, None]
            parts = (lax.dynamic_slice_in_dim(y, start, block) for y in (x, g))
            left, right = (jnp.where(own, part, 0) for part in parts)
            return total + dot("nd,nf->df", left, right)

        return None, lax.fori_loop(0, count, one, jnp.zeros((x.shape[1], g.shape[1]), jnp.float32))

    return lax.scan(group, None, (jnp.cumsum(sizes) - sizes, sizes, blocks(sizes, block)))[1]


# --- what others have written ----------------------------------------------------------------------------------------


def _ragged_rows(contract: int, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (contract,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    precision = precision_of(x.dtype)
    return lax.ragged_dot_general(x, w, sizes, numbers, precision=precision, preferred_element_type=jnp.float32)


def _ragged_outer(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    precision = precision_of(x.dtype)
    return lax.ragged_dot_general(x, g, sizes, numbers, precision=precision, preferred_element_type=jnp.float32)


# --- megablox --------------------------------------------------------------------------------------------------------

LARGEST_TILES = (512, 1024, 1024)  # rows, contracted, out
VMEM = 16 * 2**20
"""Bytes of vector memory that XLA grants a kernel by default, on v4 and later. More is to be had only by an option
(`compilation.COMPILER_OPTIONS`), which programs of evaluation and generation are not compiled with."""


class Tiles(NamedTuple):
    """Of x (rows, inner) by a matrix (inner, outer) or, for `outer`, of x (rows, inner) and g (rows, outer)."""

    rows: int
    inner: int
    outer: int


def vmem_bytes(tiles: Tiles, *, itemsize: int, into_matrices: bool) -> int:
    """What a kernel with these tiles takes of the vector memory, by what it holds.

    That is two buffers for each operand and for the result, the float32 sums, and float32 copies: of the sums and of
    what they are written over where rows are multiplied, and of both operands where they go into matrices. Float32
    operands are multiplied as three bfloat16 parts each. (Compiled for v5e, what fits by this count did.)
    """
    rows, inner, outer = tiles
    operands = rows * inner + (rows * outer if into_matrices else inner * outer)
    parts = 3 * 2 * operands if itemsize == 4 else 0
    if into_matrices:
        return parts + 2 * (operands * itemsize + inner * outer * 4) + inner * outer * 4 + operands * 4
    return parts + 2 * (operands + rows * outer) * itemsize + 3 * rows * outer * 4


def choose_tiles(rows: int, inner: int, outer: int, *, itemsize: int, into_matrices: bool) -> Tiles:
    """The largest tiles whose kernel fits: multiples of the lanes' 128, no larger than the dims need.

    Dims of tiles are halved, the largest first and of equal ones the contracted one, which costs the least traffic.

    Args:
      itemsize: of the operands, bytes.
      into_matrices: whether the kernel is `outer`, whose result is float32; the rows of others are in x's dtype.
    """
    limits = zip(LARGEST_TILES, (rows, inner, outer), strict=True)
    tiles = Tiles(*(min(limit, -(-size // 128) * 128) for limit, size in limits))
    order = (0, 1, 2) if into_matrices else (1, 0, 2)
    while vmem_bytes(tiles, itemsize=itemsize, into_matrices=into_matrices) > VMEM:
        place = max(order, key=lambda i: (tiles[i], -order.index(i)))
        tiles = tiles._replace(**{Tiles._fields[place]: -(-tiles[place] // 256) * 128})
    return tiles


def _filled(x: jax.Array, tiles: Tiles) -> jax.Array:
    """The rows filled up to whole tiles."""
    return jnp.pad(x, ((0, -x.shape[0] % tiles.rows), (0, 0)))


def _megablox_rows(
    x: jax.Array, w: jax.Array, sizes: jax.Array, *, transposed: bool = False, interpret: bool = False
) -> jax.Array:
    """Megablox (Gale et al. 2023) as Pallas kernels, which visit the tiles of groups that have rows.

    Sums are float32 inside the kernel, which writes them in x's dtype: XLA cannot fuse a cast with it.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    rows, inner = x.shape
    out = w.shape[1 if transposed else 2]
    tiles = choose_tiles(rows, inner, out, itemsize=x.dtype.itemsize, into_matrices=False)
    with exactly(x.dtype):
        y = gmm(_filled(x, tiles), w, sizes, x.dtype, tuple(tiles), transpose_rhs=transposed, interpret=interpret)
    return y[:rows]


def _megablox_outer(x: jax.Array, g: jax.Array, sizes: jax.Array, *, interpret: bool = False) -> jax.Array:
    """The same; it visits empty groups too, and writes zeros there."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows, inner = x.shape
    tiles = choose_tiles(rows, inner, g.shape[1], itemsize=x.dtype.itemsize, into_matrices=True)
    with exactly(x.dtype):
        return tgmm(_filled(x, tiles).T, _filled(g, tiles), sizes, jnp.float32, tuple(tiles), interpret=interpret)


def megablox(*, interpret: bool = False) -> Backend:
    """The kernels for TPU; interpreted on any platform for tests."""
    return Backend(
        "megablox",
        rows=functools.partial(_megablox_rows, interpret=interpret),
        rows_transposed=functools.partial(_megablox_rows, transposed=True, interpret=interpret),
        outer=functools.partial(_megablox_outer, interpret=interpret),
        platforms=("tpu",),
        dtypes=("bfloat16", "float32"),
    )


PLAIN = Backend(
    "plain",
    rows=functools.partial(_plain_rows, "nd,ndf->nf"),
    rows_transposed=functools.partial(_plain_rows, "nf,ndf->nd"),
    outer=_plain_outer,
)

# In order of preference. `lax.ragged_dot` is right everywhere, but on CPU it computes every group's product of all
# rows, and so does its weight gradient on TPU and GPU.
BACKENDS: tuple[Backend, ...] = (
    megablox(),
    Backend(
        "blocked",
        rows=functools.partial(_blocked_rows, 0),
        rows_transposed=functools.partial(_blocked_rows, 1),
        outer=_blocked_outer,
        platforms=("cpu",),
    ),
    Backend(
        "ragged",
        rows=functools.partial(_ragged_rows, 1),
        rows_transposed=functools.partial(_ragged_rows, 2),
        outer=_ragged_outer,
    ),
)


def choose(platform: str, dtype: Any) -> Backend:
    """The first back end of the table that multiplies operands of `dtype` on this platform: "cpu", "gpu", "tpu"."""
    name = jnp.dtype(dtype).name
    return next(
        backend
        for backend in BACKENDS
        if (not backend.platforms or platform in backend.platforms) and (not backend.dtypes or name in backend.dtypes)
    )
