"""Ladders of runs defined by one dial: every other setting of a rung follows from the rules below, and nowhere else.

- Shape: D = `aspect` * L (the ratio changes the loss little over a wide range: Kaplan et al. 2020, arXiv 2001.08361,
  figure 5), heads of `head_dim` dims, F as `model.mlp` fills it in.
- Tokens: `tokens_per_param` for each parameter besides embeddings (about 20: Hoffmann et al. 2022, arXiv 2203.15556).
- Batch: 0.2920 C^0.3271 tokens, C the FLOPs of the run (Bi et al. 2024, DeepSeek LLM, arXiv 2401.02954, equation 1),
  rounded to 2^k or 3 * 2^k rows on each shard of the batch, for each of `train.accumulation` microbatches. The
  equation was measured from 1e17 FLOPs up; far below, `batch_tokens` sets what does best there.
- Learning rate under the standard rule: 0.3118 C^-0.1250 (the same equation), or `base_rate`, for all parameters alike.
- Warm-up: a fiftieth of the steps, at least 10 of them and at most a fourth (a convention, measured by nobody here).
- Cooldown of a wsd schedule: a fifth of the steps (Hägele et al. 2024, arXiv 2405.18392).
- Initialisation: `model.init` as given, by default residual outputs divided by sqrt(2L) (Radford et al. 2019).

The transfer rule is the maximal update parametrization for Adam (Yang et al. 2021, arXiv 2203.03466, table 3): with
m = D / `base_width`,

- matrices whose fan-in grows with the width get 1 / m of the learning rate; the embedding, norms, biases and matrices
  whose fan-in stays (those of a latent or of experts with a dim of their own) get all of it. Which are which is read
  off the parameters' declarations (`widening`);
- the head begins at 1 / sqrt(m) of `model.head_init`, so that its entries fall with the width and not with its root
  (theirs at zero, appendix D.2, costs short runs 0.1 to 0.3 nats: `docs/scaling.md`);
- scores are multiplied by sqrt(base_head_dim) / h in place of 1 / sqrt(h);
- weight decay grows by m where the rate falls by it, so that their product stays (Wang & Aitchison 2024, arXiv
  2405.13698), and Adam's epsilon falls by m with the gradients (Everett et al. 2024, arXiv 2407.05872).

At the base width it differs from the standard rule in nothing but the scale of the scores, where `head_dim` is not
`base_head_dim`. What does best there, `base_rate`, is meant to do best at any width. It is a rule for width: what depth
asks besides dividing residual outputs is not part of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import NamedTuple

from maxlm import tree
from maxlm.config import Config, ModelConfig
from maxlm.errors import UserError
from maxlm.model.decoder import split_model
from maxlm.model.flops import ledger
from maxlm.resolve import batch_shards, filled_mesh, resolve, resolve_model

DIALS = ("depth", "params", "flops")
RULES = ("standard", "transfer")
UNITS = (64, 128)  # key heads of two models that are compared to see what grows: so many that no rounding hides it
SHAPED = (
    *("model.embed_dim", "model.num_layers", "model.attention.q_heads", "model.attention.kv_heads"),
    *("model.attention.head_dim", "model.mlp.dim", "train.steps", "optim.warmup_steps", "optim.decay_steps"),
)
"""Settings that follow from the shape and the tokens."""
TRANSFERRED = ("model.attention.scale", "optim.lr_rules", "optim.decay_rules")
"""Settings that the transfer rule makes."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """The constants of the rules; see the module's docstring."""

    rule: str = "standard"
    aspect: float = 64.0
    head_dim: int = 64
    min_layers: int = 2
    tokens_per_param: float = 20.0
    base_width: int = 256
    base_head_dim: int = 64
    base_rate: float = 0.0  # peak learning rate, under the transfer rule at the base width; 0: the equation's
    batch_tokens: int = 0  # of a batch, whatever the budget; 0: the equation's
    cooldown: float = 0.2

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"the rule is {self.rule!r}; it can be {' or '.join(RULES)}")


class Shape(NamedTuple):
    """The dims that the dial sets."""

    layers: int
    width: int


class Size(NamedTuple):
    """What a model counts.

    flops: causal-exact training FLOPs a token, by the ledger: attention, embeddings and head as they are.
    """

    total: int
    besides_embeddings: int
    flops: float


def shape_by_depth(rules: Rules, base: Config, depth: int) -> Shape:
    """L layers of aspect * L dims, in whole heads, and as many of them as key heads want."""
    unit = rules.head_dim * _groups(base.model)
    return Shape(depth, max(round(rules.aspect * depth / unit), 1) * unit)


