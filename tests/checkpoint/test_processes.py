"""Real processes: killed at any instant, and several that must agree. Slow."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SAVE_FOR_EVER = """
import sys, jax, jax.numpy as jnp
from maxlm.checkpoint.manager import Checkpointer
from maxlm.config import CheckpointConfig

abstract = {"x": jax.ShapeDtypeStruct((1 << 18,), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
with Checkpointer(sys.argv[1], CheckpointConfig(keep_latest=2), log=lambda line: print("LOG", line, flush=True)) as c:
    found = c.restore(abstract)
    step = int(found.state["step"]) if found else 0
    assert not found or (found.step == step and bool((found.state["x"] == step).all()))
    print("START", step, flush=True)
    while True:
        step += 1
        c.save(step, {"x": jnp.full(1 << 18, step, jnp.float32), "step": jnp.int32(step)}, metadata={"step": step})
        print("SAVED", step - 1, flush=True)  # the save before was waited for
"""

AGREE = """
import sys, jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from pathlib import Path
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from maxlm.checkpoint import reader
from maxlm.checkpoint.manager import Checkpointer
from maxlm.config import CheckpointConfig

folder, me = Path(sys.argv[1]), jax.process_index()
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
make = lambda step: {"x": jax.make_array_from_callback((4096,), sharding, lambda i: np.full(4096, step, np.float32)[i])}
abstract = {"x": jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=sharding)}
lines = []
with Checkpointer(folder, CheckpointConfig(keep_latest=9), log=lines.append) as c:
    assert c.restore(abstract) is None
    for step in (1, 2, 3):
        c.save(step, make(step), metadata={"step": step})
    assert c.restore(abstract).step == 3
    load = reader._load
    def fails_on_one(path, *rest):  # process 1 alone cannot read step 3
        if me == 1 and path.parent.name == "3":
            raise OSError("no such luck")
        return load(path, *rest)
    reader._load = fails_on_one
    found = c.restore(abstract)
    assert found.step == 2 and found.metadata == {"step": 2}, found
    assert all(bool((shard.data == 2).all()) for shard in found.state["x"].addressable_shards)
    assert ("no such luck" if me == 1 else "process 1 has trouble with it") in lines[0], lines
    c.save(3, make(4), metadata={})
    c.wait()
    assert c.pending_error() is None and c.steps() == [1, 2, 3]
    assert (folder / "3.damaged-1").is_dir()
print("AGREED", flush=True)
"""


PEERS = """
import shutil, sys, jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from maxlm.checkpoint.local import LocalCopies

me = jax.process_index()
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
values = lambda step: np.arange(64, dtype=np.float32) * step - 7
def make(step, spec):
    return jax.make_array_from_callback((64,), NamedSharding(mesh, PartitionSpec(spec)), lambda i: values(step)[i])
make_state = lambda step: {"x": make(step, "fsdp"), "y": make(step + 1, None)}
state = make_state(3)
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
lines = []
copies = LocalCopies(sys.argv[1] + f"/host-{me}", "run", log=lines.append)
ask = lambda: copies.restore(abstract, after=0, usable=lambda metadata: True)
assert ask() is None
for step in (2, 3):
    copies.save(step, make_state(step), metadata={"step": step})
copies.wait()
assert ask().step == 3 and "using the local copies of step 3" == lines[-1], lines
if me == 1:
    shutil.rmtree(copies.folder)  # the machine came back with an empty disk
found = ask()
assert found.step == 3 and found.metadata == {"step": 3}
for name, step in (("x", 3), ("y", 4)):
    for shard in found.state[name].addressable_shards:
        assert np.array_equal(shard.data, values(step)[shard.index]), name
assert lines[-1] == "using the local copies of step 3; process 1 got its part from the others", lines
if me == 0:
    (copies.folder / "3" / "data").write_bytes(b"")  # damaged on the one machine, lost on the other
assert ask().step == 2  # of which process 0 alone has a copy
print("AGREED", flush=True)
"""


BUCKET = """
import sys, jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from maxlm.checkpoint import bucket
from maxlm.config import CheckpointConfig
from maxlm.storage import StorageError

me, lines = jax.process_index(), []
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
make = lambda step: {"x": jax.make_array_from_callback((4096,), sharding, lambda i: np.full(4096, step, np.float32)[i])}
abstract = {"x": jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=sharding)}
real = bucket.write_blocks
def fails(*given, **more):
    if me == 1:
        raise StorageError("no such luck")
    return real(*given, **more)
