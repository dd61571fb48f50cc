"""Copies on the machines' own disks: proved, kept apart, and put together from what is left of them."""

import errno
import os
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxlm.checkpoint.interval import interval_steps
from maxlm.checkpoint.local import KEPT, LocalCopies, assemble, covered
from maxlm.checkpoint.manager import Checkpointer
from maxlm.checkpoint.pace import Pace
from maxlm.errors import UserError
from maxlm.train import run as opening
from tests.checkpoint.test_manager import KEEP_ALL, abstract, assert_same, flip, make_state, mesh


@pytest.fixture
def copies(tmp_path):
    lines: list[str] = []
    found = LocalCopies(tmp_path, "s3://bucket/run", log=lines.append)
    found.lines = lines
    yield found
    found.close()


def restore(copies, *, after=0, on=(4, 2), usable=lambda metadata: True):
    return copies.restore(abstract(make_state(0, mesh(*on))), after=after, usable=usable)


def save(copies, *steps):
    for step in steps:
        with jax.transfer_guard("disallow"):
            copies.save(step, make_state(step, mesh(4, 2)), metadata={"seed": step})
    copies.wait()


def test_what_a_killed_process_was_writing_is_removed_at_the_next_start(copies, tmp_path):
    save(copies, 3)
    (copies.folder / "4.partial").mkdir()
    (copies.folder / "4.partial" / "data").write_bytes(b"x" * 1000)
    LocalCopies(tmp_path, "s3://bucket/run", log=print).close()
    assert [path.name for path in copies.folder.iterdir()] == ["3"]


def test_the_newest_copy_comes_back_and_few_are_kept(copies):
    assert restore(copies) is None
    save(copies, 3, 6, 9)
    assert sorted(path.name for path in copies.folder.iterdir()) == ["6", "9"] and KEPT == 2
    found = restore(copies)
    assert found.step == 9 and found.metadata == {"seed": 9}
    assert_same(found.state, make_state(9, mesh(1, 1)))
    assert restore(copies, after=9) is None  # a checkpoint that is as new comes first
    assert restore(copies, usable=lambda metadata: metadata["seed"] == 6).step == 6
    assert restore(copies, on=(2, 4)) is None and "another mesh" in copies.lines[-1]
    other = LocalCopies(copies.folder.parent.parent, "s3://bucket/other", log=print)
    assert restore(other) is None


def test_copies_of_a_way_that_was_given_up_do_not_push_out_those_of_the_new_one(copies):
    save(copies, 20, 30, 4)  # back from 30 to a checkpoint before 4
    assert [path.name for path in copies.folder.iterdir()] == ["4"]
    assert restore(copies).step == 4
    save(copies, 8, 12)
    copies.forget_after(8)  # as where the run goes on from
    assert restore(copies).step == 8 and [path.name for path in copies.folder.iterdir()] == ["8"]


def test_copies_of_an_earlier_run_in_the_same_place_are_left_out(copies, tmp_path):
    """The folder was deleted and begun anew with another learning rate: the same data, the same shapes."""
    setup = SimpleNamespace(abstract_state=lambda: abstract(make_state(0, mesh(4, 2))))
    loader = SimpleNamespace(records=lambda: {"skips": []})

    def begun(run):
        return opening.restore(checkpointer, copies, setup, loader, run=run)

    with Checkpointer(tmp_path / "checkpoints", KEEP_ALL) as checkpointer:
        copies.save(5, make_state(5, mesh(4, 2)), metadata={"data": {"skips": []}, "run": "first"})
        assert begun("first").step == 5
        assert begun("second") is None and "belongs to another run" in copies.lines[-1]
        assert begun("") is None
        copies.save(6, make_state(6, mesh(4, 2)), metadata={"data": {"skips": []}})  # by a run without an id
        assert begun("").step == 6 and begun("second") is None


def test_copies_go_with_the_end_of_their_run_and_those_of_other_runs_when_they_are_old(copies, tmp_path):
    save(copies, 3)
    old, late, foreign = (
        LocalCopies(tmp_path, f"s3://bucket/{name}", log=print) for name in ("old", "late", "foreign")
    )
    for other in (old, late, foreign):
        save(other, 5)
        other.close()
    (foreign.folder.parent / "notes.txt").write_text("somebody's")
    (tmp_path / "results-2024").mkdir()
    month = time.time() - 31 * 86400
    for folder in (copies.folder, old.folder, foreign.folder, tmp_path / "results-2024"):
        os.utime(folder, (month, month))
    lines: list[str] = []
    again = LocalCopies(tmp_path, "s3://bucket/run", log=lines.append)
    assert not old.folder.parent.exists() and lines == [
        f"removed {old.folder.parent}: its run has copied nothing there in 30 days"
    ]
    assert late.folder.exists() and foreign.folder.exists() and (tmp_path / "results-2024").exists()
    assert restore(again).step == 3  # its own, however old
    peer = again.folder.with_name("process-00001")
    peer.mkdir()
    again.remove()
    assert list(again.folder.parent.iterdir()) == [peer] and restore(again) is None
    peer.rmdir()
    again.remove()
    assert not again.folder.parent.exists()
    save(again, 7)
    assert restore(again).step == 7
    again.close()