def shape_by_params(rules: Rules, base: Config, params: float) -> Shape:
    """The shape whose parameters besides embeddings come nearest to `params`, near the aspect asked for."""
    nominal, best, distances = params, Shape(0, 0), dict[Shape, float]()
    for _ in range(6):  # with experts, or a feed-forward half of another size, N is a multiple of 12 L D^2
        ideal = max((nominal / 12 / rules.aspect**2) ** (1 / 3), rules.min_layers)
        unit = rules.head_dim * _groups(base.model)
        for layers in sorted({max(math.floor(ideal), rules.min_layers), max(math.ceil(ideal), rules.min_layers)}):
            units = math.sqrt(nominal / 12 / layers) / unit
            for count in {max(math.floor(units), 1), max(math.ceil(units), 1)}:
                shape = Shape(layers, count * unit)
                distances[shape] = math.log(size_of(rules, base, shape).besides_embeddings / params)
        last, best = best, min(distances, key=lambda shape: (abs(distances[shape]), shape))
        if best == last:
            break
        nominal /= math.exp(distances[best])
    return best


def shape_by_flops(rules: Rules, base: Config, flops: float) -> Shape:
    """The shape that spends `flops` on `tokens_per_param` tokens for each of its parameters besides embeddings."""
    params = math.sqrt(flops / 6 / rules.tokens_per_param)
    for _ in range(6):  # the head, embedding and scores add to 6 N: their share depends on the shape
        shape = shape_by_params(rules, base, params)
        size = size_of(rules, base, shape)
        params *= (flops / (size.flops * rules.tokens_per_param * size.besides_embeddings)) ** 0.5
    return shape_by_params(rules, base, params)


def shaped(base: Config, shape: Shape, rules: Rules) -> Config:
    """The base config with the dims of a shape, and no more.

    Raises:
      UserError: the base has settings by which a run's compute would not be what its steps make of it, or dims that the
        shape does not allow.
    """
    if base.train.budget_seconds or base.data.phases:
        raise UserError(
            f"train.budget_seconds is {base.train.budget_seconds:g} and data.phases has {len(base.data.phases)}, but a "
            "study's runs take the steps that their compute makes, of one length and batch: leave both out of its base"
        )
    return resolve(dataclasses.replace(base, model=_shaped_model(base.model, shape, rules)))


def _shaped_model(model: ModelConfig, shape: Shape, rules: Rules) -> ModelConfig:
    if shape.width % rules.head_dim:
        raise UserError(
            f"a width of {shape.width} is no multiple of the rules' head_dim {rules.head_dim}; use one, or a smaller "
            "head_dim"
        )
    if model.mlp.dim:
        raise UserError(f"model.mlp.dim is {model.mlp.dim}, but a ladder sets it by the width; leave it at 0")
    heads, groups = shape.width // rules.head_dim, _groups(model)
    if heads % groups:
        raise UserError(
            f"a width of {shape.width} makes {heads} heads, but the base has {groups} query heads for each key head; "
            f"use a multiple of {rules.head_dim * groups}, or leave model.attention.kv_heads at 0"
        )
    attention = dataclasses.replace(model.attention, q_heads=heads, kv_heads=heads // groups, head_dim=rules.head_dim)
    return dataclasses.replace(model, num_layers=shape.layers, embed_dim=shape.width, attention=attention)


def _groups(model: ModelConfig) -> int:
    """Query heads that share a key head in the base, and so at every width."""
    heads = model.attention
    if not heads.kv_heads:
        return 1
    if heads.q_heads % heads.kv_heads:
        raise UserError(
            f"model.attention.kv_heads is {heads.kv_heads}, which does not divide model.attention.q_heads "
            f"{heads.q_heads}: a ladder keeps the ratio of the base"
        )
    return heads.q_heads // heads.kv_heads


def measure(model: ModelConfig, sequence_length: int) -> Size:
    """Counts of a resolved model over rows of so many positions."""
    counts = ledger(model, sequence_length=sequence_length)
    return Size(counts.params_total, counts.params_nonembedding, counts.causal_exact)


def size_of(rules: Rules, base: Config, shape: Shape) -> Size:
    """Counts of the base's model in a shape."""
    return _size_of(rules, base.model, base.data.sequence_length, shape)


@functools.lru_cache(maxsize=4096)  # a search comes back to the same shapes, and each takes a tenth of a second
def _size_of(rules: Rules, model: ModelConfig, sequence_length: int, shape: Shape) -> Size:
    return measure(resolve_model(dataclasses.asdict(_shaped_model(model, shape, rules))), sequence_length)


def configure(
    base: Config, shape: Shape, rules: Rules, *, devices: int = 1, flops: float = 0.0, tokens: float = 0.0
) -> Config:
    """The resolved config of a rung.

    Args:
      devices: that it is run on, over which its batch has to be cut.
      flops, tokens: how long it trains; one of them, or neither for `tokens_per_param` tokens a parameter.
    """
    config = shaped(base, shape, rules)
    size = size_of(rules, base, shape)
    wanted = tokens or (flops / size.flops if flops else rules.tokens_per_param * size.besides_embeddings)
    budget = wanted * size.flops
    unit = config.train.accumulation * batch_shards(filled_mesh(config.parallel, devices))
    rows = _round_rows((rules.batch_tokens or 0.2920 * budget**0.3271) / config.data.sequence_length, unit)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))
    rate = rules.base_rate or 0.3118 * budget**-0.1250
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, peak_lr=rate))
    return lasting(parametrized(config, rules, base=base), wanted, rules)


