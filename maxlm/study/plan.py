"""From a study to its grid of runs, with what each of them costs, before anything is run."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from maxlm.config import Config
from maxlm.plan.topology import parse_topology
from maxlm.resolve import ConfigError, resolve
from maxlm.study import ladder
from maxlm.study.spec import Design, Isoflops, Machine, Rungs, Study, StudyError, Sweep, Trunks


class Branch(NamedTuple):
    """Where a cooldown leaves its trunk: the trunk's label, and the step of its checkpoint."""

    trunk: str
    step: int


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run before it is run.

    label: unique within the study, for people; files are named by `identity.run_name`.
    config: resolved.
    facts: what the design says of it: budget, rule, and the values of a sweep's settings.
    tokens, flops: over all steps, those that a branch takes from its trunk included; `flops` are causal-exact.
    seconds: predicted, of this run alone with its share of the machine; a branch's are of its cooldown.
    fitted: False for a trunk, whose learning rate has not come down: it takes no part in fits.
    """

    label: str
    config: Config
    facts: dict[str, Any]
    params_total: int
    params_nonembedding: int
    tokens: int
    flops: float
    seconds: float
    branch: Branch | None = None
    fitted: bool = True


def plan(study: Study) -> list[PlannedRun]:
    """The runs of a study, trunks before their branches.

    Raises:
      StudyError: two runs would have the same label, or the design has nothing in it.
      UserError: a config does not resolve.
    """
    makers = {Isoflops: _isoflops, Rungs: _rungs, Trunks: _trunks, Sweep: _sweep}
    # Each maker takes the design that it stands beside, which no type can say of a dict.
    runs = list(makers[type(study.design)](study, study.design))  # type: ignore[operator]
    labels = [run.label for run in runs]
    if not runs:
        raise StudyError(f"the design of {study.name} has no runs; give it at least one value of each setting")
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise StudyError(f"the runs {', '.join(repeated)} come twice: {_why_twice(study.design)}")
    _check_one_data(runs)
    return runs


def _why_twice(design: Design) -> str:
    """What two runs of one label have in common, and what to do."""
    if isinstance(design, Sweep):
        return "a shape or a value is given twice, or two values are the same to three digits; spread them"
    shapes = "two sizes round to one shape; spread them, or lower the rules' head_dim"
    if isinstance(design, Trunks):
        return f"two token counts round to the same steps, or {shapes}"
    return f"{shapes}" if isinstance(design, Rungs) else f"two budgets are the same to three digits, or {shapes}"


def _check_one_data(runs: Sequence[PlannedRun]) -> None:
    """Losses on other documents, or counted in other tokens, cannot be compared."""

    def read(run: PlannedRun) -> tuple[Any, ...]:
        data, evaluated = run.config.data, run.config.eval
        window = evaluated.sequence_length or data.sequence_length
        model = run.config.model
        return dict(data.stores), data.tokenizer, model.vocab_size, evaluated.stores, window, evaluated.overlap

    for run in runs[1:]:
        for name, first, other in zip(READ, read(runs[0]), read(run), strict=True):
            if first != other:
                raise StudyError(
                    f"the runs {runs[0].label} and {run.label} differ in {name}, so that their losses are of other "
                    "tokens, or foretold from others, and cannot be compared; make a study of each value, or set "
                    "eval.sequence_length and eval.stores in the base"
                )


READ = (
    *("data.stores", "data.tokenizer", "model.vocab_size", "eval.stores"),
    *("the length of the windows evaluated", "eval.overlap"),
)
"""What decides the tokens that a run's losses are counted over, and what each of them is foretold from."""


UTILISATION = 0.4
"""Share of the peak that training is taken to reach on accelerators, causal-exact (others report 0.33 to 0.55)."""


