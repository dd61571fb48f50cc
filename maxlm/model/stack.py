"""Running a stack of layers of one structure as a scan, so that the program does not grow with depth.

Shapes: B batch, S sequence, C cache slots, D embed, K kv heads, h head dim, L layers of the stack.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.model.attention import KeyValues, Sight
from maxlm.model.runtime import Runtime, rematerialised


class LayerOut(NamedTuple):
    """What a block returns.

    out: (B, S, D), the stream after the block.
    memory: the layer's keys and values with the new ones written in, or None.
    aux: what its feed-forward module returns besides: auxiliary losses and counts of a router, {} for a dense one.
    """

    out: jax.Array
    memory: KeyValues | None
    aux: dict[str, jax.Array]


class Carried(NamedTuple):
    """What a stack returns: the stream (B, S, D), its RMS after each layer (L,), caches and `aux` with L in front."""

    x: jax.Array
    rms: jax.Array
    memory: KeyValues | None
    aux: dict[str, jax.Array]


def run_stack(
    stacked: nnx.Module,
    x: jax.Array,
    *,
    sight: Sight,
    windows: tuple[int, ...],
    runtime: Runtime,
    memory: KeyValues | None,
) -> Carried:
    """Scans over whole cycles of windows; the layers that are left are a suffix.

    Args:
      stacked: blocks as `param.stack` makes them, parameters (L, ...).
      x: (B, S, D), the stream before the first of them.
      windows: of the layers in turn, repeated as a cycle.
      memory: keys and values of earlier tokens, (L, B, C, K, h).
    """
    graphdef, state = nnx.split(stacked)
    layers = (nnx.to_pure_dict(state), memory)
    count = jax.tree.leaves(layers[0])[0].shape[0]

    def run(x: jax.Array, layers: Any, *, index: int) -> tuple[jax.Array, Any]:
        # A layer is cut out of its cycle here, under `rematerialised`, which then keeps no copy of its parameters.
        params, memory = jax.tree.map(lambda p: p[index], layers) if len(windows) > 1 else layers
        out = nnx.merge(graphdef, params)(x, sight=sight, window=windows[index], runtime=runtime, memory=memory)
        return out.out, (_rms(out.out), out.memory, out.aux)

    blocks = [rematerialised(functools.partial(run, index=i), runtime) for i in range(len(windows))]

    def cycle(x: jax.Array, layers: Any, count: int = len(windows)) -> tuple[jax.Array, Any]:
        outs = []
        for block in blocks[:count]:
            x, out = block(x, layers)
            outs.append(out)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)

    cycles, rest = divmod(count, len(windows))
    scanned, outs = cycles * len(windows), []
    if cycles:
        folded = layers
        if len(windows) > 1:
            folded = jax.tree.map(lambda p: p[:scanned].reshape(cycles, len(windows), *p.shape[1:]), layers)
        x, out = jax.lax.scan(cycle, x, folded)
        outs.append(jax.tree.map(lambda y: y.reshape(scanned, *y.shape[2:]), out))
    if rest:
        x, out = cycle(x, jax.tree.map(lambda p: p[scanned:], layers), rest)
        outs.append(out)
    out = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
    return Carried(x, *out)


def joined(before: Carried, after: Carried) -> Carried:
    """Two stacks that ran one after the other as one; `aux` is the second's, as the first has none.

    Raises:
      ValueError: the first has.
    """
    if before.aux:
        raise ValueError(f"the layers before the last stack return {sorted(before.aux)}; only the last stack may")
    rms, memory = jax.tree.map(
        lambda *parts: jnp.concatenate(parts), (before.rms, before.memory), (after.rms, after.memory)
    )
    return Carried(after.x, rms, memory, after.aux)


def _rms(x: jax.Array) -> jax.Array:
    """Root mean square over everything, float32; for watching only, so without a gradient."""
    return jnp.sqrt(jnp.mean(jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32))))