def lasting(config: Config, tokens: float, rules: Rules) -> Config:
    """The config with as many steps as `tokens` make, and the warm-up and cooldown that belong to them."""
    steps = max(round(tokens / (config.data.batch_size * config.data.sequence_length)), 4)
    warmup = min(max(round(steps / 50), 10), steps // 4)
    cooldown = max(round(rules.cooldown * steps), 1) if config.optim.schedule == "wsd" else 0
    optim = dataclasses.replace(config.optim, warmup_steps=warmup, decay_steps=cooldown)
    return resolve(dataclasses.replace(config, optim=optim, train=dataclasses.replace(config.train, steps=steps)))


def widening(model: ModelConfig, rules: Rules, *, layers: int) -> tuple[str, ...]:
    """Paths of the trained parameters whose fan-in grows with the width, of a base's model with so many layers."""
    unit = rules.head_dim * _groups(model)
    narrow, wide = (_fan_ins(model, Shape(layers, units * unit), rules) for units in UNITS)
    return tuple(sorted(path for path, fan_in in narrow.items() if wide[path] > fan_in))


@functools.lru_cache(maxsize=64)
def _fan_ins(model: ModelConfig, shape: Shape, rules: Rules) -> dict[str, int]:
    """Products that are summed into one output, of each trained parameter."""
    specs = split_model(resolve_model(dataclasses.asdict(_shaped_model(model, shape, rules)))).specs
    return {
        path: math.prod(n for n, axis in zip(spec.shape, spec.logical, strict=True) if axis in spec.contract)
        for path, spec in tree.paths(specs).items()
        if spec.trained
    }


def parametrized(config: Config, rules: Rules, *, base: Config) -> Config:
    """The config, whatever its width, under the standard or the transfer rule.

    Args:
      config: the base in some shape.
      base: what the rules shaped; it alone tells dims that are fixed from those that follow from the width.

    Raises:
      UserError: the transfer rule with tied embeddings, whose one matrix would need two rules, with another optimizer
        than AdamW, with embeddings that grow with the width, with a head of columns of length 1, which cannot begin
        smaller, or with rules by path of the base config's own.
    """
    if rules.rule == "standard":
        return config
    optim, model = config.optim, config.model
    fresh = type(optim)()
    if model.tie_embeddings or optim.optimizer != "adamw":
        raise UserError(
            "the transfer rule needs model.tie_embeddings=False and optim.optimizer=adamw, and there are "
            f"{model.tie_embeddings} and {optim.optimizer}"
        )
    if model.embed_scale or model.normed_head:
        raise UserError(
            "the transfer rule needs model.embed_scale=False and model.normed_head=False, and there are "
            f"{model.embed_scale} and {model.normed_head}: the first makes embeddings grow with the width, and the "
            "columns of a head of the second have length 1 at every width"
        )
    if (optim.lr_rules, optim.decay_rules) != (fresh.lr_rules, fresh.decay_rules):
        raise UserError("the transfer rule sets optim.lr_rules and optim.decay_rules; leave them at their defaults")
    ratio = model.embed_dim / rules.base_width
    slower = "|".join(map(re.escape, widening(base.model, rules, layers=model.num_layers)))
    optim = dataclasses.replace(
        optim,
        lr_rules=((slower, 1 / ratio), (".*", 1.0)),
        decay_rules=((slower, ratio), (".*(norm|bias).*", 0.0), (".*", 1.0)),
        epsilon=optim.epsilon / ratio,
    )
    attention = dataclasses.replace(model.attention, scale=math.sqrt(rules.base_head_dim) / model.attention.head_dim)
    model = dataclasses.replace(model, attention=attention, head_init=model.head_init / math.sqrt(ratio))
    return dataclasses.replace(config, optim=optim, model=model)


def _round_rows(rows: float, unit: int) -> int:
    """The nearest 2^k or 3 * 2^k of units."""
    choices = sorted({unit * m * 2**k for m in (1, 3) for k in range(24)})
    return min(choices, key=lambda count: abs(math.log(count / max(rows, 1e-9))))
