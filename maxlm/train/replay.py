"""One past step of a run again, twice, from the checkpoint before it: was it the hardware, the data or the numbers?

A step is a pure function of the state and the batch, and its bits are the same each time on the same devices. So two
executions here that differ show hardware that computes wrongly now; two that agree with each other and not with what
the run has written down show that it did so then; a batch whose digest is not the one written down shows that the data
has changed; and where all agree, what the run saw came from the numbers themselves, and the first tensor that is not
finite is named.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from maxlm.checkpoint.bucket import open_reader
from maxlm.checkpoint.digest import array_paths
from maxlm.checkpoint.reader import CheckpointReader, NoneWhole, digest_each
from maxlm.compilation import settle_cpu_devices
from maxlm.config import Config, ParallelConfig
from maxlm.configfile import known
from maxlm.convert.weights import open_weights
from maxlm.data.loader import Loader
from maxlm.data.prepare import Prepared, prepare_data
from maxlm.data.store import StoreError
from maxlm.errors import UserError
from maxlm.model.decoder import STACKS
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import ConfigError, resolve
from maxlm.train import rollback
from maxlm.train.first import other_weights
from maxlm.train.home import Home, beside, copied
from maxlm.train.metrics import read_metrics
from maxlm.train.peak import describe_place
from maxlm.train.setup import Setup, make_setup, place_batch
from maxlm.train.state import TrainState, as_configured, make_state

COMPARED = ("loss", "grad_norm")  # figures of a step that are held against those written down
UNDAMAGED = "every file of the stores has the bytes that were written"
_SHOWN = 8  # arrays that a report lists
Log = Callable[[str], None]


class Replay(NamedTuple):
    """What was found, as it goes into --json.

    verdict: "data", "hardware", "numerics", "nothing", or "unlike" (the run was on another mesh, other devices,
      other code or with other settings, or began with other weights, so that its bits cannot be compared with these).
    why: that in a sentence.
    step: which, as in metrics.jsonl: the first is 1.
    start: batches consumed by the checkpoint that was started from; 0 may be the beginning.
    recorded, executed: figures of the step as written down, and as computed here each time.
    batch: which rows of each store's cut the batch is made of, as the order of the data says.
    differing: arrays of the state after the step whose bits differ between the two executions, by path.
    non_finite: the first tensor that is not finite, in the order in which they are computed; "": none.
    norms: per-layer root mean squares at the step, by kind and path.
    """

    verdict: str
    why: str
    step: int
    start: int
    recorded: dict[str, Any]
    executed: list[dict[str, Any]]
    batch: dict[str, list[int]]
    differing: list[str]
    non_finite: str
    norms: dict[str, Any]


class _Execution(NamedTuple):
    """Figures of every step from the start on, the digest of each array of the state after the last, and its norms."""

    figures: dict[int, dict[str, Any]]
    after: dict[str, tuple[int, ...]]
    norms: dict[str, Any]


def replay(place: str | Path, step: int, *, log: Log) -> Replay:
    """Executes a step of the run in `place`, a folder or a bucket's, again; nothing of the run is changed.

    Args:
      step: as in metrics.jsonl, from 1 on.

    Raises:
      UserError: the run has not made such a step, or its data or checkpoints cannot be read.
    """
    settle_cpu_devices()
    with beside(place, log=log) as home:
        return _replay(home, step, log=log)


def _replay(home: Home, step: int, *, log: Log) -> Replay:
    """`replay`, where the run's files are on this machine."""
    workdir = home.folder
    records = {record["step"]: record for record in read_metrics(workdir, "step")}
    if step not in records:
        made = f"has steps {min(records)} to {max(records)}" if records else "has made no step"
        raise UserError(f"--step is {step}, but the run in {home.place} {made}")
    config = _config(workdir, log=log)
    data = prepare_data(config, workdir, build=False, home=home.place)
    skips = rollback.skips(rollback.recorded(workdir))
    loader = Loader(data.stores, config.data, seed=config.seed, skips=skips)
    setup = make_setup(config, make_mesh(config.parallel))
    checkpoints = open_reader(home.checkpoints, log=log)
    bench = _Bench(config, setup, loader, checkpoints)
    start, state = bench.begin(step - 1, log=log)
    source = config.train.init_from
    began_otherwise = other_weights(home, state.params, source) if source and not start else ""
    log(f"replaying step {step} twice from {f'the checkpoint of step {start}' if start else 'the beginning'}")
    first = bench.execute(start, state, step, norms=True)
    second = bench.execute(start, bench.state(start), step, norms=False)
    differing = [path for path in first.after if first.after[path] != second.after[path]]
    unlike = began_otherwise or _unlike(workdir, setup, start, step)
    verdict, why = _judge(
        _Evidence(records, first, second, differing, unlike, _non_finite(first, step)),
        step,
        damaged=lambda: _damage(data),
    )
    return Replay(
        verdict,
        why,
        step,
        start,
        {name: records[step][name] for name in (*COMPARED, "batch", "accepted")},
        [execution.figures[step] for execution in (first, second)],
        {name: rows.tolist() for name, rows in loader.rows(step - 1).items()},
        differing[:_SHOWN],
        _non_finite(first, step),
        jax.tree.map(np.ndarray.tolist, first.norms),
    )


