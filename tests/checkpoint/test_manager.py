"""Saving and coming back: other meshes, damage of every kind, donation, interrupted and failed saves."""

import dataclasses
import errno
import json
import os
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxlm.checkpoint import reader
from maxlm.checkpoint.digest import array_paths
from maxlm.checkpoint.manager import Checkpointer
from maxlm.checkpoint.reader import CheckpointError, CheckpointReader
from maxlm.config import CheckpointConfig

# Orbax abandons its other reads when one fails, and Python remarks on that when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

KEEP_ALL = CheckpointConfig(keep_latest=100)
SPECS = {"params/wide": ("fsdp", "tensor"), "params/narrow": ("tensor",), "opt/0/mu": (None, "fsdp"), "step": ()}


def mesh(fsdp: int, tensor: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: fsdp * tensor]
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_state(step: int, on: jax.sharding.Mesh) -> dict:
    """A state with arrays over 1 KiB a shard, which Orbax keeps in data files, where nothing guards them."""
    rng = np.random.default_rng(step)
    values = {
        "params": {
            "wide": rng.standard_normal((64, 128), np.float32),
            "narrow": rng.standard_normal((4096,), np.float32).astype(jnp.bfloat16),
        },
        "opt": ({"mu": rng.standard_normal((32, 128), np.float32)},),
        "step": np.int32(step),
    }
    leaves = array_paths(values)
    placed = [jax.device_put(x, NamedSharding(on, PartitionSpec(*SPECS[path]))) for path, x in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(values), placed)