with bucket.open_checkpointer(sys.argv[1], CheckpointConfig(keep_latest=9), log=lines.append) as c:
    assert c.restore(abstract) is None
    for step in (1, 2):
        assert c.save(step, make(step), metadata={"step": step}).started
    c.wait()
    assert c.failures == 0 and c.steps() == [1, 2], (lines, c.steps())
    bucket.write_blocks = fails
    c.save(3, make(3), metadata={})
    c.wait()
    assert c.failures == 1 and c.steps() == [1, 2], (lines, c.steps())
    assert ("no such luck" if me == 1 else "process 1 has trouble") in str(c.pending_error())
    bucket.write_blocks = real
    c.save(4, make(4), metadata={"step": 4})
    c.wait()
    assert c.failures == 0 and c.steps() == [1, 2, 4], (lines, c.steps())
    found = c.restore(abstract)
    assert found.step == 4 and found.metadata == {"step": 4}
    assert all(bool((shard.data == 4).all()) for shard in found.state["x"].addressable_shards)
print("AGREED", flush=True)
"""


ASIDE = """
import sys, time, jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from maxlm.checkpoint.bucket import open_checkpointer
from maxlm.config import CheckpointConfig
from maxlm.train.rollback import Rollback, set_others_aside

me, lines = jax.process_index(), []
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
make = lambda step: {"x": jax.make_array_from_callback((4096,), sharding, lambda i: np.full(4096, step, np.float32)[i])}
abstract = {"x": jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=sharding)}
with open_checkpointer(sys.argv[1], CheckpointConfig(keep_latest=9), log=lines.append) as c:
    for step in (1, 2, 3, 4):
        c.save(step, make(step), metadata={"data": {"skips": []}})
    c.wait()
    listed, read = c.steps, c.record
    def slowly(function, *arguments):
        if me == 1:
            time.sleep(3)  # process 0 has long renamed what it renames
        return function(*arguments)
    c.steps, c.record = lambda: slowly(listed), lambda step: slowly(read, step)
    set_others_aside(c, [Rollback(at=5, to=2)])
    assert listed() == [1, 2], listed()
    c.record = read
    assert len([line for line in lines if "set aside" in line]) == 2 * (me == 0), lines
    c.steps = lambda: [1, 2, 3] if me == 1 else listed()  # what a shared disk may show for a while after a rename
    assert c.save(3, make(3), metadata={}).started
    assert c.restore(abstract).step == 3 and c.failures == 0
print("AGREED", flush=True)
"""


ALONE = """
import os, resource, sys, time, jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from maxlm.checkpoint import manager
from maxlm.config import CheckpointConfig

manager.SAVE_SECONDS = 15
me, size = jax.process_index(), 1 << 20
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
make = lambda step: {"x": jax.make_array_from_callback((size,), sharding, lambda i: np.full(size, step, np.float32)[i])}
with manager.Checkpointer(sys.argv[1], CheckpointConfig(keep_latest=9), log=print) as c:
    c.save(1, make(1), metadata={})
    c.wait()
    for step, fails in ((2, 1), (4, 0)):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if me == fails:  # its disk takes no larger files
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
        began = time.monotonic()
        c.save(step, make(step), metadata={})
        c.wait()
        assert c.failures == 1 and c.pending_error() is not None and time.monotonic() - began < 60
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        c.save(step + 1, make(step + 1), metadata={})
        c.wait()
        assert c.failures == 0 and c.pending_error() is None
    assert c.steps() == [1, 3, 5], c.steps()
print("AGREED", flush=True)
"""


REOPEN = """
import sys, time, jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from maxlm.checkpoint import bucket, manager
from maxlm.config import CheckpointConfig
from maxlm.storage import StorageError

me, lines, on_disk = jax.process_index(), [], "://" not in sys.argv[1]
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
make = lambda step: {"x": jax.make_array_from_callback((4096,), sharding, lambda i: np.full(4096, step, np.float32)[i])}
def fails(*given, **more):
    raise StorageError("no such luck")
