"""Checkpoints in a bucket: other meshes, damage, interrupted and failing saves, retention, a server that stumbles."""

import json
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.checkpoint import bucket as buckets
from maxlm.checkpoint.bucket import open_checkpointer, open_reader
from maxlm.checkpoint.reader import CheckpointError, CheckpointReader
from maxlm.config import CheckpointConfig
from maxlm.storage import Folder, StorageError
from tests.checkpoint.test_manager import KEEP_ALL, SPECS, abstract, assert_same, make_state, mesh

METADATA = {"config": {"seed": 2}, "pairs": [1, 2]}


@pytest.fixture
def folder(bucket):
    return f"{bucket}/run/checkpoints"


def save(folder, step, *, config=KEEP_ALL, on=(4, 2), log=print, score=None):
    with open_checkpointer(folder, config, log=log) as checkpointer:
        assert checkpointer.save(step, make_state(step, mesh(*on)), metadata=METADATA).started
        if score is not None:
            checkpointer.score(step, score)
        checkpointer.wait()
        assert checkpointer.pending_error() is None
        return checkpointer.steps()


def restore(folder, log=None, on=(4, 2)):
    with open_checkpointer(folder, KEEP_ALL, log=(log if log is not None else []).append) as checkpointer:
        return checkpointer.restore(abstract(make_state(0, mesh(*on))))


def test_restores_onto_other_meshes_and_from_a_stumbling_server(folder, server):
    server.fail_every, server.delay_every, server.delay = 7, 11, 0.1
    assert restore(folder) is None
    assert save(folder, 1) == [1] and save(folder, 2) == [1, 2]
    for shape in ((4, 2), (2, 4), (1, 1)):
        found = restore(folder, on=shape)
        assert found.step == 2 and found.metadata == METADATA
        assert_same(found.state, make_state(2, mesh(1, 1)))
    reader = open_reader(folder)
    assert reader.record(2).metadata == METADATA
    params = abstract(make_state(0, mesh(1, 1)))["params"]
    assert_same(reader.restore_params(params, step=1).state, make_state(1, mesh(1, 1))["params"])
    wanted = abstract(make_state(0, mesh(1, 1)))
    wanted["params"]["wide"] = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    with pytest.raises(CheckpointError, match="params/wide: saved as float32"):
        reader._search(wanted, step=None, prefix="")


def test_a_copy_of_the_folder_on_a_disk_is_a_checkpoint(folder, tmp_path):
    save(folder, 3)
    remote = open_reader(folder).path(3)
    for name in remote.names():
        remote.download(name, tmp_path / "3" / name)
    found = CheckpointReader(tmp_path)._search(abstract(make_state(0, mesh(2, 2))), step=None, prefix="")
    assert_same(found.restored.state, make_state(3, mesh(1, 1)))


def objects(folder, step, part):
    """The objects of a checkpoint whose name has `part` in it."""
    where = open_reader(folder).path(step)
    return where, [name for name in where.names() if part in name]


