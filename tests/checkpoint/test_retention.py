"""What is kept, and how the rest goes: by count, score, steps and hours, for a rollback, and where removing fails."""

import errno
import os
import time
import types
from pathlib import Path

import jax.numpy as jnp
import pytest

from maxlm.checkpoint.manager import Checkpointer
from maxlm.checkpoint.reader import CheckpointReader
from maxlm.config import CheckpointConfig


def save_all(folder: Path, config: CheckpointConfig, steps, scores=None) -> list[int]:
    """Saves tiny states one after the other, closing in between as a run that is continued does."""
    with Checkpointer(folder, config) as checkpointer:
        for step in steps:
            checkpointer.save(step, {"x": jnp.full(3, step)}, metadata={})
            if (score := (scores or {}).get(step)) is not None:
                checkpointer.score(step, score)  # it is evaluated once it is saved
    return CheckpointReader(folder).steps()


def test_keeps_the_latest(tmp_path):
    assert save_all(tmp_path, CheckpointConfig(keep_latest=2), [1, 2, 3, 4]) == [3, 4]


def test_keeps_the_best_and_always_the_newest(tmp_path):
    scores = {1: 1.9, 2: 1.2, 3: 1.5, 5: 1.4, 6: float("nan"), 7: 2.5}  # 4 was not evaluated, 7 is the worst
    config = CheckpointConfig(keep_latest=1, keep_best=2)
    assert save_all(tmp_path, config, [1, 2, 3, 4], scores) == [2, 3, 4]
    assert save_all(tmp_path, config, [5, 6, 7], scores) == [2, 5, 7]  # another process knows the scores from disk


def test_a_score_belongs_to_the_state_that_was_saved(tmp_path):
    """One of a step that is saved again is another's, and of what was not saved there is none."""
    with Checkpointer(tmp_path, CheckpointConfig(keep_latest=1, keep_best=1)) as checkpointer:
        checkpointer.save(1, {"x": jnp.zeros(3)}, metadata={})
        checkpointer.score(1, 1.0)
        checkpointer.score(2, 0.5)
        assert (checkpointer.score_of(1), checkpointer.score_of(2)) == (1.0, None)
        checkpointer.set_aside([1], "rolled_back")
        checkpointer.save(1, {"x": jnp.ones(3)}, metadata={})
        checkpointer.wait()
        assert checkpointer.score_of(1) is None
        checkpointer.save(2, {"x": jnp.ones(3)}, metadata={})
    assert CheckpointReader(tmp_path).steps() == [2]
    (tmp_path / "2" / "score").write_text("torn")
    with pytest.raises(ValueError, match="torn"):
        CheckpointReader(tmp_path).score_of(2)


def test_a_read_error_costs_no_checkpoint(tmp_path, monkeypatch):
    config, scores = CheckpointConfig(keep_latest=1, keep_best=1), {1: 1.0, 2: 3.0, 3: 2.0, 4: 2.5}
    assert save_all(tmp_path, config, [1, 2], scores) == [1, 2]
    really, failing = CheckpointReader.record, [5, 0]

    def record(reader, step):
        if step == 1 and failing[0]:
            failing[:] = failing[0] - 1, failing[1] + 1
            raise OSError(errno.EIO, "for a moment")
        return really(reader, step)

    monkeypatch.setattr(CheckpointReader, "record", record)
    assert save_all(tmp_path, config, [3], scores) == [1, 2, 3] and failing[1]  # the best stays while it cannot be read
    failing[0] = 0
    assert save_all(tmp_path, config, [4], scores) == [1, 4]


@pytest.mark.parametrize(
    ("every", "steps", "kept"),
    [
        (4, [2, 4, 6, 8, 9], [4, 8, 9]),
        (6, [4, 8, 12, 16, 20], [8, 12, 20]),  # saves that are no multiples of it
        (10, [7, 19, 23, 24, 46, 49, 50], [19, 23, 46, 50]),  # as far apart as failures and cost make best
    ],
)
def test_keeps_the_first_at_or_after_each_multiple(tmp_path, every, steps, kept):
    assert save_all(tmp_path, CheckpointConfig(keep_latest=1, keep_every_steps=every), steps) == kept


