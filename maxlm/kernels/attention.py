"""The attention back ends behind one declared table, and the choice among them.

What a back end can do it declares, and what it does not declare it refuses: a mask is never dropped. `dispatch` takes
the first of the table that can do what a call asks for. None is taken for a call in which it would hold more than
`SCORES_LIMIT` scores of a head at once, so that no length of a row costs memory by its square.

Shapes: B batch, S query positions, T key positions, H query heads, K kv heads, G = H / K queries a kv head, h head dim
of queries and keys, v head dim of values (h, unless a model says otherwise).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels.chunked import chunked
from maxlm.kernels.heads_loop import BLOCK_ROWS, heads_loop
from maxlm.kernels.mask import MASKED, Mask, biases, visible
from maxlm.kernels.matmul import ATTENTION_NAME, product

__all__ = [
    "BACKENDS",
    "FEATURES",
    "SCORES_LIMIT",
    "AttentionFn",
    "Backend",
    "Mask",
    "choose",
    "dispatch",
    "features",
    "heads_loop",
    "plain",
]

AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, Mask], jax.Array]
FEATURES = ("windows", "softcap", "segments", "decode", "sinks", "alibi", "value_dim")
# 16 MiB of float32, about a core's share of a large cache: all pairs of 2,048 positions, or 512 queries by 8,192 keys.
SCORES_LIMIT = 2**22


def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """Reference attention, with all S x T scores in memory and a float32 softmax.

    Args: q (B, S, H, h), k (B, T, K, h) and v (B, T, K, v), in the compute dtype.
    Returns: (B, S, H, v) in q's dtype.
    """
    (b, s, heads, dim), t, kv_heads = q.shape, k.shape[1], k.shape[2]
    grouped = q.reshape(b, s, kv_heads, heads // kv_heads, dim)
    scores = product("bskgh,btkh->bkgst", grouped, k, dtype=q.dtype, out_dtype=jnp.float32) * mask.scale
    if mask.softcap:
        scores = mask.softcap * jnp.tanh(scores / mask.softcap)
    if mask.slopes is not None:
        scores += biases(mask, mask.slopes.astype(jnp.float32).reshape(kv_heads, -1), s, t)
    scores = jnp.where(visible(mask, s, t)[:, None, None], scores, MASKED)
    if mask.sinks is not None:
        sinks = mask.sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores)[..., :t]
    out = product("bkgst,btkh->bskgh", weights, v, dtype=q.dtype).reshape(b, s, heads, v.shape[-1])
    return checkpoint_name(out, ATTENTION_NAME)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """cuDNN's fused attention on NVIDIA GPUs; arguments and result as of `plain`, features as the table says.

    Remat runs it again: its normalisers have no name to be saved by, so that its result has none either.
    """
    # jax counts the positions to the left of the query, without the query's own.
    window = (mask.window - 1, 0) if mask.window else None
    return jax.nn.dot_product_attention(
        q, k, v, scale=mask.scale, is_causal=True, local_window_size=window, implementation="cudnn"
    )


def triton(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """`kernels/triton.py`, imported where it is used: Pallas takes a while to load."""
    from maxlm.kernels import triton

    return triton.triton(q, k, v, mask)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, longest: int = 0) -> jax.Array:
    """`kernels/splash.py`, imported where it is used: Pallas takes a while to load."""
    from maxlm.kernels import splash

    return splash.splash(q, k, v, mask, longest=longest or splash.GRANTED)


def features(mask: Mask, *, head_dim: int = 0, value_dim: int = 0) -> frozenset[str]:
    """The features, out of `FEATURES`, that a back end must have to honour `mask` with heads of these dims."""
    asked = {
        "windows": bool(mask.window),
        "softcap": bool(mask.softcap),
        "segments": mask.segments_q is not None or mask.segments_k is not None,
        "decode": mask.q_offset is not None,
        "sinks": mask.sinks is not None,
        "alibi": mask.slopes is not None,
        "value_dim": head_dim != value_dim,
    }
    return frozenset(name for name in FEATURES if asked[name])


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation and what it declares to be able to do."""

    name: str
    kernel: AttentionFn
    platforms: tuple[str, ...] = ()  # of jax.Device.platform; empty: any
    dtypes: tuple[str, ...] = ()  # empty: any
    max_head_dim: int = 0  # 0: any
    head_dim_multiple: int = 1
    length_multiple: int = 1  # of S and T
    features: frozenset[str] = frozenset()
    scores: Callable[[int, int], int] | None = None  # scores of a head held at once for S and T; None: a block's

    def refusal(
        self, *, platform: str, dtype: Any, head_dim: int, needs: frozenset[str], queries: int, keys: int
    ) -> str:
        """Why this back end cannot serve, in words; empty if it can."""
        dtype = jnp.dtype(dtype).name
        if self.platforms and platform not in self.platforms:
            return f"runs on {' or '.join(self.platforms)}, not on {platform}"
        if self.dtypes and dtype not in self.dtypes:
            return f"computes in {' or '.join(self.dtypes)}, not in {dtype}"
        highest = self.max_head_dim or head_dim
        if head_dim % self.head_dim_multiple or head_dim > highest:
            return f"takes head dims up to {highest} that {self.head_dim_multiple} divides, not {head_dim}"
        if queries % self.length_multiple or keys % self.length_multiple:
            return f"takes rows that {self.length_multiple} divides, not of {queries} and {keys}"
        if missing := needs - self.features:
            return f"cannot do {', '.join(sorted(missing))}"
        held = self.scores(queries, keys) if self.scores else 0
        if held > SCORES_LIMIT:
            return f"would hold {held:,} scores of a head at once, more than {SCORES_LIMIT:,}"
        return ""

    def function(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        """Attention of q (B, S, H, h) over k (B, T, K, h) and v (B, T, K, v), to (B, S, H, v).

        Raises:
          ValueError: the mask asks for what this back end does not declare.
        """
        asked = features(mask, head_dim=q.shape[-1], value_dim=v.shape[-1])
        if missing := asked - self.features:
            raise ValueError(
                f"attention back end {self.name!r} cannot do {', '.join(sorted(missing))}; "
                "take the one that attention.choose names for this mask, or attention.plain, which does everything"
            )
        return self.kernel(q, k, v, mask)


_EVERYTHING = frozenset(FEATURES)

# In order of preference. cuDNN is handed no segments and no soft-cap because it would leave them out silently.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "cudnn",
        cudnn,
        platforms=("gpu", "cuda"),
        dtypes=("bfloat16", "float16"),
        max_head_dim=128,
        head_dim_multiple=8,
        features=frozenset({"windows"}),
    ),
    Backend(
        "triton",
        triton,
        platforms=("gpu", "cuda"),
        dtypes=("bfloat16", "float16"),
        max_head_dim=128,
        head_dim_multiple=8,
        length_multiple=64,
        features=frozenset({"segments"}),
    ),
    Backend(
        "splash",
        splash,
        platforms=("tpu",),
        dtypes=("bfloat16", "float32"),
        length_multiple=128,
        features=_EVERYTHING - {"decode", "alibi"},
    ),
    Backend(
        "heads_loop",
        heads_loop,
        platforms=("cpu",),
        features=_EVERYTHING - {"decode", "alibi"},
        scores=lambda queries, keys: min(queries, BLOCK_ROWS[1]) * keys,
    ),
    Backend("plain", plain, features=_EVERYTHING, scores=lambda queries, keys: queries * keys),
    Backend(
        "chunked_loop",
        functools.partial(chunked, together=False),
        platforms=("cpu",),
        features=_EVERYTHING,
    ),
    Backend("chunked", functools.partial(chunked, together=True), features=_EVERYTHING),
)


