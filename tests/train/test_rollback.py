"""Rollback: what is passed over, recorded, and done again alike after a kill."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.checkpoint.digest import digest_array
from maxlm.checkpoint.manager import Checkpointer
from maxlm.checkpoint.reader import CheckpointReader, Restored
from maxlm.config import CheckpointConfig, DataConfig
from maxlm.data.batch import Batch
from maxlm.data.loader import Loader
from maxlm.data.prepare import prepare_data
from maxlm.errors import UserError
from maxlm.optim.scaling import init_scale
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import as_config_dict, resolve
from maxlm.train import rollback
from maxlm.train.goodput import Ledger
from maxlm.train.metrics import read_metrics
from maxlm.train.rollback import Refusals, Rollback, TurnBack, recorded, skips
from maxlm.train.run import train
from maxlm.train.setup import make_setup
from maxlm.train.state import make_state
from tests.data.memory_store import MemoryStore
from tests.tiny import replace, tiny_config, write_corpus

STEPS = 18


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved or tidied up on the way out that a kill would not leave behind."""


@pytest.mark.parametrize(
    "rollbacks",
    [
        [],
        [Rollback(9, 6)],
        [Rollback(9, 6), Rollback(8, 6)],  # again at once
        [Rollback(9, 6), Rollback(8, 4)],  # further back
        [Rollback(9, 6), Rollback(20, 18)],
        [Rollback(9, 6), Rollback(20, 18), Rollback(21, 16)],
        [Rollback(9, 6), Rollback(20, 18), Rollback(21, 4)],
    ],
)
def test_all_that_was_consumed_is_passed_over_and_nothing_more(rollbacks):
    """The batch after a rollback is the one after the last that any way has consumed."""
    stores, data = {"one": MemoryStore([30] * 50)}, DataConfig(sequence_length=8, batch_size=2)
    order = Loader(stores, data, seed=0)
    numbers = {order.batch(number).tokens.tobytes(): number for number in range(80)}
    consumed, position = [], 0
    for number, (at, to) in enumerate([*rollbacks, Rollback(30, 0)]):
        loader = Loader(stores, data, seed=0, skips=skips(rollbacks[:number]))
        consumed += [numbers[loader.batch(step).tokens.tobytes()] for step in range(position, at)]
        position = to
    assert consumed == list(range(len(consumed)))


def test_refusals_are_counted_within_so_many_steps_and_not_while_the_loss_scale_moves():
    refusals = Refusals((3, 5, 1), steps=(), in_row=0)
    for step, in_row in enumerate([0, 1, 0, 0, 1, 1, 0, 1]):  # the second 1 at 4, 5: one refusal, then one excused
        refusals.read(step, in_row)
    assert refusals.steps == [4, 7]
    with pytest.raises(TurnBack) as turn:
        refusals.read(8, 2)
    assert (turn.value.since, turn.value.at) == (4, 9)
    with pytest.raises(TurnBack):  # as read back from a checkpoint
        Refusals((3, 5, 1), steps=[4, 7], in_row=1).read(8, 2)
    never = Refusals((0, 0, 0), steps=(), in_row=0)
    for step in range(9):
        never.read(step, step)


def test_what_a_rollback_would_go_back_to():
    """What is told beforehand, for the retention, is what a rollback then takes."""
    back_to, once = rollback.back_to, [Rollback(at=180, to=100)]
    assert back_to([], [], 120) is None and back_to([101, 121], [], 140) == 101
    assert back_to([], once, 120) == 99 and back_to([110], once, 120) == 99  # the same trouble again: further back
    assert back_to([], once, 180) is None and back_to([190], once, 200) == 190  # past it


@pytest.mark.parametrize(("newest", "advice"), [(4, "the first was due at step 5: lower checkpoint.every_steps"),
                                                (5, r"keep more of them \(checkpoint.keep_latest")])  # fmt: skip
def test_without_a_checkpoint_to_go_back_to_it_says_what_to_change(newest, advice):
    checkpointer = SimpleNamespace(wait=lambda: None, steps=lambda: [10, 15])
    run = SimpleNamespace(
        config=tiny_config("", optim__guard__rollback=(2, 6, 2)), checkpointer=checkpointer, rollbacks=[]
    )
    with pytest.raises(UserError, match=f"no whole checkpoint of step {newest} or before to go back to; {advice}"):
        rollback.roll_back(run, newest, 12)


