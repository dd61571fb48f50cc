"""Adafactor's second moment, factored a matrix at a time.

`optax.scale_by_factored_rms` factors the two largest axes of an array, whatever they are: of a stacked attention
projection (L, D, H, h) it takes D and h, or mixes the layers if L is large, and a stacked scale (L, D) becomes one
matrix. Here the axes follow from the parameter's declaration: rows are the axes that its product sums over (fan-in),
columns the other ones, and axes that number independent matrices (layers, experts) are never reduced. For a single
matrix the result equals optax's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maxlm import tree

if TYPE_CHECKING:
    from maxlm.model.param import ParamSpec

# Axes that count matrices and are not part of one.
BATCH_AXES = ("layers", "expert")

# Shazeer & Stern 2018, section 9: the exponent of the decay 1 - t^-0.8, the regulariser of squared gradients, and the
# largest root mean square of a matrix's update. They are part of the algorithm, not tuned.
DECAY_EXPONENT = 0.8
SQUARE_EPSILON = 1e-30
LARGEST_RMS = 1.0


class MatrixAxes(NamedTuple):
    """Which axes of an array make up one of its matrices; empty sides for what is no matrix."""

    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether there is anything to factor or to orthogonalise."""
        return bool(self.fan_in and self.fan_out)


class FactoredState(NamedTuple):
    """Second moments, float32.

    updates: made so far, int32 ().
    rows, cols: of matrices, nested dicts; means of the squared gradient over the fan-out and over the fan-in axes.
    full: of all other arrays, nested dict, of the parameter's shape.
    """

    updates: jax.Array
    rows: dict[str, Any]
    cols: dict[str, Any]
    full: dict[str, Any]


def matrix_axes(spec: ParamSpec) -> MatrixAxes:
    """The fan-in and fan-out axes of a declared parameter; of a table that is only looked up, rows by columns."""
    own = tuple(i for i, name in enumerate(spec.logical) if name not in BATCH_AXES)
    fan_in = tuple(i for i in own if spec.logical[i] in spec.contract)
    if not fan_in and spec.role == "embedding":
        fan_in = own[:1]
    return MatrixAxes(fan_in, tuple(i for i in own if i not in fan_in) if fan_in else ())


def scale_by_factored_moment(specs: Mapping[str, ParamSpec], *, b2: float) -> optax.GradientTransformation:
    """Divides gradients by the root of a factored second moment and clips the RMS of each matrix's update.

    Shazeer & Stern 2018, algorithms 4 to 6, with the decay capped at `b2` as in Zhai et al. 2022, appendix; without
    relative step sizes, so that learning rates mean what they mean elsewhere.

    Args:
      specs: declarations by path, of exactly the parameters that will be handed in.
      b2: largest decay of the second moment.
    """
    axes = {path: matrix_axes(spec) for path, spec in specs.items()}
    own = {path: tuple(i for i, n in enumerate(spec.logical) if n not in BATCH_AXES) for path, spec in specs.items()}

    def init(params: optax.Params) -> FactoredState:
        rows, cols, full = {}, {}, {}
        for path, p in tree.paths(params).items():
            if axes[path].is_matrix:
                rows[path] = jnp.zeros(_without(p.shape, axes[path].fan_out), jnp.float32)
                cols[path] = jnp.zeros(_without(p.shape, axes[path].fan_in), jnp.float32)
            else:
                full[path] = jnp.zeros(p.shape, jnp.float32)
        return FactoredState(jnp.zeros((), jnp.int32), *map(tree.from_paths, (rows, cols, full)))

    def update(
        updates: optax.Updates, state: FactoredState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, FactoredState]:
        del params
        count = optax.safe_increment(state.updates)
        decay = jnp.minimum(1.0 - count.astype(jnp.float32) ** -DECAY_EXPONENT, b2)
        old_rows, old_cols, old_full = map(tree.paths, (state.rows, state.cols, state.full))
        rows, cols, full, out = {}, {}, {}, {}
        for path, gradient in tree.paths(updates).items():
            square = jnp.square(gradient) + SQUARE_EPSILON
            if axes[path].is_matrix:
                fan_in, fan_out = axes[path]
                rows[path] = decay * old_rows[path] + (1.0 - decay) * square.mean(fan_out)
                cols[path] = decay * old_cols[path] + (1.0 - decay) * square.mean(fan_in)
                row, col = jnp.expand_dims(rows[path], fan_out), jnp.expand_dims(cols[path], fan_in)
                # In this order: the quotient of a row and their mean may be too small for float32, and 0 * inf is nan.
                mean = row.mean(fan_in, keepdims=True)
                scaled = gradient * jax.lax.rsqrt(row) * jnp.sqrt(mean) * jax.lax.rsqrt(col)
            else:
                full[path] = decay * old_full[path] + (1.0 - decay) * square
                scaled = gradient * jax.lax.rsqrt(full[path])
            rms = jnp.sqrt(jnp.square(scaled).mean(own[path], keepdims=True))
            out[path] = scaled / jnp.maximum(1.0, rms / LARGEST_RMS)
        return tree.from_paths(out), FactoredState(count, *map(tree.from_paths, (rows, cols, full)))

    return optax.GradientTransformation(init, update)


def _without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape left after reducing over `axes`."""
    return tuple(size for i, size in enumerate(shape) if i not in axes)
