"""A mixture of experts as the feed-forward half of a block: router, routed experts and shared experts.

Shapes: B batch, S sequence, D embed, F mlp, E experts, k experts of a token, G groups of experts, L layers of experts.

What keeps experts evenly used is defined within a row of the batch: the balance loss is a mean over rows, and a
capacity counts the tokens of a row, in the order of their positions. So neither the mesh, nor accumulation, nor
microbatches change either. A row is what is packed into it: its documents share it. Padding is sent to no expert, takes
no capacity and is not counted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm import tree
from maxlm.config import ModelConfig, MoeConfig
from maxlm.kernels.experts import Experts, Linear, Routes
from maxlm.kernels.matmul import product
from maxlm.model.attention import Sight
from maxlm.model.layers import residual_init
from maxlm.model.mlp import GATED, UNGATED, FeedForwardOut, Mlp
from maxlm.model.param import constant, fan_in_normal, parameter
from maxlm.model.runtime import Runtime, cheap

BIAS = "selection_bias"


class Routed(NamedTuple):
    """What a router decides, and what it decides by.

    experts: (B, S, k) int32, best first.
    weights: (B, S, k) float32, of their outputs.
    shares: (B, S, E) float32: all scores of a token, adding up to one.
    """

    experts: jax.Array
    weights: jax.Array
    shares: jax.Array


class AuxLosses(NamedTuple):
    """What experts add to the loss, and say of themselves.

    total: () float32, to add to the loss.
    terms: `balance_loss` and `router_z_loss` (), means over layers; `load` (L, E) and `dropped` (L,), counts. Like the
      total, they add up over the parts of a batch. {} without experts.
    """

    total: jax.Array
    terms: dict[str, jax.Array]


def route(logits: jax.Array, bias: jax.Array | None, config: MoeConfig) -> Routed:
    """The k experts of each token, from logits (B, S, E) float32.

    Scores are a softmax over all experts (Shazeer et al. 2017) or sigmoids (DeepSeek-V3, section 2.1.2). A softmax over
    the chosen logits alone is a softmax over all with `normalise`. The bias (E,) takes part in the choice and not in
    the weights, and has no gradient. With groups, a token's experts are among its `top_groups` best groups, by the best
    softmax score in each (DeepSeek-V2, section 2.1.3) or the sum of the two best sigmoids (DeepSeek-V3).
    """
    scores = jax.nn.softmax(logits) if config.router == "softmax" else jax.nn.sigmoid(logits)
    ranked = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    if config.groups > 1:
        grouped = ranked.reshape(*ranked.shape[:-1], config.groups, -1)
        best = jnp.sum(_pick(grouped, _best(grouped, 1 if config.router == "softmax" else 2)), axis=-1)
        allowed = jnp.any(_best(best, config.top_groups)[..., None] == jnp.arange(config.groups), axis=-2)
        ranked = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(ranked.shape)
    experts = _best(ranked, config.active)
    weights = _pick(scores, experts)
    if config.normalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    shares = scores if config.router == "softmax" else scores / jnp.sum(scores, axis=-1, keepdims=True)
    return Routed(experts, weights * config.weight_scale, shares)


def _best(values: jax.Array, count: int) -> jax.Array:
    """(..., count) int32, where the largest of the last dim are, the best first.

    A maximum at a time: XLA brings together what `lax.top_k` and gathers are given, however it was sharded.
    """
    found = []
    for _ in range(count):
        found.append(jnp.argmax(values, axis=-1))
        values = jnp.where(jnp.arange(values.shape[-1]) == found[-1][..., None], -jnp.inf, values)
    return jnp.stack(found, axis=-1).astype(jnp.int32)


def _pick(values: jax.Array, places: jax.Array) -> jax.Array:
    """(..., n) values (..., E) at places (..., n)."""
    own = places[..., None] == jnp.arange(values.shape[-1])
    return jnp.sum(jnp.where(own, values[..., None, :], 0), axis=-1)


def capacity(config: MoeConfig, positions: int) -> int:
    """Tokens that an expert takes of a row of so many positions at most: the factor times an even share, rounded up."""
    return math.ceil(config.capacity_factor * positions * config.active / config.experts)


class MoeMlp(nnx.Module):
    """Routed experts, and beside them shared ones that see every token (DeepSeekMoE, Dai et al. 2024)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config, self.kind = config.moe, config.mlp.kind
        embed, experts = {"embed": config.embed_dim}, {"expert": config.moe.experts}
        mlp, outputs = {"mlp": config.moe.dim}, {"router": config.moe.experts}
        inner, zero, gated, bias = fan_in_normal(1.0), constant(0.0), config.mlp.gated, config.mlp.bias
        self.router = parameter(rngs, embed | outputs, contract=("embed",), init=inner)
        self.router_bias = parameter(rngs, outputs, init=zero) if bias else None
        balanced = config.moe.selection_bias
        self.selection_bias = parameter(rngs, outputs, init=zero, trained=False) if balanced else None
        self.gate = parameter(rngs, experts | embed | mlp, contract=("embed",), init=inner) if gated else None
        self.up = parameter(rngs, experts | embed | mlp, contract=("embed",), init=inner)
        self.down = parameter(rngs, experts | mlp | embed, contract=("mlp",), init=residual_init(config))
        self.gate_bias = parameter(rngs, experts | mlp, init=zero) if gated and bias else None
        self.up_bias = parameter(rngs, experts | mlp, init=zero) if bias else None
        self.down_bias = parameter(rngs, experts | embed, init=zero) if bias else None
        self.shared = Mlp(config, rngs=rngs, dim=config.moe.shared_dim) if config.moe.shared_dim else None
        one, gate = {"router": 1}, config.moe.shared_gate
        self.shared_gate = parameter(rngs, embed | one, contract=("embed",), init=inner) if gate else None

    def __call__(self, x: jax.Array, *, sight: Sight, runtime: Runtime) -> FeedForwardOut:
        """(B, S, D) -> (B, S, D). aux, of the rows given: what `row_statistics` returns, and `dropped` ()."""
        with jax.named_scope("router"):
            logits = _small(x, self.router[...], runtime)
            if self.router_bias is not None:
                logits = logits + self.router_bias[...]
            logits = runtime.constrain(logits, ("batch", "residual", None))
            routed = route(logits, _value(self.selection_bias), self.config)
            real = jnp.ones(x.shape[:2], bool) if sight.real is None else sight.real
            real = jnp.broadcast_to(real, x.shape[:2])
            limit = capacity(self.config, x.shape[1]) if runtime.experts_limited else 0
            aux = row_statistics(logits, routed, real, self.config)
            kept = real[..., None] & (within_capacity(routed.experts, real, self.config.experts, limit))
            aux["dropped"] = jnp.sum(real[..., None] & ~kept, dtype=jnp.float32)
            routes = Routes(jnp.where(kept, routed.experts, self.config.experts), routed.weights)
        with jax.named_scope("experts"):
            gate = None if self.gate is None else Linear(self.gate[...], _value(self.gate_bias))
            up, down = Linear(self.up[...], _value(self.up_bias)), Linear(self.down[...], _value(self.down_bias))
            experts = Experts(gate, up, down)
            y = runtime.experts(x, routes, experts, hidden=self._hidden, capacity=limit, dtype=runtime.dtype)
        if self.shared is not None:
            shared = self.shared(x, sight=sight, runtime=runtime).out.astype(jnp.float32)
            if self.shared_gate is not None:
                shared *= jax.nn.sigmoid(_small(x, self.shared_gate[...], runtime))
            y = y + shared
        return FeedForwardOut(checkpoint_name(y.astype(runtime.dtype), "mlp_out"), aux)

    def _hidden(self, gate: jax.Array | None, up: jax.Array) -> jax.Array:
        return cheap(UNGATED[self.kind])(up) if gate is None else cheap(GATED[self.kind])(gate, up)