def choose(*, platform: str, dtype: Any, head_dim: int, needs: frozenset[str], queries: int, keys: int) -> Backend:
    """The first back end of the table that can do all that is asked.

    Args:
      platform: of the devices, e.g. "cpu", "gpu", "tpu".
      needs: what the masks will ask for, out of `FEATURES`.
      queries, keys: S and T.

    Raises:
      ValueError: no back end can serve; the message says why of each.
    """
    refusals = {}
    for backend in BACKENDS:
        why = backend.refusal(
            platform=platform, dtype=dtype, head_dim=head_dim, needs=needs, queries=queries, keys=keys
        )
        if not why:
            return backend
        refusals[backend.name] = why
    raise ValueError("no attention back end can serve: " + "; ".join(f"{k} {v}" for k, v in refusals.items()))


def dispatch(platform: str, *, longest_block: int = 0) -> AttentionFn:
    """Attention on devices of `platform`, by the back end that `choose` names for each call's mask and shapes.

    Args:
      longest_block: of splash attention; 0: of what fits without options of the compiler.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        backend = choose(
            platform=platform,
            dtype=q.dtype,
            head_dim=q.shape[3],
            needs=features(mask, head_dim=q.shape[3], value_dim=v.shape[3]),
            queries=q.shape[1],
            keys=k.shape[1],
        )
        if backend.name == "splash":
            backend = dataclasses.replace(backend, kernel=functools.partial(splash, longest=longest_block))
        return backend.function(q, k, v, mask)

    return attend
