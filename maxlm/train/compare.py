"""What a training step computes on one mesh, held against what it computes on another.

The program compared is the very step that trains: its optimizer is replaced by one that leaves the parameters alone and
keeps the gradients, clipping is off, and everything else is as in a run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm import tree
from maxlm.config import Config
from maxlm.data.batch import Batch
from maxlm.model.param import ParamSpec
from maxlm.model.runtime import Runtime
from maxlm.optim.optimizers import Updated
from maxlm.parallel.mesh import make_mesh
from maxlm.train.setup import make_setup, place_batch
from maxlm.train.state import initial_state


class GradientRecorder:
    """An optimizer that changes nothing; its state is the gradients of the last step, float32, in parameter order."""

    def __init__(self, specs: dict[str, Any]):
        self.specs = specs

    def init(self, params: Any) -> Any:
        """Zeros like the parameters."""
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, grads: Any, opt_state: Any, params: Any, *, lr: jax.Array) -> Updated:
        """No update, and the gradients as the state."""
        return Updated(jax.tree.map(jnp.zeros_like, params), grads)

    def shardings(self, opt_state: Any, place: Any) -> Any:
        """Those of the parameters."""
        return tree.map_paths(lambda _, spec: place(spec.logical), self.specs)


class Computed(NamedTuple):
    """What a step on a batch computes.

    metrics: scalars, and with experts `load` as of `expert_loads`.
    gradients, params: by path, the parameters being those after the step.
    program: its text.
    """

    metrics: dict[str, Any]
    gradients: dict[str, np.ndarray]
    params: dict[str, np.ndarray]
    program: str


def expert_loads(terms: dict[str, Any]) -> dict[str, jax.Array]:
    """`load`: how many tokens each expert of each layer was given, (L, E) float32; {} without experts."""
    return {"load": terms["experts"]["load"]} if terms["experts"] else {}


def loss_and_gradients(
    config: Config,
    batch: Batch,
    *,
    params: Any,
    devices: Sequence[jax.Device] | None = None,
    runtime: Runtime | None = None,
) -> Computed:
    """One step of a resolved config's program on its mesh.

    Args:
      batch: global, as NumPy arrays.
      params: nested dict of arrays to start from.
      devices: of the mesh; None: all.
      runtime: how the model is run; None: as in a run on this mesh. `Runtime()` is the plain reference.
    """
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip_norm=0.0))
    mesh = make_mesh(config.parallel, devices)
    setup = make_setup(
        config, mesh, make_optimizer=lambda _, specs: GradientRecorder(specs), runtime=runtime, watch=expert_loads
    )
    state = jax.device_put(initial_state(config, setup.optimizer, params=params), setup.shardings)
    placed = place_batch(mesh, batch.tokens.shape, lambda rows: jax.tree.map(lambda x: x[rows], batch))
    program = setup.compile(*batch.tokens.shape)
    state, metrics = program(state, placed)
    gradients, after = (tree.paths(jax.device_get(x)) for x in (state.opt_state, state.params))
    return Computed(jax.device_get(metrics), gradients, after, program.compiled.as_text() or "")


class Distance(NamedTuple):
    """How far one result is from another, over what is allowed: above 1 is too far. what: a metric, or a path."""

    share: float
    what: str


def distances(got: Computed, expected: Computed) -> list[Distance]:
    """The losses, every gradient leaf and which experts the tokens went to, the farthest first.

    The counts of every expert of every layer have to be equal. Otherwise allowed is what float32 sums in another order
    account for: 1e-5 of a loss, and of a gradient leaf 1e-4 of its norm and 1e-7 of the norm of all, since some are
    truly zero.
    """
    found = []
    for name in ("loss", "z_loss", "mtp_loss", "balance_loss", "router_z_loss"):
        if name in expected.metrics:
            there, here = float(expected.metrics[name]), float(got.metrics[name])
            found.append(Distance(_share(abs(here - there), 1e-5 * abs(there) + 1e-7), name))
    everything = math.sqrt(sum(float(np.sum(np.square(g))) for g in expected.gradients.values()))
    for path, g in expected.gradients.items():
        apart, norm = float(np.linalg.norm(got.gradients[path] - g)), float(np.linalg.norm(g))
        found.append(Distance(_share(apart, 1e-4 * norm + 1e-7 * everything), path))
    if "load" in expected.metrics and not np.array_equal(got.metrics["load"], expected.metrics["load"]):
        found.append(Distance(math.inf, "which experts the tokens went to"))
    return sorted(found, reverse=True)


def _share(apart: float, allowed: float) -> float:
    return apart / allowed if math.isfinite(apart) else math.inf


def drawn_params(specs: dict[str, Any], seed: int) -> dict[str, Any]:
    """Parameters of unit gain as NumPy arrays, drawn without compiling; scales and biases are not all alike."""
    draws = np.random.default_rng(seed)

    def draw(path: str, spec: ParamSpec) -> np.ndarray:
        normal = draws.standard_normal(spec.shape, np.float32)
        if spec.role == "vector":
            return 0.1 * normal + np.float32(0.0 if path.endswith("bias") else 1.0)
        fan_in = math.prod(n for n, axis in zip(spec.shape, spec.logical, strict=True) if axis in spec.contract)
        return normal / np.float32(math.sqrt(fan_in))

    return tree.map_paths(draw, specs)


def example_batch(seed: int, *, rows: int, length: int, vocab: int) -> Batch:
    """Rows of two documents each, the last row half padding, so that rows differ in how many positions bear loss."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocab, (rows, length + 1), dtype=np.int32)
    cut = rng.integers(5, length - 5, (rows, 1))
    places = np.arange(length)
    segments = 1 + (places >= cut).astype(np.int32)
    positions = np.where(places >= cut, places - cut, places).astype(np.int32)
    weights = (places != cut - 1).astype(np.float32)
    segments[-1, length // 2 :] = 0
    weights[-1, length // 2 - 1 :] = 0
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, weights)