def _small(x: jax.Array, w: jax.Array, runtime: Runtime) -> jax.Array:
    """(B, S, D) by (D, E) in float32. The matrix is brought together before: left to itself, XLA moves the tokens."""
    return product("bsd,de->bse", x, runtime.constrain(w, (None, "router")), dtype=jnp.float32)


def _value(param: nnx.Param | None) -> jax.Array | None:
    return None if param is None else param[...]


def within_capacity(experts: jax.Array, real: jax.Array, count: int, limit: int) -> jax.Array:
    """(B, S, k) bool: whether an expert still has room when a token's turn comes; all have if the limit is 0.

    Tokens of a row come in the order of their positions, so that what happens to one depends on none after it.
    """
    if not limit:
        return jnp.ones(experts.shape, bool)
    sent = jnp.any(experts[..., None] == jnp.arange(count), axis=2) & real[..., None]  # (B, S, E)
    before = jnp.cumsum(sent, axis=1, dtype=jnp.int32) - sent
    return _pick(before, experts) < limit


def row_statistics(logits: jax.Array, routed: Routed, real: jax.Array, config: MoeConfig) -> dict[str, jax.Array]:
    """Losses and counts, float32 sums over the rows:

    - balance (): of each row E / k * sum over experts of (share of its tokens sent there) * (mean score), which is 1
      where tokens are spread evenly (Fedus et al. 2021, eq. 4; within a sequence as in DeepSeek-V3, eq. 17 to 20)
    - router_z (): of each row the mean of the squared log normaliser of the logits (Zoph et al. 2022, eq. 5)
    - load (E,): tokens sent to each expert, also those that exceed a capacity
    """
    tokens = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.float32), 1.0)  # (B,)
    sent = jnp.any(routed.experts[..., None] == jnp.arange(config.experts), axis=2) & real[..., None]
    counts = jnp.sum(sent, axis=1, dtype=jnp.float32)  # (B, E)
    mean_share = jnp.sum(jnp.where(real[..., None], routed.shares, 0.0), axis=1) / tokens[:, None]
    balance = jnp.sum(counts / tokens[:, None] * mean_share, axis=1) * (config.experts / config.active)
    squares = jnp.where(real, jnp.square(jax.nn.logsumexp(logits, axis=-1)), 0.0)
    router_z = jnp.sum(squares, axis=1) / tokens
    return {"balance": jnp.sum(balance), "router_z": jnp.sum(router_z), "load": jnp.sum(counts, axis=0)}


