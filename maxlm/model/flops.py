"""The one ledger of parameters and matrix-product FLOPs, read off the parameters' declarations.

Shapes: S sequence, D embed, H query heads, h head dim, V vocab, L layers. A product of (m, k) by (k, n) is 2 m k n
FLOPs; a backward pass is two products for each of the forward pass. Elementwise work is not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax.extend import core

from maxlm import tree
from maxlm.config import ModelConfig
from maxlm.jaxpr import manual_axes, opened, subprograms
from maxlm.kernels import grouped
from maxlm.model.decoder import STACKS, split_model
from maxlm.model.param import ParamSpec

TRAINING = 3  # forward, and two products of the backward pass for each


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Counts for a model and a sequence length. FLOPs are a token's, averaged over the positions of a row.

    params_by_component: embedding, attention, mlp, norms, head (absent if tied), mtp (all of the layers that predict
      further tokens; absent if there are none).
    params_active: parameters that a token meets: all but those of the routed experts that it is not sent to.
    forward: FLOPs of the forward pass in training by component: attention (projections), scores (both products of
      attention, over the positions that causality and windows leave), mlp, head (once more for each layer of mtp), mtp
      (its projections and feed-forward halves). Documents that end within a row see less still.
    six_n: 6 N, N being the active parameters without the tables that are only looked up (Kaplan et al. 2020).
    """

    params_by_component: Mapping[str, int]
    params_active: int
    forward: Mapping[str, float]
    six_n: float

    @property
    def params_total(self) -> int:
        """All parameters; tied ones once."""
        return sum(self.params_by_component.values())

    @property
    def params_nonembedding(self) -> int:
        """Parameters without the embedding table and the head."""
        return self.params_total - sum(self.params_by_component.get(name, 0) for name in ("embedding", "head"))

    @property
    def causal_exact(self) -> float:
        """Training FLOPs a token that the model asks for."""
        return TRAINING * sum(self.forward.values())


def ledger(config: ModelConfig, *, sequence_length: int) -> Ledger:
    """The counts of a resolved model config over rows of `sequence_length` positions."""
    specs: dict[str, ParamSpec] = tree.paths(split_model(config).specs)
    params: dict[str, int] = {}
    active = 0
    forward: dict[str, float] = {}
    for path, spec in specs.items():
        component = _component(path)
        params[component] = params.get(component, 0) + spec.size
        met = spec.size
        if "expert" in spec.logical:
            met = spec.size // config.moe.experts * config.moe.active
        active += met
        if spec.contract:
            forward[component] = forward.get(component, 0.0) + 2.0 * met
    if config.tie_embeddings:
        forward["head"] = 2.0 * specs["embedding/table"].size
    forward["head"] *= 1 + config.mtp_layers
    layers = config.num_layers + config.mtp_layers
    looked_up = params["embedding"] - (specs["embedding/table"].size if config.tie_embeddings else 0)
    # Query times key and weight times value: 2 H h FLOPs each for a position seen.
    seen = 2.0 * config.attention.q_heads * (config.attention.head_dim + config.attention.value_dim)
    windows = config.attention.windows
    positions = [positions_seen(windows[i % len(windows)], sequence_length) for i in range(layers)]
    return Ledger(
        params_by_component=params,
        params_active=active,
        forward=forward | {"scores": seen * sum(positions)},
        six_n=6.0 * (active - looked_up),
    )


def _component(path: str) -> str:
    parts = path.split("/")
    if parts[0] == "mtp":
        return "mtp"
    if any(part.endswith("norm") for part in parts[:-1]):
        return "norms"
    return parts[1] if parts[0] in STACKS else parts[0]


def positions_seen(window: int, sequence: int) -> float:
    """Positions that a query sees, its own included, on average over a row; window 0 is no limit."""
    reach = min(window or sequence, sequence)
    return (reach * (reach + 1) / 2 + (sequence - reach) * reach) / sequence


def count_matmul_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> int:
    """FLOPs of all `dot_general`s that a run of the program performs.

    A scan's body counts once a trip, a `cond` as its dearest branch, a `shard_map` for all of its devices, a grouped
    product (`kernels.grouped`) as each row by one matrix.

    Raises:
      ValueError: a `while` with products in it, whose trips are not known before it runs.
    """
    return sum(_equation_flops(equation) for equation in opened(jaxpr).eqns)


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name in ("jit", "pjit") and params["name"] in grouped.NAMES:
        return _grouped_flops(equation)
    inner = [count_matmul_flops(sub) for sub in subprograms(params)]
    if name == "cond":
        return max(inner)
    if name == "while" and sum(inner):
        raise ValueError(
            "matrix products inside a while loop cannot be counted, as its trips are unknown; use scan, or a "
            "fori_loop with constant bounds"
        )
    trips = params["length"] if name == "scan" else 1
    if name == "shard_map":
        trips = math.prod(params["mesh"].shape[axis] for axis in manual_axes(params))
    return trips * sum(inner)


def _grouped_flops(equation: Any) -> int:
    """Of each row by one of the (E, D, F) matrices, or into one of them.

    What a scan has hoisted out of its body has the same name, but neither matrices nor rows.
    """
    shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
    matrices = [shape[1:] for shape in shapes if len(shape) == 3]
    rows = [shape[0] for shape in shapes if len(shape) == 2]
    return 2 * rows[0] * math.prod(matrices[0]) if rows and matrices else 0