def _quiet(line: str) -> None:
    """Says nothing."""


def _config(workdir: Path, *, log: Log) -> Config:
    """The config of the run, on this program's devices."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is not the folder of a run: it has no config.json")
    given, dropped = known(json.loads(path.read_text()))
    if dropped:
        log(f"the run was recorded with {', '.join(dropped)}, which this version has no more")
    try:
        config = resolve(given)
    except ConfigError as error:
        raise UserError(
            f"this version refuses what {path} records, so that it cannot replay the run: {error}"
        ) from None
    try:
        return resolve(config, devices=jax.device_count())
    except ConfigError:
        log(f"the mesh of the run does not fit {jax.device_count()} devices; replaying on a mesh of `data` alone")
        given["parallel"] = {**dataclasses.asdict(ParallelConfig())}
        return resolve(given, devices=jax.device_count())


@dataclasses.dataclass
class _Bench:
    """What executes steps."""

    config: Config
    setup: Setup
    loader: Loader
    checkpoints: CheckpointReader

    def begin(self, before: int, *, log: Log) -> tuple[int, TrainState]:
        """The step of the newest whole checkpoint of step `before` or earlier, and its state; 0: the beginning."""
        for step in reversed([step for step in self.checkpoints.steps() if step <= before]):
            try:
                return step, self.state(step)
            except NoneWhole:  # which one and why, the reader has said
                log(f"going back further than the checkpoint of step {step}")
        return 0, self.state(0)

    def execute(self, start: int, state: TrainState, stop: int, *, norms: bool) -> _Execution:
        """Steps `start` + 1 to `stop` from the state after `start`, which is consumed."""
        figures, measured = {}, {}
        for step in range(start + 1, stop + 1):
            read = functools.partial(self.loader.batch, step - 1)
            batch = place_batch(self.setup.mesh, self.loader.shape(step - 1), read)
            if step == stop and norms:
                measured = self.norms(state, batch)
            state, metrics = self.setup.compile(*batch.tokens.shape)(state, batch)
            found = jax.device_get({name: metrics[name] for name in (*COMPARED, "batch", "accepted")})
            figures[step] = {name: value.item() for name, value in found.items()}
        return _Execution(figures, _digests(state), measured)

    def state(self, start: int) -> TrainState:
        """The state after `start` steps, on its devices."""
        if not start:
            source = self.config.train.init_from
            weights = open_weights(copied(source, log=_quiet), self.config.model, log=_quiet) if source else None
            params = weights(self.setup.shardings.params) if weights else None
            return make_state(self.config, self.setup.optimizer, self.setup.shardings, params)
        restored = self.checkpoints.restore_state(self.setup.abstract_state(), step=start)
        return as_configured(restored.state, self.config, restored.metadata)

    def norms(self, state: TrainState, batch: Any) -> dict[str, Any]:
        """Root mean squares of every layer's tensors at a step, by another program: the run's own may not have them."""
        train = dataclasses.replace(self.config.train, norms_every=1)
        setup = make_setup(dataclasses.replace(self.config, train=train), self.setup.mesh)
        copy = jax.tree.map(jnp.copy, state)  # the program consumes what it is given
        _, metrics = setup.compile(*batch.tokens.shape)(copy, batch)
        return jax.device_get(metrics["norms"])


def _digests(state: TrainState) -> dict[str, tuple[int, ...]]:
    found = jax.device_get(digest_each(array_paths(state)))
    return {path: tuple(int(word) for word in value) for path, value in found.items()}


def table(found: Replay) -> Table:
    """A replay for a person."""
    out = Table("", "then", "first", "second", title=f"step {found.step}: {found.verdict}", box=None, pad_edge=False)
    for name, then in found.recorded.items():
        out.add_row(name, *(repr(value) for value in (then, *(figures[name] for figures in found.executed))))
    for store, rows in found.batch.items():
        out.add_row(f"rows of {store}", " ".join(map(str, rows[:_SHOWN])) + (" ..." if len(rows) > _SHOWN else ""))
    for kind, norms in found.norms.items():
        for path, value in norms.items():
            layers = np.ravel(value)
            out.add_row(f"rms {kind}/{path}", " ".join(f"{layer:.3g}" for layer in layers[:_SHOWN]))
    return out


# --- the verdict


class _Evidence(NamedTuple):
    records: Mapping[int, Mapping[str, Any]]
    first: _Execution
    second: _Execution
    differing: list[str]
    unlike: str  # what keeps the bits of then from being compared; "": nothing
    non_finite: str


def _judge(found: _Evidence, step: int, *, damaged: Callable[[], str]) -> tuple[str, str]:
    """(verdict, why). Steps that are missing from what was written down, by a full disk, are not compared."""
    steps = sorted(found.first.figures)
    known = [number for number in steps if number in found.records]
    missing = f" ({len(steps) - len(known)} of the steps up to it were not written down)" if known != steps else ""
    for number in known:
        was, now = found.records[number], found.first.figures[number]
        if was["batch"] != now["batch"]:
            return "data", (
                f"the batch of step {number} has the digest {now['batch']}, and {was['batch']} was written down: the "
                f"store, or what the order follows from, has changed; {damaged() or UNDAMAGED}"
            )
    for number in steps:
        one, other = found.first.figures[number], found.second.figures[number]
        if not _same(one, other):
            return "hardware", (
                f"two executions of step {number} on these devices differ: {_both(one, other)}; run the vendor's "
                "diagnostics on this machine before it is used again"
            )
    if found.differing:
        return "hardware", (
            f"two executions of step {step} on these devices leave other bits in {len(found.differing)} arrays, "
            f"{', '.join(found.differing[:_SHOWN])}; run the vendor's diagnostics on this machine"
        )
    other_then = [number for number in known if not _same(found.records[number], found.first.figures[number])]
    if other_then and found.unlike:
        apart = max(_apart(found.records[number], found.first.figures[number]) for number in known)
        return "unlike", (
            f"two executions agree; they are {apart:.1e} from what was written down at most, whose bits cannot be "
            f"compared: {found.unlike}{missing}"
        )
    if other_then:
        number = other_then[0]
        otherwise = (
            f"two executions agree here, and the run wrote down something else for step {number}: "
            f"{_both(found.records[number], found.first.figures[number])}{missing}; "
        )
        if damage := damaged():  # where documents begin is in no batch's digest
            return "data", f"{otherwise}{damage}"
        return "hardware", f"{otherwise}it was computed wrongly then, by a device of the hosts that it ran on"
    figures = found.first.figures[step]
    if found.non_finite or not figures["accepted"]:
        what = f"the first tensor that is not finite is {found.non_finite}" if found.non_finite else "all is finite"
        refused = "" if figures["accepted"] else ", and the guard refused the update"
        return "numerics", f"the step gives the same bits as then{missing}{refused}: {what}"
    return "nothing", f"the step gives the same bits as then, twice, and all of it is finite{missing}"


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(np.array_equal(one[name], other[name], equal_nan=True) for name in COMPARED)


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest relative distance of the figures that are compared."""
    return max(abs(one[name] - other[name]) / max(abs(other[name]), 1e-30) for name in COMPARED)