def damage(where, names, how):
    for name in names:
        content = where.read(name)
        if how == "flipped":
            where.write(name, content[:9] + bytes([content[9] ^ 4]) + content[10:])
        elif how in ("shape", "chunk_shape"):  # a digit of it
            begin = re.search(rf'"{how}":\['.encode(), content).end()
            changed = content[:begin] + bytes([content[begin] ^ 2]) + content[begin + 1 :]
            where.write(name, changed)
        elif how == "cut":
            where.write(name, content[: len(content) // 2])
        else:
            where.remove(name)


@pytest.mark.parametrize(
    ("part", "how"),
    [("wide/c/", "flipped"), ("wide/c/1/0", "gone"), ("narrow/c/", "cut"), ("record/", "flipped"),
     ("wide/zarr.json", "shape"), pytest.param("wide/zarr.json", "chunk_shape", marks=pytest.mark.slow),
     *(pytest.param(part, "gone", marks=pytest.mark.slow) for part in ("wide/zarr.json", "digests", "record/"))],
)  # fmt: skip
def test_damage_is_named_and_the_one_before_is_used(folder, part, how):
    save(folder, 1)
    save(folder, 2)
    damage(*objects(folder, 2, part), how)
    log: list[str] = []
    found = restore(folder, log)
    assert found.step == 1
    assert_same(found.state, make_state(1, mesh(1, 1)))
    assert log[0].startswith("checkpoint 2 is damaged: ") and "using checkpoint 1 instead" in log[-1]
    commits = (Folder(folder) / "commits").names()
    assert len(commits) == 2 and any(name.endswith(".damaged-1") for name in commits)
    assert save(folder, 2) == [1, 2] and restore(folder).step == 2
    assert len((Folder(folder) / "commits").names()) == 3  # the damaged one is still there


def test_all_damaged_is_an_error_and_changes_nothing(folder):
    save(folder, 1)
    damage(*objects(folder, 1, "wide/c/"), "flipped")
    before = Folder(folder).names()
    with pytest.raises(CheckpointError, match="no whole checkpoint was found in s3://"):
        restore(folder)
    assert Folder(folder).names() == before


def test_a_save_cut_off_at_any_request_is_never_chosen(folder, server):
    """The bucket goes away after the first, second, ... write of a save: what counts is the commit, the last one."""
    save(folder, 1)
    state, outcomes = make_state(2, mesh(4, 2)), []
    for cut in range(0, 60, 5):
        written = []

        def late(method, path, cut=cut, written=written):
            written.extend([path] * (method == "PUT"))
            return len(written) > cut

        log: list[str] = []
        with open_checkpointer(folder, KEEP_ALL, log=log.append) as checkpointer:
            server.concerns, server.refuse = late, True
            checkpointer.save(2, state, metadata={})
            checkpointer.wait()
            server.heal()
            error = checkpointer.pending_error()
        outcomes.append(error is None)
        if error is None:
            assert restore(folder).step == 2
            break
        assert "checkpoint 2 was not saved" in str(error) and checkpointer.failures == 1
        found = restore(folder)
        assert found.step == 1, cut
    assert outcomes[-1] and len(outcomes) > 5, outcomes
    begun = (Folder(folder) / "begun").names()
    assert sorted(begun) == sorted((Folder(folder) / "commits").names())  # the rest was swept


def test_a_commit_whose_answer_was_lost_leaves_nothing_once_the_save_was_repeated(folder, server):
    with open_checkpointer(folder, KEEP_ALL) as checkpointer:
        checkpointer.save(1, make_state(1, mesh(4, 2)), metadata={})
        checkpointer.wait()
        server.lose, server.concerns = True, lambda method, path: method == "PUT" and "/commits/2-" in path
        checkpointer.save(2, make_state(2, mesh(4, 2)), metadata={})
        checkpointer.wait()
        assert checkpointer.failures == 1 and checkpointer.steps() == [1, 2]  # it is there all the same
        server.heal()
        checkpointer.save(2, make_state(2, mesh(4, 2)), metadata={})
        checkpointer.wait()
        assert checkpointer.failures == 0 and checkpointer.steps() == [1, 2]
    names = Folder(folder).names()
    assert len([name for name in names if name.startswith("commits/")]) == 2
    assert len({name.partition("/")[0] for name in names} - {"begun", "commits"}) == 2
    assert restore(folder).step == 2


def test_an_interrupted_save_is_named_and_removed(folder):
    save(folder, 1)
    left = Folder(folder) / "5-18c3f2a1b2c-1"
    left.write("state/arrays.x/c/0", b"123")
    (Folder(folder) / "begun").write("5-18c3f2a1b2c-1", b"")
    log: list[str] = []
    assert restore(folder, log).step == 1
    assert log == ["removed 5-18c3f2a1b2c-1: the save of this checkpoint was interrupted"]
    assert left.names() == []


def test_a_bucket_that_does_not_answer_is_no_damage(folder, server):
    save(folder, 1)
    save(folder, 2)
    server.concerns, server.refuse = lambda method, path: "/c/" in path and "/2-" in path, True
    with pytest.raises(StorageError, match="PERMISSION_DENIED"):
        restore(folder)
    server.heal()
    assert restore(folder).step == 2


def test_keeps_what_it_is_told(folder):
    config = CheckpointConfig(keep_latest=1, keep_best=1)
    scores = {1: 1.9, 2: 1.2, 3: 1.5, 4: 1.6}
    for step, score in scores.items():
        kept = save(folder, step, config=config, score=score)
    assert kept == [2, 4]
    names = {name.split("/")[0] for name in Folder(folder).names()} - {"commits", "begun"}
    assert sorted(int(name.split("-")[0]) for name in names) == [2, 4]  # the rest is gone, not only unnamed
    with open_checkpointer(folder, config) as checkpointer:
        assert not checkpointer.save(4, make_state(9, mesh(1, 1)), metadata={}).started
        checkpointer.back_to = 3
        assert checkpointer.save(5, make_state(5, mesh(1, 1)), metadata={}).started
        checkpointer.wait()
        assert checkpointer.steps() == [2, 5]


def test_a_step_that_was_retired_can_be_saved_again(folder):
    log: list[str] = []
    with open_checkpointer(folder, CheckpointConfig(keep_latest=1), log=log.append) as checkpointer:
        for step in (1, 2):
            assert checkpointer.save(step, make_state(step, mesh(4, 2)), metadata={}).started
        assert not checkpointer.save(2, make_state(9, mesh(4, 2)), metadata={}).started
        assert log == ["checkpoint 2 is there already and stays: nothing was saved"]
        checkpointer.set_aside([2], "rolled_back")  # the run has gone back to before step 1
        assert checkpointer.save(1, make_state(7, mesh(4, 2)), metadata={}).started
        found = checkpointer.restore(abstract(make_state(0, mesh(1, 1))))
    assert found.step == 1
    assert_same(found.state, make_state(7, mesh(1, 1)))


def test_no_process_writes_before_process_0_has_marked_the_folder(folder, monkeypatch):
    def done_first(what, work):
        marks.append(what)
        raise OSError("process 0: no such luck")

    marks: list[str] = []
    with open_checkpointer(folder, KEEP_ALL) as checkpointer:
        monkeypatch.setattr(buckets, "done_first", done_first)
        checkpointer.save(1, make_state(1, mesh(4, 2)), metadata={})
        checkpointer.wait()
        assert len(marks) == 1 and "no such luck" in str(checkpointer.pending_error())
    assert Folder(folder).names() == []


def test_a_bucket_that_does_not_answer_for_a_moment_costs_no_checkpoint(folder, server):
    config, log = CheckpointConfig(keep_latest=1, keep_best=1), []
    for step, score in ((1, 1.0), (2, 3.0)):
        save(folder, step, config=config, score=score)
    server.concerns = lambda method, path: method == "GET" and "/1-" in path and path.endswith("record/metadata")
    server.refuse = True
    assert save(folder, 3, config=config, log=log.append, score=2.0) == [1, 2, 3]
    assert "was not removed" in log[-1]
    server.heal()
    assert save(folder, 4, config=config, score=2.0) == [1, 4]


def test_the_state_may_be_donated_at_once(folder, server):
    train = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
    x = train(jnp.arange(1 << 16, dtype=jnp.float32))
    expected = np.array(x, copy=True)
    server.delay_every, server.delay = 1, 0.05
    with open_checkpointer(folder, KEEP_ALL) as checkpointer:
        with jax.transfer_guard("disallow"):
            checkpointer.save(1, {"x": x}, metadata={})
        for _ in range(3):
            x = train(x)
        found = checkpointer.restore({"x": jax.ShapeDtypeStruct(expected.shape, expected.dtype)})
    np.testing.assert_array_equal(found.state["x"], expected)


def test_large_shards_are_cut_and_come_back(folder, monkeypatch):
    monkeypatch.setattr(buckets, "_CHUNK", 1000)
    assert save(folder, 1) == [1]
    where, names = objects(folder, 1, "wide/c/")
    assert len(names) > 8 and all(len(where.read(name)) <= 1000 for name in names)
    assert_same(restore(folder).state, make_state(1, mesh(1, 1)))
    assert SPECS["params/wide"] == ("fsdp", "tensor")


def test_process_0_gives_up_a_part_that_does_not_come(folder, monkeypatch):
    monkeypatch.setattr(buckets, "PARTS_SECONDS", 0.2)
    monkeypatch.setattr(buckets, "_POLL", 0.05)
    with open_checkpointer(folder, KEEP_ALL) as checkpointer:
        parts = Folder(folder) / "1-0-1" / "parts"
        parts.write("00000", json.dumps({}))
        checkpointer._await_parts(parts, threading.Event())
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(StorageError, match=r"the parts of processes \[1\] did not come"):
            checkpointer._await_parts(parts, threading.Event())
        monkeypatch.undo()


def test_what_belongs_to_a_checkpoint_is_in_the_bucket_before_its_commit(folder):
    seen = []
    with open_checkpointer(folder, KEEP_ALL, log=lambda _: None) as checkpointer:
        checkpointer.before_commit = lambda: seen.append(open_reader(folder).steps())
        checkpointer.save(1, {"x": jnp.ones(3)}, metadata={})
        checkpointer.wait()
        assert seen == [[]] and checkpointer.steps() == [1] and checkpointer.failures == 0

        def full():
            raise StorageError("no room for the metrics")

        checkpointer.before_commit = full
        for failed in (1, 2):
            checkpointer.save(1 + failed, {"x": jnp.ones(3)}, metadata={})
            checkpointer.wait()
            assert checkpointer.failures == failed and "no room" in str(checkpointer.pending_error())
        assert checkpointer.steps() == [1]
