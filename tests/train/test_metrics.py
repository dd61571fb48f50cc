"""metrics.jsonl is exact and survives kills; TensorBoard and W&B follow it."""

import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import Config, TrainConfig
from maxlm.errors import UserError
from maxlm.train.goodput import Ledger
from maxlm.train.metrics import FILE_NAME, MetricsWriter, Truncation, cut_metrics, read_metrics


def writer(workdir, step=0, config=None):
    out = MetricsWriter(workdir, config or Config(), process_index=0)
    out.truncate(step)
    return out


def fill(workdir, steps):
    with writer(workdir) as out:
        for step in steps:
            out.write("step", step, {"loss": 1 / step})
            if step % 2 == 0:
                out.write("evaluation", step, {"store": "a", "bits_per_byte": 2.0})


def lines(workdir):
    return (workdir / FILE_NAME).read_bytes().splitlines(keepends=True)


def events(workdir):
    """Every TensorBoard event of a run, file by file in the order of their names (TFRecord framing)."""
    from tensorboardX.proto.event_pb2 import Event

    out = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            out.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return out


@settings(deadline=None, max_examples=30, database=None)  # files are written: the first example pays for imports
@given(st.lists(st.floats(width=32) | st.floats(), min_size=1, max_size=5))
def test_floats_read_back_bit_for_bit(tmp_path_factory, values):
    workdir = tmp_path_factory.mktemp("run")
    with writer(workdir) as out:
        for step, value in enumerate(values, 1):
            with np.errstate(over="ignore"):
                single = np.float32(value)
            given_as = single if step % 2 and float(single) == value else value
            out.write("step", step, {"loss": given_as, "norms": {"w": np.array([value, 1.0])}})
    for record, value in zip(read_metrics(workdir), values, strict=True):
        for back in (record["loss"], record["norms"]["w"][0]):
            assert struct.pack("d", back) == struct.pack("d", value) or (math.isnan(back) and math.isnan(value))
    for line in lines(workdir):  # no NaN or Infinity, which JSON does not know
        json.loads(line, parse_constant=lambda word: pytest.fail(word))


def test_types_survive(tmp_path):
    with writer(tmp_path) as out:
        out.write("step", 1, {"accepted": np.bool_(True), "tokens": np.int64(7), "note": "x", "list": (1, 2.5)})
    (record,) = read_metrics(tmp_path)
    assert record == {"kind": "step", "step": 1, "accepted": True, "tokens": 7, "note": "x", "list": [1, 2.5]}
    assert record["accepted"] is True


def test_a_run_cut_back_and_redone_has_the_bytes_of_one_never_killed(tmp_path):
    fill(tmp_path / "whole", range(1, 11))
    fill(tmp_path / "killed", range(1, 8))
    with (tmp_path / "killed" / FILE_NAME).open("ab") as file:
        file.write(b'{"kind": "step", "step": 8, "lo')
    out = MetricsWriter(tmp_path / "killed", Config(), process_index=0)
    assert out.truncate(4) == Truncation(kept=6, dropped=4, unreadable=1, last_step=4)
    for step in range(5, 11):
        out.write("step", step, {"loss": 1 / step})
        if step % 2 == 0:
            out.write("evaluation", step, {"store": "a", "bits_per_byte": 2.0})
    out.close()
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [FILE_NAME, "tensorboard"]


@settings(deadline=None, max_examples=30, database=None)  # files are written: the first example pays for imports
@given(st.integers(0, 6), st.integers(0, 400))
def test_any_cut_of_the_file_is_survived(tmp_path_factory, step, cut):
    workdir = tmp_path_factory.mktemp("run")
    fill(workdir, range(1, 6))
    whole = (workdir / FILE_NAME).read_bytes()
    (workdir / FILE_NAME).write_bytes(whole[:cut])
    with writer(workdir, step):
        pass
    after = (workdir / FILE_NAME).read_bytes()
    assert whole.startswith(after)
    expected = [line for line in whole[:cut].splitlines(keepends=True) if line.endswith(b"\n")]
    assert after.splitlines(keepends=True) == [line for line in expected if json.loads(line)["step"] <= step]


def test_that_a_save_failed_is_kept_wherever_the_run_goes_back_to(tmp_path):
    """Also once it stands between other records, and where nothing but the end of the file has to go."""
    with writer(tmp_path) as out:
        for step in range(1, 9):
            out.write("step", step, {"loss": 1 / step})
            if step in (3, 6):
                out.write("checkpoint_failed", step, {"reason": "no room", "in_row": 1})
    whole = lines(tmp_path)
    with writer(tmp_path, 4):
        pass
    assert lines(tmp_path) == [*whole[:5], whole[7]]
    with writer(tmp_path, 4) as out:
        assert lines(tmp_path) == [*whole[:5], whole[7]]
        out.write("step", 5, {"loss": 1 / 5})
        out.write("step", 6, {"loss": 1 / 6})
        out.truncate(5)
    assert lines(tmp_path) == [*whole[:5], whole[7], whole[5]]
    with writer(tmp_path, 2):
        pass
    assert lines(tmp_path) == [*whole[:2], whole[3], whole[7]]
    # A branch of a study begins with its trunk's records, but the saves that failed are the trunk's.
    assert cut_metrics(tmp_path / FILE_NAME, 2) == Truncation(kept=2, dropped=2, unreadable=0, last_step=2)
    assert lines(tmp_path) == whole[:2]