def _both(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {one[name]!r} and {other[name]!r}" for name in COMPARED)


def _unlike(workdir: Path, setup: Setup, start: int, step: int) -> str:
    """How the devices, mesh, code or settings that made the steps after `start` differ from these, in words."""
    here = describe_place(setup.config, setup.mesh)
    places = {record["step"]: record for record in read_metrics(workdir, "cost") if record["step"] < step}
    began = max((at for at in places if at <= start), default=start)
    then = [record for at, record in places.items() if at >= began]
    for record in then:
        for name, value in here.items():
            if record.get(name) != value:
                return f"{name} was {record.get(name, 'not written down')}, here it is {value}"
    return "" if then else "the run did not write down where it ran"


def _damage(data: Prepared) -> str:
    """Which store's files are not what was written, in words; "": all are."""
    for store in data.stores.values():
        try:
            store.verify()
        except StoreError as error:
            return str(error)
    return ""


def _non_finite(execution: _Execution, step: int) -> str:
    """The name of the first tensor that is not finite, or whose squares are not (above 1.8e19)."""
    for name, value in _in_order(execution.norms):
        if not math.isfinite(value):
            return name
    figures = execution.figures[step]
    return next((name for name in COMPARED if not math.isfinite(figures[name])), "")


def _in_order(norms: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The tensors of a step with their norms in the order in which they are computed: gradients from the last layer."""
    for kind, backwards in (("weights", False), ("activations", False), ("gradients", True), ("updates", False)):
        order = list(_forwards(kind, norms.get(kind, {})))
        yield from reversed(order) if backwards else order


def _forwards(kind: str, norms: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The tensors of one kind: those before and around the stacks, then the stacks, layer after layer."""
    arrays = {path: np.asarray(value) for path, value in norms.items()}
    yield from ((f"{kind}/{path}", float(value)) for path, value in arrays.items() if not value.ndim)
    stacks = [[path for path in arrays if arrays[path].ndim and path.split("/")[0] == stack] for stack in STACKS]
    others = [path for path in arrays if arrays[path].ndim and path.split("/")[0] not in STACKS]
    for paths in (*stacks, others):
        for layer in range(max((arrays[path].shape[0] for path in paths), default=0)):
            yield from ((f"{kind}/{path} of layer {layer}", float(arrays[path][layer])) for path in paths)