def abstract(state: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, leaf in array_paths(found).items():
        wanted = array_paths(expected)[path]
        assert leaf.dtype == wanted.dtype and np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes(), path


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A folder with whole checkpoints of steps 1 and 2, saved on eight devices; tests copy it."""
    folder = tmp_path_factory.mktemp("two_steps")
    with Checkpointer(folder, KEEP_ALL) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step, mesh(4, 2)), metadata={"config": {"seed": step}, "pairs": (1, 2)})
    return folder


@pytest.fixture
def copy(two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def restore(folder: Path, log: list[str] | None = None):
    """What a training run started again gets, and whether it can go on to save step 2 or 3."""
    lines = [] if log is None else log
    with Checkpointer(folder, KEEP_ALL, log=lines.append) as checkpointer:
        restored = checkpointer.restore(abstract(make_state(0, mesh(4, 2))))
        assert checkpointer.save(restored.step + 1, restored.state, metadata={}).started
        checkpointer.wait()
        assert checkpointer.pending_error() is None
        assert checkpointer.steps()[-1] == restored.step + 1
    return restored


def data_files(folder: Path) -> list[Path]:
    """All files of a checkpoint, the one with the arrays first."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (8, 1), (1, 2), (1, 1)])
def test_restores_onto_any_mesh(two_steps, shape):
    wanted = abstract(make_state(0, mesh(*shape)))
    restored = CheckpointReader(two_steps)._search(wanted, step=None, prefix="").restored
    assert restored.step == 2
    assert restored.metadata == {"config": {"seed": 2}, "pairs": [1, 2]}
    assert_same(restored.state, make_state(2, mesh(1, 1)))
    for path, leaf in array_paths(restored.state).items():
        assert leaf.sharding == array_paths(wanted)[path].sharding


def test_an_older_step_and_one_that_is_not_there(two_steps):
    with Checkpointer(two_steps, KEEP_ALL) as checkpointer:
        wanted = abstract(make_state(0, mesh(4, 2)))
        assert_same(checkpointer.restore(wanted, step=1).state, make_state(1, mesh(1, 1)))
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .*; there are \[1, 2\]"):
            checkpointer.restore(wanted, step=7)


def test_nothing_saved_is_none_and_creates_nothing(tmp_path):
    wanted = abstract(make_state(0, mesh(1, 1)))
    fresh = CheckpointReader(tmp_path / "none")
    assert fresh.steps() == [] and fresh.restore_params(wanted["params"]) is None
    assert not (tmp_path / "none").exists()
    with Checkpointer(tmp_path / "empty", KEEP_ALL) as checkpointer:
        assert checkpointer.restore(wanted) is None


def test_parts_are_read_alone(two_steps, monkeypatch):
    checkpoints = CheckpointReader(two_steps)
    state = make_state(2, mesh(1, 1))
    params = checkpoints.restore_params(abstract(state)["params"])
    assert_same(params.state, state["params"])
    assert_same(checkpoints.restore_params(abstract(state)["opt"], part="opt").state, state["opt"])
    with pytest.raises(CheckpointError, match="params/other: asked for, but not saved"):
        checkpoints.restore_params({**abstract(state)["params"], "other": jax.ShapeDtypeStruct((2,), jnp.float32)})
    with pytest.raises(CheckpointError, match="params/narrow: saved, but not asked for"):
        checkpoints.restore_params({"wide": abstract(state)["params"]["wide"]})
    monkeypatch.setattr(reader, "_load", None)  # metadata must come without arrays
    assert checkpoints.record(2).metadata == {"config": {"seed": 2}, "pairs": [1, 2]}


def test_another_model_is_refused_and_is_no_damage(copy):
    before = sorted(path.name for path in copy.iterdir())
    wanted = abstract(make_state(0, mesh(1, 1)))
    wanted["params"]["wide"] = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    wanted["opt"][0]["mu"] = jax.ShapeDtypeStruct((32, 128), jnp.bfloat16)
    with Checkpointer(copy, KEEP_ALL) as checkpointer:
        with pytest.raises(CheckpointError) as refusal:
            checkpointer.restore(wanted)
        assert "params/wide: saved as float32[64, 128], asked for as float32[64, 64]" in str(refusal.value)
        assert "opt/0/mu: saved as float32[32, 128], asked for as bfloat16[32, 128]" in str(refusal.value)
        assert "params/narrow" not in str(refusal.value) and "another workdir" in str(refusal.value)
    assert sorted(path.name for path in copy.iterdir()) == before


def test_a_flipped_byte_in_the_arrays_is_found_by_the_digests(copy):
    file = data_files(copy / "2")[0]
    for position in range(100, file.stat().st_size - 2000, 9973):
        flip(file, position)
    log: list[str] = []
    restored = restore(copy, log)
    assert restored.step == 1
    assert_same(restored.state, make_state(1, mesh(1, 1)))
    assert "checkpoint 2 is damaged" in log[0] and "arrays differ from their digests" in log[0] and "params/" in log[0]
    assert "2.damaged-1" in log[1] and "using checkpoint 1 instead" in log[2]
    assert (copy / "2.damaged-1").is_dir() and (copy / "2" / "record").is_dir()  # kept, and saved again


def test_one_flipped_byte_in_any_file_never_restores_wrongly(copy):
    """Every file in turn, at its start, middle and end: the state is that of step 2, or of step 1 and says so."""
    wanted = abstract(make_state(0, mesh(2, 1)))
    expected = {step: make_state(step, mesh(1, 1)) for step in (1, 2)}
    log: list[str] = []
    checkpoints = CheckpointReader(copy, log=log.append)
    fallen_back = 0
    for file in data_files(copy / "2"):
        size = file.stat().st_size
        for position in {0, size // 2, size - 1}:
            log.clear()
            flip(file, position)
            restored = checkpoints._search(wanted, step=None, prefix="").restored
            flip(file, position)
            assert_same(restored.state, expected[restored.step])
            assert restored.metadata["config"] == {"seed": restored.step}
            assert [line.startswith("checkpoint 2 is damaged: ") for line in log] == [True] * (2 - restored.step)
            fallen_back += restored.step == 1
    assert fallen_back >= 10  # the arrays, the record, and what leads to them


def remove_half(folder: Path) -> None:
    for file in data_files(folder)[::2]:
        file.unlink()


DAMAGE = {
    "arrays cut short": lambda folder: os.truncate(data_files(folder)[0], data_files(folder)[0].stat().st_size // 2),
    "arrays emptied": lambda folder: os.truncate(data_files(folder)[0], 0),
    "arrays gone": lambda folder: data_files(folder)[0].unlink(),
    "state gone": lambda folder: shutil.rmtree(folder / "state"),
    "tree metadata gone": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "record gone": lambda folder: shutil.rmtree(folder / "record"),
    "record cut short": lambda folder: os.truncate(folder / "record" / "metadata", 50),
    "commit marker gone": lambda folder: (folder / reader.COMMIT_MARKER).unlink(),
    "half of the files gone": remove_half,
    "all gone but the folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_survived(copy, kind):
    DAMAGE[kind](copy / "2")
    log: list[str] = []
    restored = restore(copy, log)
    assert restored.step == 1
    assert_same(restored.state, make_state(1, mesh(1, 1)))
    assert log[0].startswith("checkpoint 2 is damaged: ") and str(copy / "2") in log[0]
    assert (copy / "2.damaged-1").is_dir()
    again: list[str] = []
    assert restore(copy, again).step == 2 and again == []


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", None])
def test_orbax_notes_do_not_keep_a_run_from_starting(copy, content):
    file = copy / "2" / "_CHECKPOINT_METADATA"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert restore(copy).step == 2


def test_all_damaged_is_an_error_now_and_later_and_changes_nothing(copy):
    (copy / "1" / reader.COMMIT_MARKER).unlink()
    shutil.rmtree(copy / "2" / "state")
    before = sorted(path.name for path in copy.iterdir())
    for _ in range(2):
        with pytest.raises(CheckpointError) as error, Checkpointer(copy, KEEP_ALL, log=lambda line: None) as found:
            found.restore(abstract(make_state(0, mesh(1, 1))))
        assert "\n  2: " in str(error.value) and "\n  1: its commit marker" in str(error.value)
        assert "another workdir" in str(error.value)
        assert sorted(path.name for path in copy.iterdir()) == before
    for step in (1, 2):  # set aside by hand: still no start from scratch
        (copy / str(step)).rename(copy / f"{step}.damaged-1")
    with pytest.raises(CheckpointError, match="nothing but damaged checkpoints"):
        restore(copy)


def test_a_reader_beside_a_run_changes_nothing(copy):
    DAMAGE["arrays cut short"](copy / "2")
    (copy / "3.orbax-checkpoint-tmp").mkdir()
    before = sorted(str(path) for path in copy.rglob("*"))
    log: list[str] = []
    checkpoints = CheckpointReader(copy, log=log.append)
    restored = checkpoints.restore_params(abstract(make_state(0, mesh(1, 1)))["params"])
    assert restored.step == 1 and "checkpoint 2 is damaged" in log[0]
    assert checkpoints.steps() == [1, 2]
    assert sorted(str(path) for path in copy.rglob("*")) == before


def test_what_a_run_retires_while_it_is_read_is_no_damage(copy, monkeypatch):
    newer, really, log = copy.parent / "newer", CheckpointReader.record, []
    (copy / "2").rename(newer)

    def record(reader, step):
        if step == 1:
            newer.rename(copy / "2")
            (copy / "1").rename(copy.parent / "retired")
        return really(reader, step)

    monkeypatch.setattr(CheckpointReader, "record", record)
    state = make_state(2, mesh(4, 2))
    reader = CheckpointReader(copy, log=log.append)
    assert reader.restore_params(abstract(state["params"])).step == 2 and not log
    (copy / "2").rename(newer)
    (copy.parent / "retired").rename(copy / "1")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint of step 1 in .*; there are \[2\]"):
        reader.restore_state(abstract(state), step=1)
    assert not log


def test_an_altered_record_is_never_believed(copy):
    file = copy / "2" / "record" / "metadata"
    sealed = json.loads(file.read_text())
    sealed["content"]["metadata"]["config"]["seed"] = 9
    file.write_text(json.dumps(sealed))
    with pytest.raises(ValueError, match="SHA-256"):
        CheckpointReader(copy).record(2)
    log: list[str] = []
    found = restore(copy, log)
    assert found.step == 1 and found.metadata == {"config": {"seed": 1}, "pairs": [1, 2]}
    assert "SHA-256" in log[0]


def test_an_interrupted_save_is_named_and_removed(copy):
    leftover = copy / "3.orbax-checkpoint-tmp"
    shutil.copytree(copy / "2", leftover)
    log: list[str] = []
    assert restore(copy, log).step == 2
    assert log == ["removed 3.orbax-checkpoint-tmp: the save of this checkpoint was interrupted"]
    assert not leftover.exists()


def test_the_state_may_be_donated_at_once(tmp_path):
    @jax.jit
    def value(step):
        return jnp.sin(jnp.arange(1 << 20) * step)

    train = jax.jit(lambda state: {"params": state["params"] * 1.5 + 1, "step": state["step"] + 1}, donate_argnums=0)
    state = {"params": value(1.0), "step": jnp.int32(0)}
    expected = {}
    with Checkpointer(tmp_path, KEEP_ALL) as checkpointer:
        for step in range(1, 6):
            state = train(state)
            expected[step] = np.array(state["params"], copy=True)
            with jax.transfer_guard("disallow"):  # as the training loop runs
                checkpointer.save(step, state, metadata={})
            for _ in range(3):  # train on over the same memory while the files are being written
                state = train(state)
        checkpointer.wait()
        wanted = abstract(jax.tree.map(jnp.copy, state))
        for step, params in expected.items():
            np.testing.assert_array_equal(checkpointer.restore(wanted, step=step).state["params"], params)


def test_a_step_that_exists_stays(copy):
    log: list[str] = []
    with Checkpointer(copy, KEEP_ALL, log=log.append) as checkpointer:
        assert not checkpointer.save(2, make_state(5, mesh(4, 2)), metadata={}).started
        assert_same(checkpointer.restore(abstract(make_state(0, mesh(4, 2)))).state, make_state(2, mesh(4, 2)))
    assert log == ["checkpoint 2 is there already and stays: nothing was saved"]


def test_several_are_set_aside_at_one_meeting_of_the_processes(copy, monkeypatch):
    log: list[str] = []
    with Checkpointer(copy, KEEP_ALL, log=log.append) as checkpointer:
        opened, really = [], checkpointer._open
        monkeypatch.setattr(checkpointer, "_open", lambda: opened.append(1) or really())
        checkpointer.set_aside([1, 2], "tried")
        assert checkpointer.steps() == [] and len(opened) == 1
    assert {path.name for path in copy.iterdir()} == {"1.tried-1", "2.tried-1"} and len(log) == 2


def test_a_folder_that_another_process_cannot_open_is_open_to_none(copy, monkeypatch):
    """Else one of them would enter the collectives of opening it alone, at the next save."""
    log: list[str] = []
    with Checkpointer(copy, KEEP_ALL, log=log.append) as checkpointer:
        with monkeypatch.context() as planted:
            planted.setattr(reader, "agree", lambda mine: mine or "process 1 has trouble with it")
            checkpointer._reopen()
        assert checkpointer._manager is None and "cannot be opened: process 1 has trouble with it" in log[-1]
        assert checkpointer.save(3, make_state(3, mesh(1, 1)), metadata={}).started
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2, 3] and checkpointer.pending_error() is None


def test_a_failed_save_is_told_and_the_next_one_works(tmp_path):
    log: list[str] = []
    state = {"x": jnp.ones((1024, 1024))}
    with Checkpointer(tmp_path, KEEP_ALL, log=log.append) as checkpointer:
        checkpointer.save(1, state, metadata={})
        checkpointer.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # the disk takes no file over 1 MiB
        try:
            checkpointer.save(2, state, metadata={})
            checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        error = checkpointer.pending_error()
        assert isinstance(error, CheckpointError) and "checkpoint 2 was not saved: " in str(error)
        assert checkpointer.pending_error() is None
        assert str(error) in log
        assert checkpointer.steps() == [1]
        for step in (2, 3):
            assert checkpointer.save(step, state, metadata={}).started
        checkpointer.wait()
        assert checkpointer.pending_error() is None and checkpointer.steps() == [1, 2, 3]


def test_a_folder_that_cannot_be_listed_for_a_moment_costs_one_save_and_not_the_run(copy, monkeypatch):
    log: list[str] = []
    with Checkpointer(copy, KEEP_ALL, log=log.append) as checkpointer:
        with monkeypatch.context() as broken:
            broken.setattr(Checkpointer, "steps", lambda _: (_ for _ in ()).throw(OSError(errno.ESTALE, "Stale")))
            assert not checkpointer.save(3, make_state(3, mesh(4, 2)), metadata={}).started
            checkpointer.score(2, 1.0)
        error = checkpointer.pending_error()
        assert "checkpoint 3 was not saved: [Errno 116] Stale" in str(error) and checkpointer.failures == 1
        assert "how good checkpoint 2 is was not noted: [Errno 116] Stale" in log
        assert checkpointer.save(3, make_state(3, mesh(4, 2)), metadata={}).started
        checkpointer.wait()
        assert checkpointer.pending_error() is None and checkpointer.failures == 0 and checkpointer.steps() == [1, 2, 3]


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    with Checkpointer(tmp_path, KEEP_ALL) as checkpointer:
        with pytest.raises(TypeError, match="found something else at rest/0"):
            checkpointer.save(1, {"x": jnp.ones(2), "rest": (3,)}, metadata={})
        with pytest.raises(TypeError, match="JSON"):
            checkpointer.save(1, {"x": jnp.ones(2)}, metadata={"x": object()})
        assert checkpointer.steps() == []


def test_due_by_steps_and_by_seconds(tmp_path, monkeypatch):
    config = CheckpointConfig(every_steps=10, every_seconds=60.0)
    with Checkpointer(tmp_path, config) as checkpointer:
        asked = [(0, 0.0), (1, 30.0), (2, 60.0), (3, 110.0), (10, 115.0), (11, 170.0), (12, 175.0), (20, 176.0)]
        assert [step for step, now in asked if checkpointer.due(step, now)] == [2, 10, 12, 20]
    with Checkpointer(tmp_path, dataclasses.replace(config, every_seconds=0.0)) as checkpointer:
        assert [step for step in range(31) if checkpointer.due(step, step * 1e6)] == [10, 20, 30]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match="every_seconds=60 needs one process, and there are 2"):
        Checkpointer(tmp_path, config)


def test_preparing_leaves_nothing_to_compile(tmp_path, caplog):
    def compiled(shape: tuple[int, ...]) -> bool:
        x = jax.device_put(np.ones(shape, np.float32), NamedSharding(mesh(1, 2), PartitionSpec()))
        caplog.clear()
        with jax.log_compiles():
            reader.digest(x)
        return "digest_array" in caplog.text

    prepared = jax.ShapeDtypeStruct((17, 19), jnp.float32, sharding=NamedSharding(mesh(1, 2), PartitionSpec()))
    with Checkpointer(tmp_path, KEEP_ALL) as checkpointer:
        checkpointer.prepare({"x": prepared})
    assert compiled((19, 17)) and not compiled((17, 19))