def machine_of(name: str, study: Study) -> Machine:
    """Hardware of the planner's chip table as the machine of a study: a run at a time, on all its devices.

    Batches are rounded for them, so that the study's own runs may have others: those of its `Machine.devices`.

    Raises:
      UserError: the hardware is not known, or its speed is not in the table.
    """
    topology = parse_topology(name)
    rate = topology.devices * topology.chip.peak(study.base.train.precision) * UTILISATION
    if not rate:
        raise StudyError(
            f"the speed of {name} is not in the chip table; leave --topology away, and set Machine.flops_per_second"
        )
    return dataclasses.replace(
        study.machine,
        name=topology.describe(),
        flops_per_second=rate,
        devices=topology.devices,
        dollars_per_hour=topology.devices * topology.chip.price,
        jobs=1,
    )


def seconds_in_all(runs: Sequence[PlannedRun], machine: Machine) -> float:
    """Predicted wall time of all runs, `machine.jobs` at a time."""
    return max(sum(run.seconds for run in runs) / machine.jobs, max((run.seconds for run in runs), default=0.0))


def _isoflops(study: Study, design: Isoflops) -> Iterator[PlannedRun]:
    rules, base = study.rules, study.base
    for budget in design.budgets:
        centre = ladder.size_of(rules, base, ladder.shape_by_flops(rules, base, budget))
        for multiple in design.sizes:
            shape = ladder.shape_by_params(rules, base, multiple * centre.besides_embeddings)
            config = ladder.configure(base, shape, rules, devices=study.machine.devices, flops=budget)
            label = f"c{budget:.2e}-{shape.layers}x{shape.width}".replace("+", "")
            yield _planned(study, label, config, {"budget": budget})


def _rungs(study: Study, design: Rungs) -> Iterator[PlannedRun]:
    rules, base = study.rules, study.base
    for value in design.values:
        flops = 0.0
        if design.dial == "depth":
            shape = ladder.shape_by_depth(rules, base, int(value))
        elif design.dial == "params":
            shape = ladder.shape_by_params(rules, base, value)
        elif design.dial == "flops":
            shape, flops = ladder.shape_by_flops(rules, base, value), value
        else:
            raise StudyError(f"the dial is {design.dial!r}; it can be {', '.join(ladder.DIALS)}")
        config = ladder.configure(base, shape, rules, devices=study.machine.devices, flops=flops)
        yield _planned(study, f"{design.dial}{value:g}-{shape.layers}x{shape.width}", config, {design.dial: value})


def _trunks(study: Study, design: Trunks) -> Iterator[PlannedRun]:
    """The cooldowns leave at multiples of one number of steps, at which the trunk keeps its checkpoints for good."""
    if study.base.optim.schedule != "wsd":
        raise StudyError(f"trunks need optim.schedule=wsd, and the base config has {study.base.optim.schedule!r}")
    rules, base = study.rules, study.base
    for params in design.params:
        shape = ladder.shape_by_params(rules, base, params)
        longest = ladder.configure(base, shape, rules, devices=study.machine.devices, tokens=max(design.tokens))
        a_step = longest.data.batch_size * longest.data.sequence_length
        stable = [count / a_step * (1 - rules.cooldown) for count in sorted(design.tokens)]
        stride = max(round(stable[0] / 8), 1)
        leaves = [max(round(steps / stride), 1) * stride for steps in stable]
        warmup = min(longest.optim.warmup_steps, leaves[0])
        optim = dataclasses.replace(longest.optim, warmup_steps=warmup, decay_steps=1)  # after the last leave
        # Saves at these steps, and at no others that chance or a clock would choose.
        keeping = dataclasses.replace(
            base.checkpoint, every_steps=stride, keep_every_steps=stride, every_seconds=0.0, mtbf_hours=0.0, keep_best=0
        )
        trunk = resolve(
            dataclasses.replace(
                longest,
                optim=optim,
                checkpoint=keeping,
                train=dataclasses.replace(longest.train, steps=leaves[-1] + 1),
            )
        )
        name = f"{shape.layers}x{shape.width}"
        yield dataclasses.replace(_planned(study, f"{name}-trunk", trunk, {"role": "trunk"}), fitted=False)
        for leave in leaves:
            cooldown = max(round(leave * rules.cooldown / (1 - rules.cooldown)), 1)
            config = resolve(
                dataclasses.replace(
                    trunk,
                    optim=dataclasses.replace(optim, decay_steps=cooldown),
                    checkpoint=base.checkpoint,
                    train=dataclasses.replace(trunk.train, steps=leave + cooldown),
                )
            )
            label = f"{name}-s{leave + cooldown}"
            yield _planned(study, label, config, {"role": "branch"}, branch=Branch(f"{name}-trunk", leave))


