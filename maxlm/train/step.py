"""One training step, whole: loss, gradients, accumulation, guard, optimizer, metrics.

Shapes: A microbatches, B rows, S positions, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm import tree
from maxlm.checkpoint.digest import digest_array
from maxlm.config import Config, DataConfig
from maxlm.data.batch import Batch
from maxlm.model import moe
from maxlm.model.decoder import STACKS, Decoder, ModelParts, longest_row, merge
from maxlm.model.loss import chunked_cross_entropy
from maxlm.model.runtime import Runtime
from maxlm.optim import average, guard, scaling
from maxlm.optim.optimizers import Optimizer, Updated, clip, global_norm
from maxlm.optim.schedules import Rates, learning_rate
from maxlm.train.state import TrainState

Metrics = dict[str, Any]
TrainStep = Callable[[TrainState, Batch, Rates], tuple[TrainState, Metrics]]
PipelineFn = Callable[[dict, Batch, jax.Array, jax.Array, jax.Array], tuple[Metrics, dict]]
"""(params, batch (A, B/A, S), denominator, scale, longest row) -> loss terms and gradients of the whole batch."""


WatchFn = Callable[[Metrics], Metrics]


class Gradients(NamedTuple):
    """terms: what the loss is made of, and what was seen on the way; grads: float32, without the loss scale; tokens:
    loss-bearing positions, float32 ()."""

    terms: Metrics
    grads: dict[str, Any]
    tokens: jax.Array


GradientsFn = Callable[[dict, Batch, jax.Array], Gradients]
"""(params, batch (B, S), loss scale) -> loss and gradients of the whole batch."""

LossFn = Callable[[dict, tuple[Batch, ...], jax.Array, jax.Array, jax.Array], tuple[jax.Array, Metrics]]
"""(params, microbatch and those of `mtp`, denominators, scale, longest row) -> its share of the loss, and terms."""


def make_train_step(
    config: Config,
    parts: ModelParts,
    optimizer: Optimizer,
    runtime: Runtime,
    *,
    pipeline: PipelineFn | None = None,
    watch: WatchFn | None = None,
) -> TrainStep:
    """The function `(state, batch, rates) -> (state, metrics)`; jit it with the state donated.

    The batch is the global one: int32 and float32 arrays (B, S) over the whole mesh. The loss is the mean over all
    loss-bearing positions of the global batch, so that neither accumulation nor the mesh changes it; so is that of
    each layer that predicts further tokens, over the positions that have such a token. Metrics are
    scalars (of the experts' load the mean over layers), and `norms`, a dict of per-layer float32 arrays that is filled
    every `norms_every` steps. `pipeline` takes the place of accumulation where layers are spread over stages. What
    `watch` makes of the terms of the loss is among the metrics too.
    """
    gradients = make_gradients(config, parts, runtime, pipeline=pipeline)
    shifts = jnp.array([phase.from_step for phase in config.data.phases.values()], jnp.int32)

    def train_step(state: TrainState, batch: Batch, rates: Rates) -> tuple[TrainState, Metrics]:
        terms, grads, tokens = gradients(state.params, batch, scaling.loss_factor(state.scale, config.train.precision))

        with jax.named_scope("guard"):
            norm = global_norm(grads)
            overflow = scaling.overflowed(state.scale, norm)
            # A phase of other data has other losses: what was usual before says nothing about them.
            history = guard.restart(state.guard, jnp.isin(state.step, shifts))
            # Needs nothing of the update, so that the selection is a part of the pass that writes the new state.
            verdict = guard.judge(config.optim.guard, history, loss=terms["loss"], grad_norm=norm, excused=overflow)
            accept = verdict.accept

        with jax.named_scope("optimizer"):
            lr = learning_rate(config.optim.schedule, rates, state.step)

            def update() -> Updated:
                clipped = clip(grads, norm, max_norm=config.optim.clip_norm)
                return optimizer.update(clipped, state.opt_state, state.params, lr=lr)

            updates, opt_state = update()
            params = jax.tree.map(jnp.add, state.params, updates)
            if config.model.moe.selection_bias:
                params = moe.moved_biases(params, terms["experts"]["load"], rate=config.model.moe.bias_rate)
            new = TrainState(
                step=state.step + 1,
                updates=state.updates + accept.astype(jnp.int32),
                params=guard.select(accept, params, state.params),
                opt_state=guard.select(accept, opt_state, state.opt_state),
                average=guard.select(
                    accept, average.update_average(state.average, params, config.optim.ema_decay), state.average
                ),
                guard=verdict.guard,
                scale=scaling.update_scale(state.scale, overflow),
            )

        with jax.named_scope("metrics"):
            metrics = {
                **loss_metrics(terms),
                "grad_norm": norm,
                "lr": lr,
                "tokens": tokens,
                "batch": digest_array(batch.tokens)[0],  # which tokens these were, on any mesh
                "accepted": accept,
                "loss_limit": verdict.loss_limit,
                "norm_limit": verdict.norm_limit,
                "rejections_in_row": new.guard.in_row,
                "rejections": new.guard.total,
                "updates": new.updates,
                "loss_scale": state.scale.scale,
                "norms": every(
                    config.train.norms_every, state.step, layer_norms(state.params, grads, update, terms=terms)
                ),
                **(watch(terms) if watch else {}),
            }
        return new, metrics

    return train_step


def make_gradients(
    config: Config, parts: ModelParts, runtime: Runtime, *, pipeline: PipelineFn | None = None
) -> GradientsFn:
    """Loss and gradients of a step, a microbatch at a time, or by `pipeline`, which takes the place of accumulation."""
    count = config.train.accumulation
    value_and_grad = jax.value_and_grad(make_loss(config, parts, runtime), has_aux=True)

    def whole(params: dict, batches: tuple[Batch, ...], *of_all: jax.Array) -> tuple[Metrics, dict]:
        if count == 1 and pipeline is None:
            (_, terms), grads = value_and_grad(params, batches, *of_all)
            return terms, grads

        def split(x: jax.Array) -> jax.Array:
            # Row r goes to microbatch r % A, so that every device keeps the rows that it already holds.
            x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
            return runtime.constrain(x, (None, "batch", "seq"))

        def add(total: tuple, micro: tuple[Batch, ...]) -> tuple[tuple, None]:
            (_, terms), grads = value_and_grad(params, micro, *of_all)
            return jax.tree.map(jnp.add, total, (terms, grads)), None

        micros = jax.tree.map(split, batches)
        if pipeline is not None:
            denominators, scale, longest = of_all
            return pipeline(params, micros[0], denominators[0], scale, longest)
        shapes = jax.eval_shape(lambda: value_and_grad(params, jax.tree.map(lambda x: x[0], micros), *of_all))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0][1], shapes[1]))
        (terms, grads), _ = jax.lax.scan(add, zeros, micros)
        terms["activations"] = jax.tree.map(lambda x: x / count, terms["activations"])
        return terms, grads

    def gradients(params: dict, batch: Batch, scale: jax.Array) -> Gradients:
        batches = with_further(batch, config.model.mtp_layers)
        counted = jnp.stack([one.weights.sum() for one in batches])
        with jax.named_scope("loss_and_gradients"):
            denominators, longest = jnp.maximum(counted, 1.0), longest_row(batch.positions)
            terms, grads = whole(params, runtime.arrange(batches), denominators, scale, longest)
            # Exact, as the scale is a power of two.
            grads = jax.tree.map(lambda g: g.astype(jnp.float32) * (1.0 / scale), grads)
        return Gradients(terms, grads, counted[0])

    return gradients


def make_loss(config: Config, parts: ModelParts, runtime: Runtime) -> LossFn:
    """A microbatch's share of the loss, times the loss scale; all but the microbatch is of the whole batch."""
    separate = separates_documents(config.data)

    def loss(
        params: dict, batches: tuple[Batch, ...], denominators: jax.Array, scale: jax.Array, longest: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        model, (batch, *more) = merge(parts.graphdef, params), batches
        rows: Any = {
            "positions_BS": batch.positions,
            "segments_BS": batch.segments if separate else None,
            "real_BS": batch.segments > 0,
            "runtime": runtime,
            "longest": longest,
        }
        out = model.hidden(batch.tokens, **rows)
        total, terms = head_loss(config, model, out.hidden_BSD, batch, denominator=denominators[0], runtime=runtime)
        counts = out.aux
        if more:
            ahead = model.further(out.hidden_BSD, [one.tokens for one in more], **rows)
            counts = jax.tree.map(lambda *layers: jnp.concatenate(layers), counts, ahead.aux)
            found = [
                head_loss(config, model, hidden, one, denominator=denominator, runtime=runtime)
                for hidden, one, denominator in zip(ahead.hidden, more, denominators[1:], strict=True)
            ]
            total += config.train.mtp_weight * sum(part for part, _ in found) / len(more)
            terms["mtp_loss"] = sum(own["loss"] for _, own in found) / len(more)
        # Of the rows of the whole batch, as the denominator is of its positions.
        aux = moe.auxiliary_losses(config.model.moe, counts, rows=batch.tokens.shape[0] * config.train.accumulation)
        return (total + aux.total) * scale, terms | {"experts": aux.terms, "activations": out.norms}

    return loss


def loss_metrics(terms: Metrics) -> Metrics:
    """The scalars among the terms of the loss."""
    scalars = {name: terms[name] for name in ("loss", "z_loss", "mtp_loss") if name in terms}
    return scalars | moe.scalars(terms["experts"])


def layer_norms(
    params: dict[str, Any], grads: dict[str, Any], update: Callable[[], Updated], *, terms: Metrics
) -> dict[str, Callable[[], Any]]:
    """What computes the per-layer norms of a step, by kind; those of the updates out of updates made once more.

    Operands of a conditional are arrays in memory: the step's own updates would be, in every step, for one of many.
    """
    norms: dict[str, Callable[[], Any]] = {
        "weights": lambda: layer_rms(params),
        "gradients": lambda: layer_rms(grads),
        "updates": lambda: layer_rms(update().updates),
        "activations": lambda: terms["activations"],
    }
    if experts := terms["experts"]:
        norms["experts"] = lambda: moe.layer_loads(experts)
    return norms


def head_loss(
    config: Config, model: Decoder, hidden: jax.Array, batch: Batch, *, denominator: jax.Array, runtime: Runtime
) -> tuple[jax.Array, Metrics]:
    """Loss of normed hidden states (B, S, D): () float32, and the terms that it is made of."""
    sums = chunked_cross_entropy(
        hidden,
        model.head_matrix(),
        batch.targets,
        batch.weights,
        chunk=config.train.loss_chunk,
        softcap=config.model.logits_softcap,
        z_loss=config.train.z_loss,
        spread=runtime.spread_loss,
    )
    nll, z = sums.nll_sum / denominator, sums.z_sum / denominator
    return nll + config.train.z_loss * z, {"loss": nll, "z_loss": z}


def with_further(batch: Batch, layers: int) -> tuple[Batch, ...]:
    """The batch, and what each layer of `mtp` is given: tokens and targets that are one position further each time.

    A target counts where it and all that lead to it count: they are of one document then, also where documents see each
    other. The last position of a row has none. Needs the positions of a row in their order.
    """

    def shifted(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

    batches = [batch]
    for _ in range(layers):
        last = batches[-1]
        weights = jnp.minimum(last.weights, shifted(last.weights))
        batches.append(last._replace(tokens=last.targets, targets=shifted(last.targets), weights=weights))
    return tuple(batches)


def separates_documents(data: DataConfig) -> bool:
    """Whether attention has to keep the documents of a row apart. Padding at the end of a row is behind causality."""
    return data.mask_documents


def layer_rms(params: dict[str, Any]) -> dict[str, jax.Array]:
    """Root mean square of every array, float32: (L,) for stacked ones, () for the rest; keyed by path."""

    def rms(path: str, x: jax.Array) -> jax.Array:
        axes = tuple(range(1, x.ndim)) if path.split("/")[0] in STACKS else None
        return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=axes))

    return {path: rms(path, x) for path, x in tree.paths(params).items()}


def every(steps: int, step: jax.Array, values: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """The values on steps that `steps` divides, zeros (and no work) on the others; {} if `steps` is 0."""
    if not steps:
        return {}

    def compute() -> dict[str, Any]:
        return {name: value() for name, value in values.items()}

    def skip() -> dict[str, Any]:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))

    return jax.lax.cond(step % steps == 0, compute, skip)
