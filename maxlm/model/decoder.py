"""The decoder language model: embedding, one or two scanned stacks of blocks, a final norm and the output head.

In training, layers of another kind may follow that predict further tokens (`mtp`).

Shapes: B batch, S sequence, t new tokens, C cache slots, D embed, V vocab, L layers.

A block is composed of an attention and a feed-forward module by `make_block`; another family hands `Decoder` another
maker of blocks. Layers of one structure are one stack: the `prefix` of dense layers that some mixtures of experts begin
with (`model.moe.dense_layers`), and `layers`, the rest. Matrices start as normal with standard deviation
1 / sqrt(fan_in), those that write into the residual stream as `layers.residual_init` says, the embedding at
`config.embed_std`, the untied head at 1 / sqrt(D), scales at one and biases at zero.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config import ModelConfig, MoeConfig
from maxlm.kernels.cross_entropy import capped_logits
from maxlm.model.attention import AttentionOut, GroupedQueryAttention, KeyValues, Sight, init_memory
from maxlm.model.latent import LatentAttention
from maxlm.model.layers import Embedding, Head, make_norm
from maxlm.model.mlp import FeedForwardOut, Mlp
from maxlm.model.moe import MoeMlp
from maxlm.model.mtp import FurtherOut, MtpLayer, run_mtp
from maxlm.model.param import DECLARE, param_specs, stack
from maxlm.model.runtime import Runtime
from maxlm.model.stack import LayerOut, Memories, run_stack

Params = dict[str, Any]

STACKS = ("prefix", "layers", "mtp")  # what the paths of stacked parameters begin with


class HiddenOut(NamedTuple):
    """What a forward pass over whole rows returns.

    hidden_BSD: after the final norm, compute dtype.
    norms: `residual`, RMS of the stream after each layer, (L,).
    aux: what the feed-forward modules of `layers` return besides, e.g. a router's losses and counts; each array has
      one entry for each of those layers in front. {} for dense layers.
    """

    hidden_BSD: jax.Array
    norms: dict[str, jax.Array]
    aux: dict[str, jax.Array]


class Cache(NamedTuple):
    """Keys and values of the tokens so far, for rows that are padded on the left.

    All rows are written at the same slots, which keeps a decoding step free of scatters: a prompt of n tokens in a
    batch whose longest has m is given m - n padding tokens (of any id) in front, and `padding` says how many. Slot s
    of row b holds that row's token at position s - padding[b]; slots below padding[b] are seen by no token. Layers with
    a window keep only what it reaches.
    """

    memory: tuple[Memories, ...]  # of each stack
    slots: jax.Array  # (C,) int32: 0, 1, ...
    padding: jax.Array  # (B,) int32
    used: jax.Array  # () int32: slots filled, padding included
    longest: jax.Array  # (B,) int32: positions that each row may come to have, at most C


class DecodeOut(NamedTuple):
    """hidden: (B, t, D) after the final norm; at padding tokens it means nothing. cache: with the t tokens in it."""

    hidden: jax.Array
    cache: Cache


class ModelParts(NamedTuple):
    """A model without values: its structure, and a ParamSpec for each of its parameters (nested dict)."""

    graphdef: Any
    specs: dict[str, Any]


class _RunOut(NamedTuple):
    x: jax.Array  # (B, S, D)
    rms: jax.Array  # (L,)
    memory: tuple[Memories, ...]
    aux: dict[str, jax.Array]


class _Attention(Protocol):
    def __call__(
        self, x: jax.Array, *, sight: Sight, window: int, runtime: Runtime, memory: KeyValues | None = None
    ) -> AttentionOut: ...


class _FeedForward(Protocol):
    def __call__(self, x: jax.Array, *, sight: Sight, runtime: Runtime) -> FeedForwardOut: ...


class Block(nnx.Module):
    """x + attention(x), then x + feed_forward(x), each branch normed before, after or both (`norm_placement`)."""

    def __init__(self, config: ModelConfig, *, attention: _Attention, mlp: _FeedForward, rngs: nnx.Rngs):
        before, after = config.norm_placement in ("pre", "both"), config.norm_placement in ("post", "both")
        self.attention_norm = make_norm(config, rngs=rngs) if before else None
        self.attention = attention
        self.attention_out_norm = make_norm(config, rngs=rngs) if after else None
        self.mlp_norm = make_norm(config, rngs=rngs) if before else None
        self.mlp = mlp
        self.mlp_out_norm = make_norm(config, rngs=rngs) if after else None

    def __call__(
        self, x: jax.Array, *, sight: Sight, window: int, runtime: Runtime, memory: KeyValues | None = None
    ) -> LayerOut:
        """(B, S, D) -> the stream after the block, and what the layer returns besides."""
        with jax.named_scope("attention"):
            branch = self.attention_norm(x) if self.attention_norm else x
            attended = self.attention(branch, sight=sight, window=window, runtime=runtime, memory=memory)
            branch = self.attention_out_norm(attended.out) if self.attention_out_norm else attended.out
            x = runtime.constrain(x + branch, ("batch", "residual", None))
        with jax.named_scope("mlp"):
            fed = self.mlp(self.mlp_norm(x) if self.mlp_norm else x, sight=sight, runtime=runtime)
            branch = self.mlp_out_norm(fed.out) if self.mlp_out_norm else fed.out
            x = runtime.constrain(x + branch, ("batch", "residual", None))
        return LayerOut(x, attended.memory, fed.aux)


def make_block(config: ModelConfig, rngs: nnx.Rngs) -> Block:
    """A block of grouped-query or latent attention, and a dense feed-forward half or experts."""
    attention = LatentAttention if config.attention.latent.kv_dim else GroupedQueryAttention
    feed_forward = MoeMlp if config.moe.experts else Mlp
    return Block(
        config,
        attention=attention(config, rngs=rngs),
        mlp=feed_forward(config, rngs=rngs),
        rngs=rngs,
    )


class Decoder(nnx.Module):
    """Holds float32 parameters and the config; everything else is handed to its methods."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        make_block: Callable[[ModelConfig, nnx.Rngs], Block] = make_block,
    ):
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        dense, first = dataclasses.replace(config, moe=MoeConfig()), config.moe.dense_layers
        self.prefix = stack(functools.partial(make_block, dense), rngs=rngs, count=first) if first else None
        self.layers = stack(functools.partial(make_block, config), rngs=rngs, count=config.num_layers - first)
        self.final_norm = make_norm(config, rngs=rngs)
        self.head = None if config.tie_embeddings else Head(config, rngs=rngs)
        more = functools.partial(MtpLayer, config, make_block=make_block)
        self.mtp = stack(lambda own: more(rngs=own), rngs=rngs, count=config.mtp_layers) if config.mtp_layers else None

    def hidden(
        self,
        tokens_BS: jax.Array,
        *,
        positions_BS: jax.Array,
        segments_BS: jax.Array | None,
        runtime: Runtime,
        real_BS: jax.Array | None = None,
        longest: jax.Array | None = None,
    ) -> HiddenOut:
        """Runs the model over whole rows.

        Args:
          tokens_BS, positions_BS: int32.
          segments_BS: int32 document numbers; a token sees its own document only. None: a row is one document.
          real_BS: bool, False at padding, which then takes no part in a router's counts. None: all hold tokens.
          longest: int32, () as of `longest_row`, where these rows are a part of a batch, or (B, S) as of
            `document_lengths`. None: `longest_row` of these rows.
        """
        sight = _whole_rows(positions_BS, segments_BS, real_BS, longest)
        out = self._run(tokens_BS, sight=sight, runtime=runtime, memory=None)
        return HiddenOut(out.x, {"residual": out.rms}, out.aux)

    def further(
        self,
        hidden_BSD: jax.Array,
        tokens_BS: Sequence[jax.Array],
        *,
        positions_BS: jax.Array,
        segments_BS: jax.Array | None,
        runtime: Runtime,
        real_BS: jax.Array | None = None,
        longest: jax.Array | None = None,
    ) -> FurtherOut:
        """What `config.mtp_layers` layers predict further tokens from; arguments besides as of `hidden`.

        Args:
          hidden_BSD: of the model proper.
          tokens_BS: of each layer, int32: at position i of that of layer k stands token i + k, k counted from 1.
        """
        windows, first = self.config.attention.windows, self.config.num_layers
        if self.mtp is None:
            raise ValueError("model.mtp_layers is 0: there are no layers that predict further tokens")
        with jax.named_scope("mtp"):
            return run_mtp(
                self.mtp,
                hidden_BSD,
                [self.embed(tokens, positions_BS, runtime=runtime) for tokens in tokens_BS],
                sight=_whole_rows(positions_BS, segments_BS, real_BS, longest),
                windows=tuple(windows[(first + k) % len(windows)] for k in range(self.config.mtp_layers)),
                runtime=runtime,
            )

    def decode(self, tokens_Bt: jax.Array, *, cache: Cache, runtime: Runtime) -> DecodeOut:
        """Continues every row of the cache by t tokens: a prefill with t > 1, a decoding step with t = 1.

        The first call is given the prompts, padded on the left as `Cache` says. The caller sees to it that no more
        than C tokens are written in all; beyond that, the last slots would be overwritten.
        """
        slots = cache.used + jnp.arange(tokens_Bt.shape[1], dtype=jnp.int32)
        padding = cache.padding[:, None]
        real = slots >= padding
        # Slots that are not filled yet come after every query, so that causality hides them.
        sight = Sight(
            positions=jnp.maximum(slots - padding, 0),
            segments_q=real.astype(jnp.int32),
            segments_k=(cache.slots >= padding).astype(jnp.int32),
            offset=cache.used,
            real=real,
            longest=cache.longest[:, None],
        )
        out = self._run(tokens_Bt, sight=sight, runtime=runtime, memory=cache.memory)
        return DecodeOut(out.x, cache._replace(memory=out.memory, used=cache.used + tokens_Bt.shape[1]))

    def head_matrix(self) -> jax.Array:
        """The output matrix (D, V); the transposed embedding if they are tied."""
        return self.embedding.table[...].T if self.head is None else self.head.matrix()

    def logits(self, hidden_BSD: jax.Array) -> jax.Array:
        """(B, S, D) -> (B, S, V) float32, soft-capped as the config says."""
        return capped_logits(hidden_BSD, self.head_matrix(), softcap=self.config.logits_softcap)

    def _run(
        self, tokens: jax.Array, *, sight: Sight, runtime: Runtime, memory: tuple[Memories, ...] | None
    ) -> _RunOut:
        x = self.embed(tokens, sight.positions, runtime=runtime)
        with jax.named_scope("layers"):
            rms, memories = [], []
            aux: dict[str, jax.Array] = {}
            cycles = stack_windows(self.config)
            for i, (stacked, windows) in enumerate(zip(self.stacks(), cycles, strict=True)):
                own = memory[i] if memory else None
                out = run_stack(stacked, x, sight=sight, windows=windows, runtime=runtime, memory=own)
                if aux:
                    raise ValueError(f"layers before the last stack return {sorted(aux)}; only the last stack may")
                x, aux = out.x, out.aux
                rms.append(out.rms)
                memories.append(out.memory)
        return _RunOut(self.finish(x, runtime=runtime), jnp.concatenate(rms), tuple(memories), aux)

    def embed(self, tokens_BS: jax.Array, positions_BS: jax.Array, *, runtime: Runtime) -> jax.Array:
        """(B, S) int32 -> (B, S, D) in the compute dtype: the stream before the first layer."""
        with jax.named_scope("embed"):
            return self.embedding(tokens_BS, positions_BS, runtime=runtime)

    def finish(self, x_BSD: jax.Array, *, runtime: Runtime) -> jax.Array:
        """(B, S, D) -> (B, S, D): the stream after the last layer, normed for the head."""
        with jax.named_scope("final_norm"):
            return runtime.constrain(self.final_norm(x_BSD), ("batch", "seq", None))

    def stacks(self) -> list[Block]:
        """The stacks of layers, in their order."""
        return [self.layers] if self.prefix is None else [self.prefix, self.layers]