def test_keeps_one_in_so_many_hours(tmp_path, monkeypatch):
    clock = iter([1e9 + 3600 * hours for hours in (0.0, 0.5, 1.1, 1.5, 2.0, 2.2)])
    fake = types.SimpleNamespace(time=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr("maxlm.checkpoint.manager.time", fake)
    config = CheckpointConfig(keep_latest=1, keep_every_hours=1.0)
    assert save_all(tmp_path, config, [1, 2, 3, 4]) == [1, 3, 4]
    assert save_all(tmp_path, config, [5, 6]) == [1, 3, 6]  # another process knows the times from disk


def test_what_a_rollback_may_need_stays_as_long_as_it_may(tmp_path):
    config = CheckpointConfig(keep_latest=2)
    needed = {100: None, 120: 101, 140: 101, 160: 121, 180: None}
    with Checkpointer(tmp_path, config) as checkpointer:
        seen = {}
        for step in (60, 80, *needed):
            checkpointer.back_to = needed.get(step)
            checkpointer.save(step, {"x": jnp.full(3, step)}, metadata={})
            checkpointer.wait()
            seen[step] = checkpointer.steps()
    assert seen == {
        60: [60],
        80: [60, 80],
        100: [80, 100],
        120: [80, 100, 120],
        140: [80, 100, 120, 140],
        160: [100, 120, 140, 160],  # 100 and 120 are the newest up to 121
        180: [160, 180],
    }


def test_an_old_one_that_cannot_be_removed_fails_no_save(tmp_path, monkeypatch):
    """As on a disk that others use: a file that somebody holds open, or may not be removed."""
    log: list[str] = []
    with Checkpointer(tmp_path, CheckpointConfig(keep_latest=1), log=log.append) as checkpointer:

        def save(step):
            assert checkpointer.save(step, {"x": jnp.full(3, step)}, metadata={}).started
            checkpointer.wait()
            assert checkpointer.failures == 0 and checkpointer.pending_error() is None
            checkpointer._remover.submit(lambda: None).result()

        save(1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "rmdir", refused)
            for step in (2, 3):
                save(step)
                assert checkpointer.steps() == [step]
        told = [line for line in log if "could not remove" in line]
        assert len(told) == 2 and f"1.retired, 2.retired in {tmp_path}; the next start tries again" in told[1]
        rename = Path.rename
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", lambda path, to: refused() if path.name == "3" else rename(path, to))
            save(4)
        assert checkpointer.steps() == [3, 4] and "checkpoint 3 need not be kept and was not removed" in log[-1]
        save(5)
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def refused(*_args, **_kwargs):
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_a_failure_after_the_commit_does_not_keep_the_last_save_from_ending(tmp_path, monkeypatch):
    """Else who waits for a save without failures, as a run does that leaves, waits for ever."""
    finish = Checkpointer._finish

    def late(checkpointer):
        finish(checkpointer)
        raise OSError(errno.EIO, "for a moment")

    with Checkpointer(tmp_path, CheckpointConfig(), log=lambda line: None) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(Checkpointer, "_finish", late)
            checkpointer.save(1, {"x": jnp.ones(3)}, metadata={})
            checkpointer.wait()
        assert checkpointer.failures == 1 and checkpointer.steps() == [1]
        assert not checkpointer.save(1, {"x": jnp.ones(3)}, metadata={}).started
        assert checkpointer.failures == 0


def test_a_removal_that_was_cut_off_is_named_and_ended(tmp_path):
    save_all(tmp_path, CheckpointConfig(), [1, 2])
    (tmp_path / "1").rename(tmp_path / "1.retired")
    (tmp_path / "1.retired" / "commit_success.txt").unlink()
    log: list[str] = []
    with Checkpointer(tmp_path, CheckpointConfig(), log=log.append) as checkpointer:
        assert checkpointer.steps() == [2]
    assert log == ["removed 1.retired: its removal was interrupted"]
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_steps_that_were_retired_can_be_saved_again(tmp_path):
    """Where the run has gone back, and no newer checkpoint had to be set aside."""
    with Checkpointer(tmp_path, CheckpointConfig(keep_latest=1)) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"x": jnp.full(3, step)}, metadata={})
        checkpointer.wait()
        (tmp_path / "3").rename(tmp_path / "elsewhere")
        for step in (1, 2):
            assert checkpointer.save(step, {"x": jnp.full(3, -step)}, metadata={}).started
        checkpointer.wait()
        assert checkpointer.failures == 0 and checkpointer.steps() == [2]
