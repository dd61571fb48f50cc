"""The coordinate check: do activations move as much in a wide model as in a narrow one?

Yang et al. 2021 (arXiv 2203.03466, appendix D.1). Models of several widths take a few steps at one learning rate on
the same tokens. Where the rule for widths is right, the residual stream and what the steps change in the logits have
the same scale at every width; where it is wrong, they grow (or die) as a power of the width, and the slope shows which.
Of the logits it is the change: at the beginning they are smaller in a wide model under the transfer rule.

Shapes: B rows, S positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import Config
from maxlm.data.batch import Batch
from maxlm.model.decoder import init_params, merge
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.study.ladder import Rules, Shape, parametrized, shaped
from maxlm.train.setup import Setup, make_setup
from maxlm.train.state import TrainState, initial_state

WALKED = 16  # different tokens in the rows
LARGEST_SLOPE = 0.3  # of the logarithm of a scale against that of the width; the standard rule's are near 1


class Coordinate(NamedTuple):
    """The scale of one activation.

    scales: its root mean square, (widths, steps).
    slope: of log scale against log width, after the last step.
    """

    name: str
    scales: np.ndarray
    slope: float


class Check(NamedTuple):
    """The outcome for one rule."""

    rule: str
    widths: tuple[int, ...]
    coordinates: tuple[Coordinate, ...]

    @property
    def passed(self) -> bool:
        """Whether no activation's scale depends on the width by more than LARGEST_SLOPE."""
        return all(abs(coordinate.slope) <= LARGEST_SLOPE for coordinate in self.coordinates)

    def sentence(self) -> str:
        """For a log."""
        worst = max(self.coordinates, key=lambda coordinate: abs(coordinate.slope))
        return (
            f"coordinate check, {self.rule} rule: {'passed' if self.passed else 'failed'}; widths {self.widths[0]} to "
            f"{self.widths[-1]}, steepest slope {worst.slope:+.2f} ({worst.name}), at most {LARGEST_SLOPE} allowed"
        )


def check_coordinates(
    base: Config,
    rules: Rules,
    *,
    widths: Sequence[int],
    layers: int = 2,
    steps: int = 10,
    rate: float = 0.01,
    seeds: Sequence[int] = (0, 1),
) -> Check:
    """Measures the logits' change and the stream after each layer under `rules.rule`.

    Args:
      base: any config whose model the rules can shape; its data is not read.
      steps: enough that what is learned outweighs what the head makes of the first changes as it was drawn, which falls
        with the root of the width under the transfer rule: after four steps that is still most of the logits' change.
      rate: the constant learning rate of every step and width, before the rule's multipliers.
      seeds: of the parameters; scales are averaged over them.
    """
    names: list[str] = []
    scales, keys = [], [jax.random.key(seed) for seed in seeds]
    for width in widths:
        config = _config(base, rules, Shape(layers, width), steps=steps, rate=rate)
        program = _program(make_setup(config, make_mesh(config.parallel, jax.devices()[:1])), steps)
        measured = [{name: np.asarray(each, float) for name, each in program(key).items()} for key in keys]
        names = list(measured[0])
        scales.append([np.mean([run[name] for run in measured], axis=0) for name in names])
    by_name = np.swapaxes(np.array(scales), 0, 1)  # (names, widths, steps)
    logs = np.log(widths)
    coordinates = [
        Coordinate(name, values, float(np.polyfit(logs, np.log(values[:, -1]), 1)[0]))
        for name, values in zip(names, by_name, strict=True)
    ]
    return Check(rules.rule, tuple(widths), tuple(coordinates))


def _config(base: Config, rules: Rules, shape: Shape, *, steps: int, rate: float) -> Config:
    data = dataclasses.replace(base.data, sequence_length=min(base.data.sequence_length, 32), batch_size=8)
    optim = dataclasses.replace(base.optim, peak_lr=rate, schedule="constant", warmup_steps=0, decay_steps=0)
    train = dataclasses.replace(
        base.train,
        steps=steps,
        precision="float32",
        reduce_dtype="float32",
        norms_every=0,
        budget_seconds=0.0,
        accumulation=1,
    )
    parallel = dataclasses.replace(
        base.parallel, data=1, fsdp=1, pipeline=1, context=1, expert=1, tensor=1, virtual_stages=1
    )
    plain = dataclasses.replace(base, data=data, optim=optim, train=train, parallel=parallel)
    return resolve(parametrized(shaped(plain, shape, rules), rules, base=plain))


def _program(setup: Setup, steps: int) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """From the key of the parameters to the scales after each step, (steps,) by name; compiled once for all keys."""
    config = setup.config
    batch = _walks(config.data.batch_size, config.data.sequence_length, vocab=config.model.vocab_size)

    def activations(params: Any) -> dict[str, jax.Array]:
        model = merge(setup.parts.graphdef, params)
        out = model.hidden(batch.tokens, positions_BS=batch.positions, segments_BS=None, runtime=setup.runtime)
        return {"logits": model.logits(out.hidden_BSD), "streams": out.norms["residual"]}

    def measure(key: jax.Array) -> dict[str, jax.Array]:
        state = initial_state(config, setup.optimizer, init_params(config.model, key))
        first = activations(state.params)["logits"]

        def one(state: TrainState, _: None) -> tuple[TrainState, dict[str, jax.Array]]:
            after, _metrics = setup.train_step(state, batch, setup.rates())
            now = activations(after.params)
            return after, {
                "change of the logits": jnp.sqrt(jnp.mean(jnp.square(now["logits"] - first))),
                **{f"stream after layer {n + 1}": now["streams"][n] for n in range(config.model.num_layers)},
            }

        return jax.lax.scan(one, state, length=steps)[1]

    return jax.jit(measure)


def _walks(rows: int, positions: int, *, vocab: int) -> Batch:
    """Rows (B, S) in which each of a few tokens is always followed by the same: what they teach is soon learnt.

    Of random tokens every one would teach something else, and what a step does to all the others is noise that falls
    with the width whatever the rule.
    """
    kinds = min(WALKED, vocab)
    begin = np.arange(rows)[:, None] * (kinds // rows or 1)
    walk = (begin + 7 * np.arange(positions + 1)) % kinds
    shape = (rows, positions)
    return Batch(
        tokens=jnp.asarray(walk[:, :-1], jnp.int32),
        targets=jnp.asarray(walk[:, 1:], jnp.int32),
        segments=jnp.ones(shape, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(positions, dtype=jnp.int32), shape),
        weights=jnp.ones(shape, jnp.float32),
    )
