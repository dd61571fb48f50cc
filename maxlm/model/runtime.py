"""How a model is run, as opposed to what it is: handed in from outside, so that modules hold parameters only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.config import ACTIVATION_NAMES, REMAT_WORDS
from maxlm.kernels import attention
from maxlm.kernels.cross_entropy import SpreadFn, alone
from maxlm.kernels.experts import local_experts
from maxlm.kernels.matmul import ATTENTION_NAME, SAVED_NAME, einsum

AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, attention.Mask], jax.Array]
LookupFn = Callable[..., jax.Array]
ExpertsFn = Callable[..., jax.Array]
BlockFn = Callable[[jax.Array, Any], tuple[jax.Array, Any]]
ArrayFn = Callable[..., jax.Array]


def _unconstrained(x: jax.Array, logical: tuple[str | None, ...]) -> jax.Array:
    del logical
    return x


def take(table: jax.Array, tokens: jax.Array, *, scale: float, dtype: Any) -> jax.Array:
    """Rows of a table (V, D) by number, times `scale` in float32: (B, S) int32 -> (B, S, D) in `dtype`.

    A number outside the table gives NaN. The gradient of a frequent row adds up in float32.
    """
    return (jnp.take(table, tokens, axis=0).astype(jnp.float32) * scale).astype(dtype)


def _as_it_is(tree: Any) -> Any:
    return tree


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Precision, placement, kernels and memory policy of a forward pass.

    dtype: of activations and of the operands of products; parameters, norms, softmax and loss are float32 regardless.
    reduce_dtype: in which the gradients of weights are added up over the mesh.
    outermost: as of `kernels.matmul.product`, of `multiply`'s labels.
    constrain: pins an activation with these logical axes, e.g. ('batch', 'seq', None), to its devices.
    lookup: as `take`, which it is on one device.
    arrange: brings a tree of (B, S) arrays into the order of positions that `attend` expects. Whoever calls the model
      with whole rows hands every array of the batch to it first; nothing else may depend on the order.
    attend: (q (B,S,H,h), k (B,T,K,h), v (B,T,K,v), Mask) -> (B,S,H,v).
    experts: as `kernels.experts.local_experts`, which it is on one device.
    spread_loss: as `kernels.cross_entropy.alone`, which it is on one device.
    experts_limited: whether experts refuse tokens beyond `model.moe.capacity_factor`: in training they do.
    remat: what the backward pass finds saved: `none` (everything), `full` (block inputs only), `matmuls` (the products
      of `kernels.matmul.einsum` and attention's result besides), or names out of config.ACTIVATION_NAMES joined by `+`
      (block inputs and these).
    turn_by_products: as of `model.rotary.rotary`.
    keep_integers: whether a scan over layers keeps 16-bit floats for the backward pass as integers (`kernels.bits`).
    """

    dtype: Any = jnp.float32
    reduce_dtype: Any = jnp.float32
    outermost: str = ""
    constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] = _unconstrained
    lookup: LookupFn = take
    arrange: Callable[[Any], Any] = _as_it_is
    attend: AttentionFn = attention.plain
    experts: ExpertsFn = local_experts
    spread_loss: SpreadFn = alone
    experts_limited: bool = False
    remat: str = "none"
    turn_by_products: bool = False
    keep_integers: bool = False

    def multiply(self, spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """Activations by a weight, as of `kernels.matmul.einsum`; `d` labels the model's width, and nothing else."""
        how: dict[str, Any] = {"dtype": self.dtype, "reduce_dtype": self.reduce_dtype}
        return einsum(spec, x, w, outermost=self.outermost, **how)


def rematerialised(block: BlockFn, runtime: Runtime, *, prevent_cse: bool = False) -> BlockFn:
    """The block, recomputing in the backward pass what `runtime.remat` does not keep.

    Args:
      prevent_cse: for a block outside a scan. In one, XLA cannot merge the recomputation with the forward pass, and the
        barriers against that are left out.

    Raises:
      ValueError: the policy or one of its names is unknown.
    """
    policies = jax.checkpoint_policies
    match runtime.remat:
        case "none":
            return block
        case "full":
            policy = policies.nothing_saveable
        case "matmuls":
            policy = policies.save_only_these_names(SAVED_NAME, ATTENTION_NAME)
        case names:
            if unknown := set(names.split("+")) - set(ACTIVATION_NAMES):
                known = ", ".join(REMAT_WORDS), ", ".join(ACTIVATION_NAMES)
                raise ValueError(f"remat has {sorted(unknown)}; it is one of {known[0]}, or of {known[1]} joined by +")
            policy = policies.save_only_these_names(*names.split("+"))
    return jax.checkpoint(block, prevent_cse=prevent_cse, policy=policy)


def cheap(function: ArrayFn) -> ArrayFn:
    """An elementwise function or norm whose float32 intermediates are recomputed rather than kept for the gradient."""
    return jax.checkpoint(function, prevent_cse=False)