def test_a_damaged_checkpoint_of_the_way_given_up_is_not_taken_for_its_steps_save(tmp_path, monkeypatch):
    data = {"config": {}, "data": {"skips": []}}
    with Checkpointer(tmp_path / "checkpoints", CheckpointConfig(keep_latest=9), log=lambda _: None) as checkpointer:
        for step in (5, 10):
            checkpointer.save(step, {"x": jnp.full(3, step)}, metadata=data)
        checkpointer.wait()
        (checkpointer.path(10) / "record" / "metadata").write_text("torn")
        rollback.set_others_aside(checkpointer, [Rollback(12, 5)])
        assert checkpointer.steps() == [5, 10]  # at a start restoring names it
        run = SimpleNamespace(
            config=tiny_config("", optim__guard__rollback=(2, 6, 2)),
            checkpointer=checkpointer,
            rollbacks=[],
            workdir=tmp_path,
            home=SimpleNamespace(push=lambda: None),
            log=print,
            go_on_from=lambda *_: None,
            writer=SimpleNamespace(write=lambda *_: None),
        )
        monkeypatch.setattr(rollback, "_restore", lambda run, newest: Restored(5, None, data))
        assert rollback.roll_back(run, 8, 12) == (None, 5)
        assert checkpointer.steps() == [5] and (tmp_path / "checkpoints" / "10.rolled_back-1").is_dir()
        assert checkpointer.save(10, {"x": jnp.ones(3)}, metadata=data).started


@pytest.mark.parametrize("rule", [(0, 8, 1), (4, 3, 1), (2, 8, 0)])
def test_a_rule_that_cannot_be_is_refused(tmp_path, rule):
    with pytest.raises(UserError, match=r"optim.guard.rollback is .*; give \(K, M, N\)"):
        resolve(tiny_config(tmp_path, optim__guard__rollback=rule))


