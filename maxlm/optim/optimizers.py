"""Optimizers by parameter path: which rule, learning rate and decay every parameter gets, and the update itself.

Each rule is a chain of optax transforms that turns gradients into a direction d. The update of a parameter p is then
-lr * m * (d + decay * p) for every rule alike, with m its multiplier and the learning rate lr handed in, so that the
schedule is driven by the step and not by the optimizer's own count of updates.

Every rule makes finite updates of gradients whose global norm is finite, from a state that such gradients made: what is
divided by has an epsilon (`checks.optim.SMALLEST_EPSILON`). The guard relies on it, and judges a step by its loss and
that norm alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey, GetAttrKey
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from maxlm import tree
from maxlm.config import OptimConfig
from maxlm.optim.factored import matrix_axes, scale_by_factored_moment
from maxlm.optim.rules import match_rules

if TYPE_CHECKING:
    from maxlm.model.param import ParamSpec

T = TypeVar("T")

# Liu et al. 2025, "Muon is scalable for LLM training", section 2.2: the typical root mean square of AdamW's updates.
MUON_RMS = 0.2


class Assignment(NamedTuple):
    """What a parameter gets: its rule, the multiplier of the learning rate, the decay a step times that rate."""

    rule: str
    lr: float
    decay: float


class Updated(NamedTuple):
    """updates: to add to the parameters, float32, same tree; opt_state: the new state."""

    updates: dict[str, Any]
    opt_state: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer of a model. Its state is a dict from rule to that rule's optax state over its own parameters."""

    specs: Mapping[str, ParamSpec]
    assignments: Mapping[str, Assignment]
    transforms: Mapping[str, optax.GradientTransformation]

    def init(self, params: dict[str, Any]) -> dict[str, Any]:
        """The state before the first update."""
        return {rule: transform.init(self._members(params, rule)) for rule, transform in self.transforms.items()}

    def update(
        self, grads: dict[str, Any], opt_state: dict[str, Any], params: dict[str, Any], *, lr: jax.Array
    ) -> Updated:
        """Updates for gradients (after clipping) at the learning rate `lr`, a float32 scalar that may be traced."""
        directions: dict[str, jax.Array] = {}
        state: dict[str, Any] = {}
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        for rule, transform in self.transforms.items():
            direction, state[rule] = transform.update(
                self._members(grads, rule), opt_state[rule], self._members(params, rule)
            )
            directions.update(tree.paths(direction))

        def step(path: str, p: jax.Array) -> jax.Array:
            if path not in self.assignments:
                return jnp.zeros_like(p)
            _, multiplier, decay = self.assignments[path]
            direction = directions[path] + decay * p if decay else directions[path]
            return -(lr * multiplier) * direction

        return Updated(tree.map_paths(step, params), state)

    def shardings(self, opt_state: dict[str, Any], place: Callable[[tuple[str | None, ...]], T]) -> dict[str, Any]:
        """`place(logical axes)` for every array of a (possibly abstract) state, in the state's own structure.

        Moments have their parameter's logical axes, factored ones those that are left, counters and the like none.
        """

        def place_leaf(path: tuple[Any, ...], leaf: Any) -> T:
            field, parameter = _field_and_parameter(path)
            if not parameter:
                return place((None,) * leaf.ndim)
            spec = self.specs[parameter]
            gone = {"rows": matrix_axes(spec).fan_out, "cols": matrix_axes(spec).fan_in}.get(field, ())
            return place(tuple(name for i, name in enumerate(spec.logical) if i not in gone))

        return jax.tree_util.tree_map_with_path(place_leaf, opt_state)

    def _members(self, params: dict[str, Any], rule: str) -> dict[str, Any]:
        """The part of a parameter tree that a rule is responsible for."""
        own = {path for path, assignment in self.assignments.items() if assignment.rule == rule}
        return tree.from_paths({path: leaf for path, leaf in tree.paths(params).items() if path in own})


def assign(optim: OptimConfig, specs: dict[str, Any]) -> dict[str, Assignment]:
    """What each parameter gets, by path, from a nested dict of ParamSpec.

    Parameters that are not trained get nothing. With muon, the hidden matrices (role `matrix`) are Muon's and the rest,
    embedding and head included, AdamW's.

    Raises:
      RuleError: if decay_rules or lr_rules leave a parameter out, or hold a rule that decides nothing.
    """
    declared = {path: spec for path, spec in tree.paths(specs).items() if spec.trained}
    rates = match_rules(optim.lr_rules, declared, setting="optim.lr_rules")
    decays = match_rules(optim.decay_rules, declared, setting="optim.decay_rules")

    def assignment(path: str) -> Assignment:
        rule = "adamw" if optim.optimizer == "muon" and declared[path].role != "matrix" else optim.optimizer
        ratio = optim.muon_lr_ratio if rule == "muon" else 1.0
        return Assignment(rule, rates[path] * ratio, decays[path] * optim.weight_decay)

    return {path: assignment(path) for path in declared}