@pytest.mark.parametrize("file", ["data", "index.json"])
def test_a_damaged_copy_is_passed_over(copies, file):
    save(copies, 1, 2)
    target = copies.folder / "2" / file
    flip(target, target.stat().st_size // 2)
    found = restore(copies)
    assert found.step == 1
    assert_same(found.state, make_state(1, mesh(1, 1)))
    assert "local copy of step 2" in copies.lines[0] and "altered" in copies.lines[0]
    target.unlink()
    assert restore(copies).step == 1


def test_a_copy_that_cannot_be_written_is_told_and_the_next_one_works(copies):
    copies.folder.parent.mkdir(parents=True)
    copies.folder.write_text("no folder can be made here")
    save(copies, 1)
    assert "a local copy was not written" in copies.lines[0]
    copies.folder.unlink()
    save(copies, 2)
    assert restore(copies).step == 2
    with pytest.raises(UserError, match="local_dir=gs://b/x is no folder"):
        LocalCopies("gs://b/x", "run", log=print)


def test_a_copy_for_which_there_is_no_room_takes_none(copies, monkeypatch):
    save(copies, 1)

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        save(copies, 2)
    assert "a local copy was not written: [Errno 28] No space left" in copies.lines[-1]
    assert [path.name for path in copies.folder.iterdir()] == ["1"]
    save(copies, 3)
    assert restore(copies).step == 3


def test_copies_go_beyond_the_newest_checkpoint_that_is_whole(copies, tmp_path):
    setup = SimpleNamespace(abstract_state=lambda: abstract(make_state(0, mesh(4, 2))))
    loader = SimpleNamespace(records=lambda: {"skips": []})
    metadata = {"data": {"skips": []}, "run": "this"}
    with Checkpointer(tmp_path / "checkpoints", KEEP_ALL, log=copies.lines.append) as checkpointer:
        for step in (3, 6):
            checkpointer.save(step, make_state(step, mesh(4, 2)), metadata=metadata)
        for step in (4, 5):
            copies.save(step, make_state(step, mesh(4, 2)), metadata=metadata)
        checkpointer.wait()
        assert opening.restore(checkpointer, copies, setup, loader, run="this").step == 6
        file = max((tmp_path / "checkpoints" / "6").rglob("*"), key=lambda path: path.stat().st_size)
        flip(file, file.stat().st_size // 2)
        found = opening.restore(checkpointer, copies, setup, loader, run="this")
        assert found.step == 5 and "checkpoint 6 is damaged" in "".join(copies.lines)
        assert_same(found.state, make_state(5, mesh(1, 1)))
        for step in (4, 5):
            flip(copies.folder / str(step) / "data", 100)
        found = opening.restore(checkpointer, copies, setup, loader, run="this")
        assert found.step == 3 and found.metadata == metadata
        assert_same(found.state, make_state(3, mesh(1, 1)))


CUBE = ("data", "fsdp", "tensor")


SPLITS = [("fsdp",), (("fsdp", "tensor"),), (None, "tensor"), ("tensor", "fsdp")]


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [*((spec, "float32") for spec in SPLITS), *(((), dtype) for dtype in ("bfloat16", "int32", "uint8", "bool"))],
)
def test_lost_shards_come_from_the_devices_that_hold_the_same(spec, dtype):
    """Half of the devices have lost theirs, each time other ones; NaN payloads and signed zeros count."""
    on = jax.make_mesh((2, 2, 2), CUBE, axis_types=(AxisType.Auto,) * 3)
    rng = np.random.default_rng(1)
    words = rng.integers(0, 256, (8, 4, np.dtype(jnp.dtype(dtype)).itemsize), np.uint8)
    value = words[..., 0] > 100 if dtype == "bool" else words.view(jnp.dtype(dtype))[..., 0]
    x = jax.device_put(value, NamedSharding(on, PartitionSpec(*spec)))
    leaf = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    halves = [on.devices[0], on.devices[1], np.array([on.devices[0, 0], on.devices[1, 1]])]
    for kept in halves:
        has = set(kept.ravel())
        own = {
            tuple(part.start or 0 for part in s.index): np.asarray(s.data)
            for s in x.addressable_shards
            if s.device in has
        }
        assert covered({"x": leaf}, has.__contains__)
        found = assemble(leaf, own, has.__contains__)
        assert found.sharding == x.sharding and found.dtype == x.dtype
        for shard in found.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.asarray(value[shard.index]).tobytes()


def test_what_nobody_has_any_more_is_seen():
    on = jax.make_mesh((2, 2, 2), CUBE, axis_types=(AxisType.Auto,) * 3)
    leaf = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(on, PartitionSpec("fsdp")))
    assert not covered({"x": leaf}, set(on.devices[:, 0].ravel()).__contains__)
    assert covered({"x": leaf}, set(on.devices[1, :, 0]).__contains__)


def test_the_pace_is_fixed_or_follows_from_cost_and_failures():
    fixed = Pace(10, mtbf=0.0)
    assert [step for step in range(31) if fixed.due(step)] == [10, 20, 30]
    assert fixed.saved(10, cost=100.0, write_seconds=0.0, step_seconds=1.0) == 10
    measured, found = Pace(1000, mtbf=3600.0), []
    for step in range(1, 1500):
        if measured.due(step):
            measured.saved(step, cost=2.0, write_seconds=0.0, step_seconds=1.0)
            found.append(step)
    apart = interval_steps(cost=2.0, mtbf=3600.0, step_seconds=1.0, write_seconds=0.0, at_most=1000)
    assert 100 < apart < 130 and found == [1000 + apart * n for n in range(len(found))] and len(found) > 3
    resumed = Pace(1000, mtbf=3600.0)
    assert [step for step in range(1201, 2300) if resumed.due(step)][0] == 2200
    for pace, first in ((measured, 50 + apart), (fixed, 60)):  # taken back by a rollback
        pace.go_on_from(50)
        assert [step for step in range(51, 400) if pace.due(step)][0] == first
