"""A small mixture of experts learns, keeps its experts busy, and says so."""

import dataclasses

import jax
import numpy as np

from maxlm import tree
from maxlm.config import MoeConfig, ParallelConfig
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train.setup import make_setup, place_batch
from maxlm.train.state import make_state
from tests.tiny import MODEL, random_batch, tiny_config

BIAS = "layers/mlp/selection_bias"


def test_losses_fall_and_load_evens_out():
    """Twelve steps on one batch, with Muon: the bias alone balances, and a refused update leaves it alone."""
    settings = MoeConfig(experts=8, active=2, dim=16, selection_bias=True, balance_loss=0.0, bias_rate=0.02)
    config = tiny_config(
        "unused",
        model=dataclasses.replace(MODEL, moe=settings),
        parallel=ParallelConfig(data=1, fsdp=2, expert=2),
        optim__optimizer="muon",
        optim__weight_decay=0.5,
        optim__decay_rules=((".*", 1.0),),
        optim__peak_lr=5e-3,
        train__norms_every=1,
    )
    config = resolve(config, devices=4)
    setup = make_setup(config, make_mesh(config.parallel, jax.devices()[:4]))
    state, program = make_state(config, setup.optimizer, setup.shardings), setup.compile(8, 64)
    batch = random_batch(0)

    def place(batch):
        return place_batch(setup.mesh, (8, 64), lambda rows: jax.tree.map(lambda x: x[rows], batch))

    assert not any(
        BIAS in jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
    )
    log = []
    for _ in range(12):
        state, metrics = program(state, place(batch))
        log.append(jax.device_get(metrics))
    losses, loads = [m["loss"] for m in log], [m["load_max_over_mean"] for m in log]
    assert losses[-1] < losses[0] - 1.0
    assert np.mean(loads[-3:]) < loads[0] - 0.1 and min(loads) >= 1
    assert all(m["dropped"] == 0 and m["balance_loss"] > 0 for m in log)
    np.testing.assert_allclose(log[0]["norms"]["experts"]["load_max_over_mean"].mean(), loads[0], rtol=1e-6)

    bias = np.asarray(tree.paths(state.params)[BIAS])
    # A whole number of steps of the rate: neither decay, nor Muon, nor clipping has touched it.
    np.testing.assert_allclose(bias / settings.bias_rate, np.round(bias / settings.bias_rate), atol=1e-3)
    assert np.abs(bias).max() > 1.5 * settings.bias_rate
    state, metrics = program(state, place(batch._replace(weights=np.full_like(batch.weights, np.nan))))
    assert not metrics["accepted"]
    np.testing.assert_array_equal(tree.paths(state.params)[BIAS], bias)
