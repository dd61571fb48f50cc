"""Running a stack of layers of one structure as a scan, so that the program does not grow with depth.

Shapes: B batch, S sequence, C cache slots, D embed, K kv heads, h head dim, L layers of the stack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.kernels.bits import kept_as_integers
from maxlm.model.attention import KeyValues, Sight
from maxlm.model.runtime import Runtime, rematerialised

Memories = tuple[KeyValues, ...] | None
"""Of a stack's layers: for each window of the cycle, those of its layers stacked, (layers, B, C, ...)."""
CycleFn = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


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
    """What a stack returns: the stream (B, S, D), its RMS after each layer (L,), memories, `aux` with L in front."""

    x: jax.Array
    rms: jax.Array
    memory: Memories
    aux: dict[str, jax.Array]


def run_stack(
    stacked: nnx.Module,
    x: jax.Array,
    *,
    sight: Sight,
    windows: tuple[int, ...],
    runtime: Runtime,
    memory: Memories,
) -> Carried:
    """Scans over whole cycles of windows; the layers that are left are a suffix.

    Args:
      stacked: blocks as `param.stack` makes them, parameters (L, ...).
      x: (B, S, D), the stream before the first of them.
      windows: of the layers in turn, repeated as a cycle.
      memory: of earlier tokens.
    """
    graphdef, state = nnx.split(stacked)
    params = nnx.to_pure_dict(state)
    count = jax.tree.leaves(params)[0].shape[0]
    make = functools.partial(make_cycle, graphdef, windows=windows, runtime=runtime, in_turn=len(windows) > 1)

    def cycle(x: jax.Array, layers: Any, sight: Sight) -> tuple[jax.Array, Any]:
        return make(sight=sight)(x, layers)

    turn = kept_as_integers(cycle) if runtime.keep_integers else cycle

    cycles, rest = divmod(count, len(windows))
    scanned, outs, kept = cycles * len(windows), [], []
    if cycles:
        folded = params
        if len(windows) > 1:
            folded = jax.tree.map(lambda p: p[:scanned].reshape(cycles, len(windows), *p.shape[1:]), params)
        each = (folded, jax.tree.map(lambda m: m[:cycles], memory))
        x, (rms, memories, aux) = jax.lax.scan(lambda x, layers: turn(x, layers, sight), x, each)
        outs.append(jax.tree.map(lambda y: y.reshape(scanned, *y.shape[2:]), (rms, aux)))
        kept.append(memories)
    if rest:
        last = jax.tree.map(lambda m: m[cycles], memory[:rest]) if memory else None
        x, (rms, memories, aux) = make(sight=sight, scanned=False)(
            x, (jax.tree.map(lambda p: p[scanned:], params), last)
        )
        outs.append((rms, aux))
        kept.append(jax.tree.map(lambda m: m[None], memories))
    rms, aux = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
    return Carried(x, rms, _memories(kept) if memory else None, aux)


def make_cycle(
    graphdef: Any,
    *,
    sight: Sight,
    windows: tuple[int, ...],
    runtime: Runtime,
    scanned: bool = True,
    in_turn: bool = False,
) -> CycleFn:
    """The layers of one cycle of windows as a function of the stream and of (parameters, memories).

    Parameters have one entry a layer in front, unless the cycle is of one layer; given fewer than there are windows, it
    runs the first of them. Memories are one a layer, or None. The second result is (rms, memories, aux), where rms and
    aux have one entry a layer in front.

    Args:
      scanned: whether it is run by a scan; else what is recomputed is kept apart from the forward pass.
      in_turn: whether a layer's backward pass is over, the gradients of its parameters included, before that of the
        layer below begins. Otherwise XLA is free to leave those gradients to the end of the cycle, and on TPUs it does:
        what they are made of is then held for all layers of the cycle at once.
    """

    def run(x: jax.Array, layer: Any, *, index: int) -> tuple[jax.Array, Any]:
        params, memory = layer
        # A layer is cut out of its cycle here, under `rematerialised`, which then keeps no copy of its parameters.
        own = jax.tree.map(lambda p: p[index], params) if len(windows) > 1 else params
        if in_turn:
            x, own = _gradients_together(x, own)
        out = nnx.merge(graphdef, own)(x, sight=sight, window=windows[index], runtime=runtime, memory=memory)
        return out.out, (_rms(out.out), out.memory, out.aux)

    blocks = [
        rematerialised(functools.partial(run, index=i), runtime, prevent_cse=not scanned) for i in range(len(windows))
    ]

    def cycle(x: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
        params, memories = layers
        count = jax.tree.leaves(params)[0].shape[0] if len(windows) > 1 else 1
        outs, kept = [], []
        for i, block in enumerate(blocks[:count]):
            x, (rms, memory, aux) = block(x, (params, memories[i] if memories else None))
            outs.append((rms, aux))
            kept.append(memory)
        rms, aux = jax.tree.map(lambda *parts: jnp.stack(parts), *outs)
        return x, (rms, tuple(kept) if memories else None, aux)

    return cycle


@jax.custom_vjp
def _gradients_together(x: jax.Array, params: Any) -> tuple[jax.Array, Any]:
    """The same two, of whose gradients none goes on before all are there."""
    return x, params


def _together_forward(x: jax.Array, params: Any) -> tuple[tuple[jax.Array, Any], None]:
    return (x, params), None


def _together_backward(_: None, gradients: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    return jax.lax.optimization_barrier(gradients)


_gradients_together.defvjp(_together_forward, _together_backward)


def _memories(parts: list[tuple[KeyValues, ...]]) -> tuple[KeyValues, ...]:
    """Those of the whole cycles, and of the layers that are left, as one."""
    own = [[part[i] for part in parts if i < len(part)] for i in range(max(map(len, parts)))]
    return tuple(jax.tree.map(lambda *pieces: jnp.concatenate(pieces), *pieces) for pieces in own)


def _rms(x: jax.Array) -> jax.Array:
    """Root mean square over everything, float32; for watching only, so without a gradient."""
    return jnp.sqrt(jnp.mean(jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32))))