def expect(c, step, good):
    began = time.monotonic()
    c.save(step, make(step), metadata={})
    c.wait()
    assert (c.failures == 0) == good and time.monotonic() - began < 60, (step, lines)
    assert (c.pending_error() is None) == good
with bucket.open_checkpointer(sys.argv[1], CheckpointConfig(keep_latest=9), log=lines.append) as c:
    expect(c, 1, True)
    if on_disk:
        step = 1
        for who, where, what in ((1, manager.ocp, "CheckpointManager"), (0, c, "_sweep")):
            real = getattr(where, what)
            if me == who:  # it cannot open the folder, which it has to after a save that failed
                setattr(where, what, fails)
            c._writing = step + 1
            c._fail("as if")
            assert c._manager is None and "cannot be opened" in lines[-1], lines
            c.pending_error()
            step += 1
            c.save(step, make(step), metadata={})  # which tries to open it, in vain
            c.wait()
            assert c.failures and c.pending_error() is not None
            setattr(where, what, real)
            expect(c, step, True)
    else:
        real = c._rename
        if me == 0:
            c._rename = fails
        try:
            c.set_aside([1], "tried")
            raise SystemExit("nothing was raised")
        except StorageError as error:
            assert ("no such luck" if me == 0 else "process 0 has trouble") in str(error)
        c._rename = real
        expect(c, 2, True)
print("AGREED", flush=True)
"""


def start(program: str, *arguments: str, devices: int) -> subprocess.Popen[str]:
    environment = dict(os.environ, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_killed_at_any_instant_a_save_costs_at_most_itself(tmp_path):
    """What was known to be on disk is found again after SIGKILL, six times over, and nothing counts as damaged."""
    known, seed = 0, random.Random(0)
    for _ in range(6):
        process = start(SAVE_FOR_EVER, str(tmp_path), devices=1)
        lines, begun = [], None
        for line in process.stdout:
            lines.append(line.split())
            if lines[-1][0] == "START":
                begun = int(lines[-1][1])
            if lines[-1][0] == "SAVED" and int(lines[-1][1]) > begun:
                break
        assert begun is not None and begun >= known, lines
        time.sleep(seed.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        lines += [line.split() for line in process.stdout.read().splitlines()]
        process.wait()
        known = max([known] + [int(line[1]) for line in lines if line[0] == "SAVED"])
        assert not [line for line in lines if line[0] == "LOG" and "damaged" in line], lines
    assert known >= 6


def together(program: str, place: str) -> list[str]:
    """Runs a program in two processes, both of which have to reach its end; what each has printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [start(program, place, address, str(index), devices=2) for index in range(2)]
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("AGREED" in output for output in outputs), "\n".join(outputs)
    return outputs


def test_two_processes_agree_that_a_checkpoint_is_damaged(tmp_path):
    outputs = together(AGREE, str(tmp_path))
    said = f"maxlm: process 1 on {socket.gethostname()}: no such luck"  # its log goes nowhere
    assert [said in output for output in outputs] == [False, True]


def test_a_process_that_lost_its_disk_gets_its_part_from_the_other(tmp_path):
    outputs = together(PEERS, str(tmp_path))
    said = f"maxlm: process 1 on {socket.gethostname()}: the local copy of step 3 in "
    assert [said in output for output in outputs] == [False, True]


def test_two_processes_write_one_checkpoint_into_a_bucket_or_none(bucket):
    together(BUCKET, f"{bucket}/run/checkpoints")


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_process_that_looks_later_sets_the_same_checkpoints_aside(tmp_path, bucket, place):
    together(ASIDE, str(tmp_path) if place == "disk" else f"{bucket}/aside/checkpoints")


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_what_one_process_cannot_open_or_rename_keeps_none_waiting(tmp_path, bucket, place):
    together(REOPEN, str(tmp_path) if place == "disk" else f"{bucket}/reopen/checkpoints")


def test_a_save_that_fails_on_one_process_fails_for_all_and_the_next_one_works(tmp_path):
    together(ALONE, str(tmp_path))