def make_optimizer(optim: OptimConfig, specs: dict[str, Any]) -> Optimizer:
    """The optimizer of the parameters declared by `specs`, a nested dict of ParamSpec.

    Raises:
      RuleError: see `assign`.
    """
    declared, assignments = tree.paths(specs), assign(optim, specs)
    rules = sorted({assignment.rule for assignment in assignments.values()})
    own = {rule: {p: declared[p] for p in assignments if assignments[p].rule == rule} for rule in rules}
    return Optimizer(declared, assignments, {rule: RULES[rule](optim, own[rule]) for rule in rules})


def global_norm(grads: dict[str, Any]) -> jax.Array:
    """The norm of all gradients together, float32 ()."""
    squares = (jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads))
    return jnp.sqrt(sum(squares, start=jnp.float32(0.0)))


def clip(grads: dict[str, Any], norm: jax.Array, *, max_norm: float) -> dict[str, Any]:
    """Gradients whose global norm is `norm`, scaled down to `max_norm` (0: as they are), in float32.

    A gradient with a norm that is not finite comes back not finite: refusing it is the guard's part.
    """
    factor = max_norm / jnp.maximum(norm, max_norm) if max_norm else 1.0
    return jax.tree.map(lambda g: g.astype(jnp.float32) * factor, grads)


def moments_in(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the moments of `inner` in `dtype` between updates, with the arithmetic in float32.

    Optax's own `mu_dtype` covers the first moment alone and multiplies by the decay in the narrow dtype.
    """
    if dtype == "float32":
        return inner

    def cast(state: optax.OptState, to: Any) -> optax.OptState:
        # Only what belongs to a parameter is a moment: Muon keeps the coefficients of its polynomial in its state too.
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(to) if _field_and_parameter(path)[1] else x, state
        )

    def init(params: optax.Params) -> optax.OptState:
        return cast(inner.init(params), dtype)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _adamw(optim: OptimConfig, specs: Mapping[str, ParamSpec]) -> optax.GradientTransformation:
    """Kingma & Ba 2015; the decay is decoupled as in Loshchilov & Hutter 2019."""
    del specs
    return moments_in(optim.moments_dtype, optax.scale_by_adam(optim.b1, optim.b2, optim.epsilon))


def _lion(optim: OptimConfig, specs: Mapping[str, ParamSpec]) -> optax.GradientTransformation:
    """Chen et al. 2023: the sign of a mean of momentum and gradient (b1); b2 is the momentum's own decay."""
    del specs
    return moments_in(optim.moments_dtype, optax.scale_by_lion(optim.b1, optim.b2))


def _adafactor(optim: OptimConfig, specs: Mapping[str, ParamSpec]) -> optax.GradientTransformation:
    """Shazeer & Stern 2018 in the form of Zhai et al. 2022: a first moment (none if b1 is 0) after the scaling.

    `moments_dtype` is the first moment's; the factored second moment is small and stays in float32.
    """
    scaling = scale_by_factored_moment(specs, b2=optim.b2)
    if not optim.b1:
        return scaling
    return optax.chain(scaling, moments_in(optim.moments_dtype, optax.ema(optim.b1, debias=True)))


def _muon(optim: OptimConfig, specs: Mapping[str, ParamSpec]) -> optax.GradientTransformation:
    """Jordan et al. 2024, with Nesterov momentum, each layer's matrix by itself.

    The matrix is (fan-in, fan-out) as declared, so attention's (L, D, H, h) counts as L matrices D x (H h). An update
    with singular values of 1 has an RMS of 1/sqrt(max(fan_in, fan_out)); it is scaled to AdamW's (Liu et al. 2025),
    so that one learning rate serves both. Newton-Schulz runs in float32 operands at the backend's default matrix
    precision, which on TPU means bfloat16 products summed in float32: its coefficients only bring singular values near
    1, and the model's own products alone are exact in float32 (`kernels.matmul.precision_of`).
    """
    axes = {path: matrix_axes(spec) for path, spec in specs.items()}
    numbers = tree.from_paths({path: MuonDimensionNumbers(a.fan_in, a.fan_out) for path, a in axes.items()})
    orthogonal = scale_by_muon(
        ns_steps=5,
        beta=optim.muon_momentum,
        eps=optim.epsilon,
        nesterov=True,
        weight_dimension_numbers=numbers,
    )

    def scale(path: str, direction: jax.Array) -> jax.Array:
        fan_in, fan_out = (math.prod(direction.shape[i] for i in side) for side in axes[path])
        return MUON_RMS * math.sqrt(max(fan_in, fan_out)) * direction

    return optax.chain(
        moments_in(optim.moments_dtype, orthogonal),
        optax.stateless(lambda updates, params: tree.map_paths(scale, updates)),
    )


RULES: Mapping[str, Callable[[OptimConfig, Mapping[str, Any]], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def _field_and_parameter(path: tuple[Any, ...]) -> tuple[str, str]:
    """The state's field and the parameter's path that a leaf's key path ends with: ('mu', 'layers/mlp/up')."""
    end = len(path)
    while end and isinstance(path[end - 1], DictKey):
        end -= 1
    field = path[end - 1].name if end and isinstance(path[end - 1], GetAttrKey) else ""
    return field, "/".join(str(key.key) for key in path[end:])
