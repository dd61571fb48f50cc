"""The whole step: the same losses on any mesh and accumulation, and updates that are refused leave no trace."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm import tree
from maxlm.config import ParallelConfig, RopeConfig
from maxlm.data.batch import Batch
from maxlm.model.decoder import split_model
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train.compare import drawn_params, loss_and_gradients
from maxlm.train.setup import Program, make_setup, place_batch
from maxlm.train.state import TrainState, lower_start, make_state
from tests.compared import too_far
from tests.tiny import random_batch, tiny_config

ROWS, POSITIONS = 8, 64


class Runner:
    """A setup on a mesh, its compiled step and its state."""

    def __init__(self, parallel: ParallelConfig, **leaves):
        count = int(np.prod([abs(size) for size in parallel.sizes.values()]))
        config = tiny_config("unused", parallel=parallel, **{"train__norms_every": 0, **leaves})
        config = resolve(config, devices=count)
        self.setup = make_setup(config, make_mesh(config.parallel, jax.devices()[:count]))
        self.reset()

    @functools.cached_property
    def program(self) -> Program:
        return self.setup.compile(ROWS, POSITIONS)

    def reset(self) -> None:
        self.state: TrainState = make_state(self.setup.config, self.setup.optimizer, self.setup.shardings)

    def place(self, batch: Batch) -> Batch:
        return place_batch(self.setup.mesh, (ROWS, POSITIONS), lambda rows: jax.tree.map(lambda x: x[rows], batch))

    def step(self, batch: Batch) -> dict:
        self.state, metrics = self.program(self.state, self.place(batch))
        return jax.device_get(metrics)


@pytest.fixture(scope="module")
def plain() -> Runner:
    """One device and every setting as it comes."""
    return Runner(ParallelConfig(data=1))


@pytest.fixture(scope="module")
def alone(plain):
    """The first parameters and 20 losses on one device."""
    plain.reset()
    first = tree.paths(jax.device_get(plain.state.params))
    return first, [plain.step(random_batch(i))["loss"] for i in range(20)]


@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
        ({"data": 2, "context": 4}, 2),
        pytest.param({"data": 1, "fsdp": 4, "tensor": 2}, 1, marks=pytest.mark.slow),
        pytest.param({"data": 4}, 2, marks=pytest.mark.slow),
    ],
)
def test_mesh_and_accumulation_do_not_change_the_losses(alone, sizes, accumulation):
    """The acceptance line: 20 steps, float32, every loss within 2e-6; initial parameters bit-equal."""
    first, expected = alone
    assert expected[-1] < expected[0]
    other = Runner(ParallelConfig(**sizes), train__accumulation=accumulation)
    for path, value in tree.paths(jax.device_get(other.state.params)).items():
        assert value.tobytes() == first[path].tobytes(), path
    found = [other.step(random_batch(i))["loss"] for i in range(20)]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_accumulation_does_not_change_the_factors_of_longrope():
    """The longest row of the batch chooses them for all; alone, the other microbatches would take the short ones."""
    rope = RopeConfig(
        scaling="longrope", factor=4.0, original_length=32, short_factors=(1.0,) * 8, long_factors=(4.0,) * 8
    )
    batch, length = random_batch(0, 4), 64
    halves = np.arange(length) % 32
    batch = batch._replace(
        segments=np.full((4, length), 1, np.int32) + (np.arange(length) >= 32), positions=np.tile(halves, (4, 1))
    )
    batch.segments[2], batch.positions[2] = 1, np.arange(length)
    settings = {"model__rope": rope, "model__num_layers": 1, "model__mtp_layers": 1, "data__batch_size": 4}

    def computed(accumulation):
        config = resolve(tiny_config("unused", train__accumulation=accumulation, **settings), devices=1)
        params = drawn_params(split_model(config.model).specs, 0)
        return loss_and_gradients(config, batch, params=params, devices=jax.devices()[:1])

    assert too_far(computed(4), computed(1)) == set()


def test_parameters_and_moments_are_really_sharded():
    runner = Runner(ParallelConfig(data=1, fsdp=4, tensor=2))
    query = runner.state.params["layers"]["attention"]["query"]
    assert query.shape == (2, 32, 4, 16)
    assert query.addressable_shards[0].data.shape == (2, 8, 2, 16)
    moments = [x for x in jax.tree.leaves(runner.state.opt_state) if x.shape == query.shape]
    assert len(moments) >= 2
    assert all(x.addressable_shards[0].data.shape == (2, 8, 2, 16) for x in moments)


@pytest.fixture(scope="module")
def guarded() -> Runner:
    return Runner(ParallelConfig(data=1), optim__guard__window=16, optim__guard__min_history=8, optim__ema_decay=0.9)


def frozen(state: TrainState) -> list[bytes]:
    """The bytes of all that a refused update must leave alone."""
    kept = (state.params, state.opt_state, state.average, state.updates)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(kept))]


@pytest.mark.parametrize("poison", ["nan", "inf", "spike"])
def test_a_poisoned_batch_is_refused_once_and_leaves_no_trace(guarded, poison):
    guarded.reset()
    batch = random_batch(0)  # the same batch, so that the losses are calm
    for _ in range(12):
        assert guarded.step(batch)["accepted"]
    before = frozen(guarded.state)
    if poison == "spike":
        # Sharp parameters make the loss of the same model ten times larger on another batch: targets it has learnt
        # not to expect. Here the weights of one row are scaled, which scales its gradient and not the token count.
        bad = batch._replace(weights=spiked(batch.weights))
    else:
        bad = batch._replace(weights=np.full_like(batch.weights, float(poison)))
    metrics = guarded.step(bad)
    assert not metrics["accepted"]
    assert metrics["rejections_in_row"] == metrics["rejections"] == 1
    # What was refused is beyond what is written down beside it.
    within = metrics["loss"] <= metrics["loss_limit"] and metrics["grad_norm"] <= metrics["norm_limit"]
    assert not within and np.isfinite([metrics["loss_limit"], metrics["norm_limit"]]).all()
    assert frozen(guarded.state) == before
    assert int(guarded.state.step) == 13
    for _ in range(3):
        metrics = guarded.step(batch)
        assert metrics["accepted"] and metrics["rejections_in_row"] == 0 and metrics["rejections"] == 1
    assert int(guarded.state.updates) == 15


def spiked(weights: np.ndarray) -> np.ndarray:
    """Weights that sum to a tenth of what they did while the sum of losses stays about as large."""
    out = weights.copy()
    half = out.shape[0] // 2
    out[:half] *= -0.9 * out[half:].sum() / out[:half].sum()
    return out


@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    [({"data": 1}, 1), pytest.param({"data": 1, "pipeline": 2, "fsdp": 2}, 2, marks=pytest.mark.slow)],
)
def test_float16_overflow_halves_the_scale_and_is_not_held_against_the_run(sizes, accumulation):
    """Of microbatches the first alone: the other, of the odd rows, bears no loss."""
    settings = {"train__precision": "float16", "train__accumulation": accumulation, "optim__ema_decay": 0.5}
    runner = Runner(ParallelConfig(**sizes), **settings)
    batch = random_batch(0)
    losses = [runner.step(batch) for _ in range(10)]
    assert losses[-1]["loss"] < losses[0]["loss"] and losses[-1]["accepted"]
    before, scale = frozen(runner.state), runner.state.scale
    even = np.arange(ROWS) % 2 == 0
    bad = batch._replace(weights=batch.weights * even[:, None] if accumulation > 1 else batch.weights)
    # Far beyond what float16 holds of a gradient.
    large, ceiling = (jax.device_put(np.float32(2**40), x.sharding) for x in (scale.scale, scale.ceiling))
    runner.state = dataclasses.replace(runner.state, scale=scale._replace(scale=large, ceiling=ceiling))
    metrics = runner.step(bad)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert not metrics["accepted"] and metrics["rejections_in_row"] == 0
    assert frozen(runner.state) == before
    assert float(runner.state.scale.scale) == 2**39


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param("adafactor", marks=pytest.mark.slow), pytest.param("lion", marks=pytest.mark.slow), "muon"],
)
def test_every_optimizer_gives_the_same_losses_on_a_mesh(optimizer):
    one = Runner(ParallelConfig(data=1), optim__optimizer=optimizer)
    mesh = Runner(ParallelConfig(data=1, fsdp=2, tensor=2), optim__optimizer=optimizer)
    for i in range(5):
        np.testing.assert_allclose(
            mesh.step(random_batch(i))["loss"], one.step(random_batch(i))["loss"], rtol=1e-5, err_msg=optimizer
        )


def test_runs_that_differ_in_rates_steps_and_seed_share_a_program_and_have_their_own_rates(plain):
    changed = {"optim__peak_lr": 0.5, "optim__warmup_steps": 0, "optim__final_lr_ratio": 0.25, "train__steps": 1}
    other = Runner(ParallelConfig(data=1), seed=5, optim__schedule="linear", **changed)
    alike = Runner(ParallelConfig(data=1), optim__schedule="linear")
    assert other.setup.lower(ROWS, POSITIONS).as_text() == alike.setup.lower(ROWS, POSITIONS).as_text()
    one, two = (lower_start(r.setup.config, r.setup.optimizer, r.setup.shardings) for r in (other, alike))
    assert one.as_text() == two.as_text()
    query, drawn = (r.state.params["layers"]["attention"]["query"] for r in (other, alike))
    assert (query != drawn).any()

    program, ran_on = plain.program, plain.setup.with_steps(3).compile(ROWS, POSITIONS)
    assert ran_on.compiled is program.compiled and ran_on.rates.steps == 3 != program.rates.steps
    assert other.step(random_batch(0))["lr"] == np.float32(0.125) != alike.step(random_batch(0))["lr"]


def test_bfloat16_follows_float32(plain):
    """Bfloat16 has 8 bits: losses agree to a few parts in a thousand over a few steps, and fall alike."""
    plain.reset()
    narrow = Runner(ParallelConfig(data=1), train__precision="bfloat16")
    for i in range(5):
        np.testing.assert_allclose(narrow.step(random_batch(i))["loss"], plain.step(random_batch(i))["loss"], rtol=5e-3)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(narrow.state.params))


def test_norms_are_filled_when_due():
    runner = Runner(ParallelConfig(data=1), train__norms_every=2)
    first, second = runner.step(random_batch(0)), runner.step(random_batch(1))
    weights = first["norms"]["weights"]["layers/attention/query"]
    assert weights.shape == (2,)
    expected = make_state(runner.setup.config, runner.setup.optimizer, runner.setup.shardings).params
    query = np.asarray(expected["layers"]["attention"]["query"])
    np.testing.assert_allclose(weights, np.sqrt((query**2).mean(axis=(1, 2, 3))), rtol=1e-5)
    assert first["norms"]["activations"]["residual"].shape == (2,)
    assert all(not value.any() for value in jax.tree.leaves(second["norms"]))