def test_the_ledger_counts_what_a_rollback_gave_up_as_lost(tmp_path):
    now = [100.0]
    ledger = Ledger(tmp_path, age=0, clock=lambda: now[0], now=lambda: now[0], heartbeat_seconds=0)
    ledger.restored(0)
    ledger.settle("step")
    for step in range(1, 8):
        now[0] += 1.0
        ledger.completed(step)
        if step in (2, 4):
            ledger.checkpoint(step)
    with ledger.bucket("restore"):
        now[0] += 2.0
        ledger.begin_anew(2)
        now[0] += 3.0
    now[0] += 4.0
    account = ledger.summary()
    assert account.seconds["lost"] == 5.0 and account.seconds["step"] == 2.0 + 4.0
    assert account.seconds["restore"] == 5.0 and account.wall == now[0] - 100.0 and account.down == 0
    assert account.processes == 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The config, and the batches of its data in the order without skips, by digest."""
    folder = tmp_path_factory.mktemp("rollback")
    config = tiny_config(
        write_corpus(folder / "corpus"),
        data__cache_dir=str(folder / "data"),
        train__steps=STEPS,
        train__compilation_cache=str(folder / "xla"),
        checkpoint__every_steps=3,
        checkpoint__keep_latest=2,
        optim__guard__rollback=(2, 6, 2),
    )
    config = replace(config, ["data", "prefetch"], 0)
    data = prepare_data(resolve(config), folder)
    return SimpleNamespace(folder=folder, config=config, data=data, order=Loader(data.stores, config.data, seed=0))


def digest(batch: Batch) -> int:
    return int(digest_array(jnp.asarray(batch.tokens))[0])


def poisoned(monkeypatch, world, numbers, *, killed_at=None):
    """Batches with these numbers in the order without skips have a loss that is not finite, wherever they come."""
    bad = {digest(world.order.batch(number)) for number in numbers}
    read = Loader.batch

    def batch(self, step, rows=None):
        if step == killed_at:
            raise Killed
        found = read(self, step, rows)
        return found._replace(weights=found.weights * np.nan) if digest(read(self, step)) in bad else found

    monkeypatch.setattr(Loader, "batch", batch)


def run(world, name):
    logged = []
    train(world.config, world.folder / name, log=logged.append)
    return "\n".join(logged)


def batches(world, name):
    """The number, in the order without skips, of the batch of each step."""
    numbers = {digest(world.order.batch(number)): number for number in range(2 * STEPS)}
    return [numbers[record["batch"]] for record in read_metrics(world.folder / name, "step")]


def losses(world, name):
    return [record["loss"] for record in read_metrics(world.folder / name, "step")]


TWICE = {10, 13, 14, 17}  # a save between two; the second stretch is met right after the first was passed over


@pytest.fixture(scope="module")
def whole(world):
    with pytest.MonkeyPatch.context() as monkeypatch:
        poisoned(monkeypatch, world, TWICE)
        return run(world, "whole")


def test_bad_stretches_are_passed_over_the_second_time_from_further_back(world, whole):
    assert recorded(world.folder / "whole") == [Rollback(at=14, to=9), Rollback(at=13, to=6)]
    assert batches(world, "whole") == [*range(6), *range(18, 18 + STEPS - 6)]
    assert np.isfinite(losses(world, "whole")).all()
    assert "were refused, from step 11 to 14: back to the checkpoint of step 9, past 5 batches (rollback 1" in whole
    assert "back to the checkpoint of step 6, past 12 batches (rollback 2 of at most 2)" in whole
    # What the checkpoints say of the data is what the loader needs, and all of it.
    reader = CheckpointReader(world.folder / "whole" / "checkpoints")
    kept = reader.record(STEPS).metadata["data"]["skips"]
    loader = Loader(world.data.stores, world.config.data, seed=0, skips=kept)
    assert [digest(loader.batch(step)) for step in range(STEPS)] == [
        record["batch"] for record in read_metrics(world.folder / "whole", "step")
    ]
    aside = {path.name for path in reader.directory.glob("*rolled_back*")}
    assert aside == {"9.rolled_back-1", "12.rolled_back-1", "12.rolled_back-2"}
    assert reader.steps() == [15, STEPS]  # what the rollbacks needed has gone
    report = json.loads((world.folder / "whole" / "report.json").read_text())
    assert report["goodput"]["lost"] > 0
    assert sum(report["goodput"].values()) == pytest.approx(report["wall_seconds"], abs=0.01)


@pytest.mark.slow
def test_a_disk_that_does_not_take_the_record_ends_the_run_where_it_was(world, whole, monkeypatch):
    poisoned(monkeypatch, world, TWICE)
    in_the_way = world.folder / "full" / ".rollbacks.json.partial"
    in_the_way.mkdir(parents=True)
    with pytest.raises(UserError, match="from step 11 to 14, and the run cannot be taken back, as .*rollbacks.json"):
        run(world, "full")
    assert not recorded(world.folder / "full")
    in_the_way.rmdir()
    run(world, "full")
    assert recorded(world.folder / "full") == recorded(world.folder / "whole")
    assert batches(world, "full") == batches(world, "whole") and losses(world, "full") == losses(world, "whole")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["recorded", "later"])
def test_killed_at_a_rollback_or_after_it_the_run_goes_on_alike(world, whole, monkeypatch, moment):
    with pytest.MonkeyPatch.context() as first:
        if moment == "recorded":  # rollbacks.json is written, the newer checkpoints are still there

            def killed(checkpointer, rollbacks, **_):
                if rollbacks:
                    raise Killed

            first.setattr(rollback, "set_others_aside", killed)
        poisoned(first, world, TWICE, killed_at=STEPS - 2)
        with pytest.raises(Killed):
            run(world, moment)
    poisoned(monkeypatch, world, TWICE)
    run(world, moment)
    assert recorded(world.folder / moment) == recorded(world.folder / "whole")
    assert batches(world, moment) == batches(world, "whole")
    assert losses(world, moment) == losses(world, "whole")


def test_a_checkpoint_of_another_precision_comes_back_with_the_loss_scale_of_this_one(world, tmp_path):
    config = resolve(world.config, devices=1)
    setup = make_setup(config, make_mesh(config.parallel, jax.devices()[:1]))
    state = make_state(config, setup.optimizer, setup.shardings)
    half = replace(config, ["train", "precision"], "float16")
    saved = dataclasses.replace(state, scale=init_scale("float16"))
    with Checkpointer(tmp_path, config.checkpoint) as checkpointer:
        checkpointer.save(3, saved, metadata={"config": as_config_dict(half).to_dict()})
        checkpointer.wait()
        run = SimpleNamespace(checkpointer=checkpointer, setup=setup, config=config, log=print)
        assert rollback._restore(run, 2) is None
        found = rollback._restore(run, 3).state.scale
        kept = rollback._restore(SimpleNamespace(**{**vars(run), "config": half}), 3).state.scale
    np.testing.assert_array_equal(found.scale, init_scale("float32").scale)
    np.testing.assert_array_equal(kept.scale, init_scale("float16").scale)
    assert found.scale != kept.scale


@pytest.mark.slow
def test_after_so_many_rollbacks_the_run_ends_and_says_so(world, monkeypatch):
    poisoned(monkeypatch, world, TWICE | {20, 21})
    for _ in range(2):  # and the same command ends alike
        with pytest.raises(UserError, match="from step 9 to 10, and the run was taken back 2 times already"):
            run(world, "ended")
    assert len(recorded(world.folder / "ended")) == 2


@pytest.mark.slow
def test_without_an_old_enough_checkpoint_the_run_ends_and_says_so(world, monkeypatch):
    poisoned(monkeypatch, world, {0, 1})
    with pytest.raises(UserError, match="no whole checkpoint of step 0 or before .*: lower checkpoint.every_steps"):
        run(world, "early")