def test_what_is_written_again_is_taken_back_where_a_process_goes_on_and_nowhere_else(tmp_path):
    fill(tmp_path, range(1, 7))
    with writer(tmp_path, 4) as out:
        out.drop("evaluation", 2)  # is never written again
        out.drop("evaluation", 4)
        out.write("evaluation", 4, {"store": "a", "bits_per_byte": 1.5})
    found = [(record["kind"], record["step"], record.get("bits_per_byte")) for record in read_metrics(tmp_path)]
    steps = [("step", step, None) for step in range(1, 5)]
    assert found == [*steps[:2], ("evaluation", 2, 2.0), *steps[2:], ("evaluation", 4, 1.5)]


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    fill(tmp_path, range(1, 5))
    before = lines(tmp_path)

    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", fail)
    with writer(tmp_path, 4) as out:
        out.write("cost", 4, {"x": 1})
        out.flush()
        before = lines(tmp_path)
        with pytest.raises(UserError, match="cannot be cut back to step 4.*disk gone.*the same command goes on"):
            out.drop("evaluation", 4)  # not the last record, so that those after it have to be written elsewhere
    assert lines(tmp_path) == before


def test_other_processes_write_nothing(tmp_path):
    with MetricsWriter(tmp_path, Config(train=TrainConfig(wandb_project="p")), process_index=1) as out:
        out.truncate(3)
        out.write("step", 4, {"loss": 1.0})
        out.flush()
    assert list(tmp_path.iterdir()) == []


def test_misuse_is_refused(tmp_path):
    out = MetricsWriter(tmp_path, Config(), process_index=0)
    with pytest.raises(RuntimeError, match="truncate"):
        out.write("step", 1, {})
    out.truncate(5)
    with pytest.raises(ValueError, match="step 5 is already recorded"):
        out.write("step", 5, {})
    out.write("step", 6, {})
    with pytest.raises(ValueError, match="step 6"):
        out.write("step", 6, {})
    out.truncate(2)  # a rollback
    out.write("step", 3, {})
    out.close()


def test_lines_are_buffered_until_flushed(tmp_path):
    with writer(tmp_path) as out:
        out.write("step", 1, {"loss": 1.0})  # the first goes out, and with it the interval begins
        out.write("step", 2, {"loss": 1.0})
        assert len(lines(tmp_path)) == 1
        out.flush()
        assert len(lines(tmp_path)) == 2


def test_a_flush_reaches_the_disk(tmp_path, monkeypatch):
    """A machine may die with a committed checkpoint on disk and its metrics in memory."""
    synced = []
    with writer(tmp_path) as out:
        monkeypatch.setattr(os, "fsync", synced.append)
        out.write("step", 1, {"loss": 1.0})
        assert not synced  # waiting for the disk with every line would be too dear
        out.flush()
        assert len(synced) == 2  # the lines and TensorBoard's events


def test_flushed_lines_survive_sigkill(tmp_path):
    code = (
        "import sys, time, pathlib\nfrom maxlm.config import Config\nfrom maxlm.train.metrics import MetricsWriter\n"
        "out = MetricsWriter(pathlib.Path(sys.argv[1]), Config(), process_index=0)\nout.truncate(0)\n"
        "for step in range(1, 6): out.write('step', step, {'loss': 0.1 * step})\n"
        "out.flush()\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [record["loss"] for record in read_metrics(tmp_path)] == [0.1 * step for step in range(1, 6)]


def test_tensorboard_purges_what_is_redone(tmp_path):
    with writer(tmp_path) as out:
        out.write("step", 3, {"loss": 1.5, "norms": {"w": [1.0, 2.0]}})
    with writer(tmp_path, 2) as out:  # within the same second: its file must not take the first one's place
        out.write("step", 3, {"loss": 1.25})
    from tensorboardX.proto.event_pb2 import SessionLog

    found = events(tmp_path)
    starts = [event.step for event in found if event.session_log.status == SessionLog.START]
    assert starts == [1, 3]  # steps from 3 on are dropped
    scalars = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in found if e.summary.value]
    assert scalars == [
        (3, {"step/loss": 1.5, "step/norms/w/000": 1.0, "step/norms/w/001": 2.0}),
        (3, {"step/loss": 1.25}),
    ]