def longest_row(positions_BS: jax.Array) -> jax.Array:
    """() int32: how many positions the longest document of a batch has, by which longrope and dynamic go.

    To be asked of the whole batch, so that neither microbatches nor stages change what is computed.
    """
    return jnp.max(positions_BS) + 1


def document_lengths(positions_BS: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """(B, S) int32: how many positions the document of each position has, for longrope and dynamic.

    What is computed for a document then hangs on nothing that it shares a row or a batch with. Needs the positions of a
    row in their order, those of a document side by side, and segments that differ between neighbours.
    """
    places = jnp.arange(positions_BS.shape[1], dtype=jnp.int32)
    last = jnp.pad(segments_BS[:, 1:] != segments_BS[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(jnp.where(last, places, places.size), axis=1, reverse=True)  # the first at or behind each
    return positions_BS + 1 + end - places


def _whole_rows(
    positions: jax.Array, segments: jax.Array | None, real: jax.Array | None, longest: jax.Array | None
) -> Sight:
    longest = longest_row(positions) if longest is None else longest
    return Sight(positions, segments, segments, real=real, longest=longest)


def stack_windows(config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """The cycle of windows of each stack; it is counted from the first layer of all."""
    windows, first = config.attention.windows, config.moe.dense_layers
    if not first:
        return (windows,)
    return windows, windows[first % len(windows) :] + windows[: first % len(windows)]


def init_cache(
    config: ModelConfig,
    batch: int,
    *,
    capacity: int,
    dtype: Any,
    padding: jax.Array | None = None,
    longest: jax.Array | None = None,
) -> Cache:
    """An empty cache for `capacity` tokens a row.

    Args:
      padding: (B,) int32 as `Cache` says. None: no row is padded.
      longest: (B,) int32, positions that each row will come to have, where less than the capacity. None: as many.
    """
    counts = [config.moe.dense_layers, config.num_layers - config.moe.dense_layers]
    memory = tuple(
        tuple(
            init_memory(
                config.attention,
                (len(range(i, count, len(cycle))), batch),
                capacity=capacity,
                window=window,
                dtype=dtype,
            )
            for i, window in enumerate(cycle[:count])
        )
        for count, cycle in zip(filter(None, counts), stack_windows(config), strict=True)
    )
    pads = jnp.zeros(batch, jnp.int32) if padding is None else jnp.asarray(padding, jnp.int32)
    most = jnp.full(batch, capacity, jnp.int32) if longest is None else jnp.asarray(longest, jnp.int32)
    return Cache(memory, jnp.arange(capacity, dtype=jnp.int32), pads, jnp.zeros((), jnp.int32), most)


def split_model(config: ModelConfig) -> ModelParts:
    """The model's structure and parameter declarations, without computing anything."""
    rngs: Any = {"params": 0, DECLARE: 0}
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(**rngs)))
    return ModelParts(nnx.graphdef(model), param_specs(model))


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters, the same bits for a key under any jit and sharding."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def merge(graphdef: Any, params: Params) -> Decoder:
    """The model of `split_model(...).graphdef` with these parameters (nested dict of arrays)."""
    return nnx.merge(graphdef, params)