def auxiliary_losses(config: MoeConfig, aux: dict[str, jax.Array], *, rows: int) -> AuxLosses:
    """The share of some rows in the loss of a batch: of each layer the mean over rows, added up over layers.

    Args:
      aux: of those rows, layers in front.
      rows: of the whole batch.
    """
    if not config.experts:
        return AuxLosses(jnp.zeros(()), {})
    balance, router_z = jnp.sum(aux["balance"]) / rows, jnp.sum(aux["router_z"]) / rows
    total = config.balance_loss * balance + config.router_z_loss * router_z
    layers = aux["load"].shape[0]
    terms = {"balance_loss": balance / layers, "router_z_loss": router_z / layers}
    return AuxLosses(total, terms | {"load": aux["load"], "dropped": aux["dropped"]})


def layer_loads(terms: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A number a layer, (L,) float32, from the counts of a whole batch: the busiest expert's tokens over the mean, and
    the share of tokens' choices that a capacity has dropped."""
    mean = jnp.maximum(jnp.mean(terms["load"], axis=1), 1e-9)
    experts = terms["load"].shape[1]
    return {
        "load_max_over_mean": jnp.max(terms["load"], axis=1) / mean,
        "dropped": terms["dropped"] / (mean * experts),
    }


def scalars(terms: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What is logged of every step: means over layers, () float32; {} without experts."""
    if not terms:
        return {}
    loads = {name: jnp.mean(value) for name, value in layer_loads(terms).items()}
    return {name: terms[name] for name in ("balance_loss", "router_z_loss")} | loads


def moved_biases(params: dict[str, Any], load: jax.Array, *, rate: float) -> dict[str, Any]:
    """Parameters whose selection biases have moved by `rate` towards an even load, by the sign of what is missing to
    the mean (Wang et al. 2024, "Auxiliary-loss-free load balancing").

    Args:
      load: (L, E) tokens sent to each expert, of the whole batch; those of `mtp` come after those of `layers`.
    """
    step = rate * jnp.sign(jnp.mean(load, axis=1, keepdims=True) - load)
    flat, done = tree.paths(params), 0
    for path in ("layers/mlp/" + BIAS, "mtp/block/mlp/" + BIAS):
        if path in flat:
            flat[path] = flat[path] + step[done : done + flat[path].shape[0]]
            done += flat[path].shape[0]
    return tree.from_paths(flat)