def test_torch_is_not_loaded_for_tensorboard(tmp_path):
    code = (
        "import sys, pathlib\nfrom maxlm.config import Config\nfrom maxlm.train.metrics import MetricsWriter\n"
        "out = MetricsWriter(pathlib.Path(sys.argv[1]), Config(), process_index=0)\nout.truncate(0)\n"
        "assert 'torch' not in sys.modules and 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_wandb_continues_one_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, args, kwargs))

    def init(**kwargs):
        calls.append(("init", (), kwargs))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = Config(name="quick", train=TrainConfig(wandb_project="lm"))
    for step in (1, 2):
        with writer(tmp_path, step - 1, config) as out:
            out.write("step", step, {"loss": 2.0, "ok": True})
    inits = [kwargs for name, _, kwargs in calls if name == "init"]
    assert [i["project"] for i in inits] == ["lm", "lm"]
    assert inits[0]["id"] == inits[1]["id"] and inits[0]["resume"] == "allow" and inits[0]["name"] == "quick"
    assert inits[0]["config"]["train"]["wandb_project"] == "lm"
    logged = [args[0] for name, args, _ in calls if name == "log"]
    assert logged == [{"step/loss": 2.0, "step/ok": 1.0, "step": step} for step in (1, 2)]
    assert [name for name, _, _ in calls].count("finish") == 2


def test_missing_wandb_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train.wandb_project is 'lm'.*\.\[wandb\]"):
        MetricsWriter(tmp_path, Config(train=TrainConfig(wandb_project="lm")), process_index=0)


def test_a_write_is_cheap(tmp_path):
    values = {"loss": 2.0, "grad_norm": 0.5, "lr": 1e-3, "tokens": 4096, "seconds": 0.1, "accepted": True}
    with writer(tmp_path) as out:
        begun = time.process_time()
        for step in range(1, 501):
            out.write("step", step, values)
        each = (time.process_time() - begun) / 500
    # 0.3 ms here; the bound leaves room for slow machines and still catches a sync or a reopened file on every write.
    assert each < 3e-3


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path):
    """A limit on the size of files stands for the full disk: no record is lost, and none is cut in two."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsWriter(tmp_path, Config(), process_index=0) as writer:
        writer.truncate(0)
        writer.write("step", 1, {"loss": 1.0})
        assert writer.flush() is None
        size = (tmp_path / FILE_NAME).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))  # the next line fits in part
        try:
            for step in range(2, 200):
                writer.write("step", step, {"loss": 1.0 / step})
            assert isinstance(writer.flush(), OSError)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [record["step"] for record in read_metrics(tmp_path, "step")] == [1]
    assert [record["step"] for record in read_metrics(tmp_path, "step")] == list(range(1, 200))


def test_on_a_full_disk_the_sentence_that_ends_the_run_is_the_one_to_tell(tmp_path):
    limits, said = resource.getrlimit(resource.RLIMIT_FSIZE), []

    def ended(error):
        with MetricsWriter(tmp_path, Config(), process_index=0, log=said.append) as writer:
            writer.truncate(0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
            writer.write("step", 1, {"loss": 1.0})
            if error:
                raise error

    try:
        with pytest.raises(UserError, match="the last 3 checkpoints could not be saved"):
            ended(UserError("the last 3 checkpoints could not be saved"))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.raises(OSError, match="too large"):
            ended(None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(said) == 1 and said[0].startswith("the last records of metrics.jsonl are lost: ")


@pytest.mark.parametrize("room", [20, 0])
def test_a_full_disk_has_room_for_going_back(tmp_path, room):
    """Also where records wait for room: those of the way that is given up go, the others come when there is some."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsWriter(tmp_path, Config(), process_index=0) as writer:
        writer.truncate(0)
        for step in range(1, 50):
            writer.write("step", step, {"loss": 1.0 / step})
        assert writer.flush() is None
        size = (tmp_path / FILE_NAME).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))
        try:
            for step in range(50, 60):
                writer.write("step", step, {"loss": 1.0 / step})
            assert isinstance(writer.flush(), OSError)
            writer.truncate(55)
            assert (tmp_path / FILE_NAME).stat().st_size == size  # no line in part
            writer.write("step", 56, {"loss": 2.0})
            writer.truncate(30)
            assert writer.flush() is None and (tmp_path / FILE_NAME).stat().st_size < size
            for step in range(31, 60):
                writer.write("step", step, {"loss": 3.0})
            assert isinstance(writer.flush(), OSError)
            writer.truncate(58)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        writer.write("step", 59, {"loss": 4.0})
    found = [(record["step"], record["loss"]) for record in read_metrics(tmp_path, "step")]
    kept = [(step, 1.0 / step) for step in range(1, 31)]
    assert found == [*kept, *((step, 3.0) for step in range(31, 59)), (59, 4.0)]


def test_a_ledger_outlives_a_full_disk(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ledger = Ledger(tmp_path, age=0.0, heartbeat_seconds=0)
    ledger.restored(0)
    size = (tmp_path / "goodput.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        ledger.completed(5)
        ledger.checkpoint(5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ledger.checkpoint(6)
    ledger.close()
    again = Ledger(tmp_path, age=0.0, heartbeat_seconds=0)
    assert [record["step"] for record in again._earlier][-1] == 6 and again._process == 2
    again.close()
