"""Layers that predict further tokens: which positions bear loss, that meshes agree, and that nothing else changes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm import tree
from maxlm.config import MoeConfig, ParallelConfig
from maxlm.data.batch import Batch
from maxlm.model.decoder import merge, split_model
from maxlm.model.moe import auxiliary_losses
from maxlm.model.runtime import Runtime
from maxlm.resolve import resolve
from maxlm.train.compare import drawn_params, loss_and_gradients
from maxlm.train.step import with_further
from tests.compared import too_far
from tests.tiny import MODEL, random_batch, tiny_config

ROWS, LENGTH = 8, 32
BATCH = random_batch(0, ROWS, LENGTH)
EXPERTS = MoeConfig(experts=4, active=2, dim=32, shared_dim=16, balance_loss=0.05, selection_bias=True, bias_rate=0.01)
MESHES = {
    "data 2, context 2, tensor 2": (dict(data=2, context=2, tensor=2), {}),
    "fsdp 2, expert 2, tensor 2, accumulation 2, remat": (
        dict(data=1, fsdp=2, expert=2, tensor=2),
        {"train__accumulation": 2, "train__remat": "full"},
    ),
}


def config_of(parallel=None, **leaves):
    config = tiny_config(
        "unused",
        model=dataclasses.replace(MODEL, num_layers=1, moe=EXPERTS, mtp_layers=2),
        data__sequence_length=LENGTH,
        parallel=ParallelConfig(**(parallel or {"data": 1})),
        train__norms_every=0,
        **leaves,
    )
    return resolve(config, devices=8 if parallel else 1)


PARAMS = drawn_params(split_model(config_of().model).specs, 0)


@functools.cache
def reference():
    """One device, plain attention, no rematerialisation."""
    return loss_and_gradients(config_of(), BATCH, params=PARAMS, devices=jax.devices()[:1], runtime=Runtime())


def test_targets_are_further_by_one_and_stay_in_their_document():
    """Row 0 holds two documents, row 1 one that goes on behind the row; the last token of row 0 is padding."""
    tokens = np.array([[1, 2, 3, 4, 5, 0], [11, 12, 13, 14, 15, 16]])
    targets = np.array([[2, 3, 4, 5, 0, 0], [12, 13, 14, 15, 16, 17]])
    weights = np.array([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]], np.float32)
    segments = np.array([[1, 1, 1, 2, 2, 0], [1] * 6])
    given = Batch(*map(jnp.asarray, (tokens, targets, segments, segments, weights)))
    batches = with_further(given, 2)
    assert batches[0] is given
    np.testing.assert_array_equal(batches[1].tokens, targets)
    np.testing.assert_array_equal(batches[1].targets[:, :-1], targets[:, 1:])
    np.testing.assert_array_equal(batches[1].weights, [[1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(batches[2].tokens[:, :-1], targets[:, 1:])
    np.testing.assert_array_equal(batches[2].targets[:, :-2], targets[:, 2:])
    np.testing.assert_array_equal(batches[2].weights, [[0] * 6, [1, 1, 1, 1, 0, 0]])
    for later in batches[1:]:  # a token stays where it is, and sees what it saw
        np.testing.assert_array_equal(later.segments, segments)


def test_loss_and_gradients_are_those_of_the_published_equations():
    """DeepSeek-V3, equations 21 to 25, from whole logits and positions picked one by one."""
    config, (rows, positions, counts) = config_of(), _borne()
    graphdef = split_model(config.model).graphdef
    targets, ahead = np.asarray(BATCH.targets), np.zeros((2, ROWS, LENGTH), np.int32)
    for k in range(2):  # token i + 1 + k; what stands behind the row is seen by no position that bears loss
        ahead[k, :, : LENGTH - k] = targets[:, k:]

    def loss(params):
        model = merge(graphdef, params)
        given = {"positions_BS": BATCH.positions, "segments_BS": BATCH.segments, "runtime": Runtime()}
        given["real_BS"] = BATCH.segments > 0
        out = model.hidden(BATCH.tokens, **given)
        more = model.further(out.hidden_BSD, list(ahead), **given)
        means = []
        for k, hidden in enumerate([out.hidden_BSD, *more.hidden]):
            likely = jax.nn.log_softmax(model.logits(hidden))[rows[k], positions[k], targets[rows[k], positions[k] + k]]
            means.append(-jnp.sum(likely) / counts[k])
        aux = jax.tree.map(lambda *parts: jnp.concatenate(parts), out.aux, more.aux)
        balance = auxiliary_losses(config.model.moe, aux, rows=ROWS).total
        further = (means[1] + means[2]) / 2
        return means[0] + config.train.mtp_weight * further + balance, further

    (_, further), expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, PARAMS))
    np.testing.assert_allclose(reference().metrics["mtp_loss"], further, rtol=1e-5)
    assert reference().metrics["mtp_loss"] != pytest.approx(float(reference().metrics["loss"]), rel=1e-2)
    for path, g in tree.paths(jax.device_get(expected)).items():
        np.testing.assert_allclose(reference().gradients[path], g, atol=1e-6, err_msg=path)
        assert path.endswith("selection_bias") or np.abs(g).max() > 1e-4, path


def _borne():
    """Rows and positions at which each prediction counts (of the next token, of the second, of the third), and how
    many: where all tokens up to the one that is predicted are of one document."""
    found = [[], [], []]
    for k, row, i in itertools.product(range(3), range(ROWS), range(LENGTH)):
        if i + k < LENGTH and all(BATCH.weights[row, j] for j in range(i, i + k + 1)):
            found[k].append((row, i))
    counts = [len(places) for places in found]
    assert counts[0] > counts[1] > counts[2] > 0
    return [np.array(p)[:, 0] for p in found], [np.array(p)[:, 1] for p in found], counts


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_agrees_with_one_device(name):
    parallel, leaves = MESHES[name]
    got = loss_and_gradients(config_of(parallel, **leaves), BATCH, params=PARAMS)
    assert not too_far(got, reference())
    moved = [path for path in got.params if path.endswith("selection_bias")]
    assert moved == ["layers/mlp/selection_bias", "mtp/block/mlp/selection_bias"]
    for path in moved:
        np.testing.assert_array_equal(got.params[path], reference().params[path])
        assert np.abs(got.params[path] - tree.paths(PARAMS)[path]).max() > 0