def _sweep(study: Study, design: Sweep) -> Iterator[PlannedRun]:
    """Settings go into the base, so that the rules see them; but the batch and the rate, which the rules choose too."""
    names = list(design.settings)
    for rule, shape in itertools.product(design.rules or (study.rules.rule,), design.shapes):
        rules = dataclasses.replace(study.rules, rule=rule)
        for path in names:
            if path in ladder.SHAPED or (rule == "transfer" and path in ladder.TRANSFERRED):
                raise StudyError(f"the sweep sets {path!r}, which the {rule} rule sets; leave it out of the settings")
        for values in itertools.product(*design.settings.values()):
            chosen = dict(zip(names, values, strict=True))
            base = _with(study.base, {path: value for path, value in chosen.items() if path not in CHOSEN})
            config = ladder.configure(base, shape, rules, devices=study.machine.devices, tokens=design.tokens)
            config = _with(config, {path: value for path, value in chosen.items() if path in CHOSEN})
            # The number of steps follows from the batch, which may be one of the settings.
            config = ladder.lasting(config, design.tokens, rules)
            words = [f"{path.rsplit('.', 1)[-1]}{_word(value)}" for path, value in chosen.items()]
            label = "-".join([rule, f"{shape.layers}x{shape.width}", *words])
            yield _planned(study, label, config, {"rule": rule, "width": shape.width, "layers": shape.layers, **chosen})


def _planned(
    study: Study, label: str, config: Config, facts: dict[str, Any], *, branch: Branch | None = None
) -> PlannedRun:
    _check_devices(label, config, study.machine)
    size, machine = ladder.measure(config.model, config.data.sequence_length), study.machine
    tokens = config.train.steps * config.data.batch_size * config.data.sequence_length
    own = tokens * (1 - branch.step / config.train.steps) if branch else tokens
    seconds = own * size.flops / (machine.flops_per_second / machine.jobs) + machine.overhead_seconds
    config = dataclasses.replace(config, name=f"{study.name} {label}")
    return PlannedRun(
        label,
        config,
        {"rule": study.rules.rule} | facts,
        size.total,
        size.besides_embeddings,
        tokens,
        tokens * size.flops,
        seconds,
        branch,
    )


def _check_devices(label: str, config: Config, machine: Machine) -> None:
    """A run's own start resolves its config on the devices that are there: what it would say then, before any runs."""
    try:
        resolve(config, devices=machine.devices)
    except ConfigError as error:
        raise StudyError(
            f"{label} cannot run on {machine.devices} devices, as many as the study's Machine.devices says: "
            f"{'; '.join(error.problems)}"
        ) from None


CHOSEN = ("data.batch_size", "optim.peak_lr")
"""What the rules choose by the run's compute where a sweep does not."""


def _with(config: Config, chosen: Mapping[str, Any]) -> Config:
    """The config with other values of some leaves."""
    for path, value in chosen.items():
        config = _replaced(config, path, path.split("."), value)
    return config


def _replaced(node: Any, path: str, names: Sequence[str], value: Any) -> Any:
    """A section or, of no names, a leaf with the value in place of what is there."""
    if not names:
        if dataclasses.is_dataclass(node):
            raise StudyError(f"the sweep sets {path!r}, which is a section of settings; set its leaves one by one")
        return _hashable(value)
    name, rest = names[0], names[1:]
    if dataclasses.is_dataclass(node) and not isinstance(node, type) and name in _fields(node):
        return dataclasses.replace(node, **{name: _replaced(getattr(node, name), path, rest, value)})
    if isinstance(node, Mapping) and name in node:
        return {**node, name: _replaced(node[name], path, rest, value)}
    raise StudyError(f"the sweep sets {path!r}, which is no setting of a config; see maxlm/config.py")


def _fields(node: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(node)}


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, (list, tuple)) else value


def _word(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)
    return re.sub(r"[^A-Za-z0-9.]+", "_", text)
