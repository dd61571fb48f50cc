"""The compiling process and what is kept of it: its limits, its end, its request, and the key of its result."""

import ast
import contextlib
import dataclasses
import errno
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path, PurePath
from types import SimpleNamespace

import pytest
from jax.experimental import topologies

from maxlm.chips import CHIPS
from maxlm.plan import child
from maxlm.plan import compile as compiling
from maxlm.plan.compile import (
    CompileError,
    NotHere,
    OutOfTime,
    Request,
    check_installed,
    compile_step,
    content_key,
    is_kept,
    request_from_json,
)
from maxlm.plan.cuda import target_config
from maxlm.plan.topology import parse_topology
from maxlm.resolve import resolve
from tests.plan.test_plan import fake_step, tiny
from tests.runs import ROOT


def test_a_compiler_that_needs_too_much_memory_is_ended_with_one_sentence(tmp_path):
    with pytest.raises(CompileError, match="needs more than .* GiB of this machine's memory; plan a smaller slice"):
        compile_step(tiny(data=8), parse_topology("cpu-8"), cache=None, limit=2**20)
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    def missing(name):
        raise compiling.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compiling.importlib.metadata, "version", missing)
    with pytest.raises(CompileError, match=r"libtpu has to be installed; type: pip install '\.\[plan\]'"):
        compile_step(tiny(data=8), parse_topology("v5e-8"))


def test_a_compiler_that_takes_too_long_is_ended():
    with pytest.raises(OutOfTime, match="was ended after 0.0 min"):
        compile_step(tiny(data=8), parse_topology("cpu-8"), cache=None, seconds=0.0)


@pytest.mark.parametrize(
    ("name", "packages", "says"),
    [
        ("h100x8", (), "jax-cuda12-pjrt has to be installed; .*plan-cuda"),
        ("l4x8", (), "what the compiler has to know of l4 is not known"),
        ("h100x8", ("jax-cuda13-pjrt",), "is cuDNN's on h100x8.*pip install nvidia-cudnn-cu13"),
        ("minex8", ("jax-cuda12-pjrt", "nvidia-cudnn-cu12"), ""),  # what a file adds is compiled for as its model
    ],
)
def test_what_cannot_be_compiled_here_says_why(name, packages, says, monkeypatch):
    monkeypatch.setattr(compiling, "_installed", lambda package: package in packages)
    monkeypatch.setattr(compiling.ctypes.util, "find_library", lambda name: None)
    mine = dataclasses.replace(CHIPS["h100"], name="mine", like="h100")
    given, topology = tiny(data=8), parse_topology(name, {**CHIPS, "mine": mine})
    whole = dataclasses.replace(given.data, mask_documents=False)
    config = dataclasses.replace(given, data=whole, train=dataclasses.replace(given.train, precision="bfloat16"))
    if says:
        with pytest.raises(NotHere, match=says):
            check_installed(config, topology)
    else:
        check_installed(config, topology)
        assert "major: 9" in target_config(topology.chip)


def test_attention_in_blocks_over_several_devices_asks_for_no_cudnn(monkeypatch):
    monkeypatch.setattr(compiling, "_installed", lambda package: package == "jax-cuda12-pjrt")
    monkeypatch.setattr(compiling.ctypes.util, "find_library", lambda name: None)
    given, topology = tiny(data=4, context=2), parse_topology("h100x8")
    data = dataclasses.replace(given.data, mask_documents=False)
    config = dataclasses.replace(given, data=data, train=dataclasses.replace(given.train, precision="bfloat16"))
    check_installed(config, topology)
    with pytest.raises(NotHere, match="is cuDNN's"):
        check_installed(dataclasses.replace(config, parallel=tiny(data=8).parallel), topology)


def test_the_key_covers_every_source_that_the_step_is_made_of():
    """All that `train/setup.py` imports, and what that imports."""
    # What these do is done before a step is traced, or is in the key itself: the config, the chip, the options.
    besides = {"chips.py", "cluster.py", "errors.py", "heartbeat.py", "resolve.py", "rollcall.py", "checks"}
    root, todo, seen = ROOT / "maxlm", ["maxlm.train.setup"], set()
    while todo:
        place = todo.pop().replace(".", "/").removeprefix("maxlm/")
        found = [path for path in (root / f"{place}.py", root / place / "__init__.py") if path.exists()]
        for path in set(found) - seen:
            seen.add(path)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maxlm"):
                    todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                elif isinstance(node, ast.Import):
                    todo += [alias.name for alias in node.names if alias.name.startswith("maxlm.")]
    names = {str(path.relative_to(root)) for path in seen if path.parent != root or path.name != "__init__.py"}
    assert {"model/decoder.py", "jaxpr.py", "checkpoint/digest.py"} <= names
    rooms = {*compiling.ROOMS, *compiling.OWN, *besides}
    assert not {name for name in names if rooms.isdisjoint([name, *map(str, PurePath(name).parents)])}


def test_what_an_interrupted_write_left_is_swept(tmp_path):
    for name, age in ((".part-old", 2 * compiling.PART_SECONDS), (".part-now", 0.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "program.txt.gz").touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    compiling._write(fake_step(), tmp_path / "key")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".part-now", "key"]


def test_a_plan_that_cannot_be_kept_is_not_lost(tmp_path, monkeypatch):
    config, topology, said = tiny(data=8), parse_topology("cpu-8"), []
    monkeypatch.setattr(compiling, "_run_child", lambda *_, **__: 0)
    monkeypatch.setattr(compiling, "_collect", lambda *_, **__: fake_step())
    (tmp_path / "file").touch()
    assert not is_kept(config, topology, cache=str(tmp_path / "file"))
    assert compile_step(config, topology, cache=str(tmp_path / "file"), log=said.append) == fake_step()
    assert len(said) == 1 and f"is not kept in {tmp_path}/file (" in said[0] and "give --plan_cache a folder" in said[0]

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert compile_step(config, topology, cache=str(tmp_path / "plans"), log=said.append) == fake_step()
    assert "No space left on device" in said[1] and not list((tmp_path / "plans").iterdir())


def test_a_program_that_was_being_written_when_the_compiler_was_ended_is_not_taken_for_a_whole_one(
    tmp_path, monkeypatch
):
    """Of what is on the disk when it is ended, at whichever of its writes."""
    request = Request(tiny(data=8), parse_topology("cpu-8"), {}, False)
    compiled = SimpleNamespace(as_text=lambda: "HloModule m", memory_analysis=lambda: SimpleNamespace())
    lowered = SimpleNamespace(compile=lambda options: compiled)
    setup = SimpleNamespace(attention="xla", lower=lambda *shape: lowered)
    monkeypatch.setattr(child, "make_setup", lambda config, mesh: setup)
    monkeypatch.setattr(child, "settle_cpu_devices", lambda: None)
    sync, writes = os.fsync, []

    def ended(file):
        writes.append(file)
        if len(writes) == last:
            raise KeyboardInterrupt
        sync(file)

    monkeypatch.setattr(os, "fsync", ended)
    for last, whole in ((2, False), (3, False), (4, True)):
        work = tmp_path / str(last)
        work.mkdir()
        (work / "request.json").write_text(request.as_json())
        writes.clear()
        with contextlib.nullcontext() if whole else pytest.raises(KeyboardInterrupt):
            child.run(work)
        step = compiling._collect(work, 0, elapsed=1.0)
        assert step.whole == whole and step.mesh["data"] == 8
    assert step.program == "HloModule m" and step.seconds[0] < 1


@pytest.mark.skipif(sys.platform != "linux", reason="a child is ended with its parent on Linux alone")
def test_a_compiler_ends_with_the_process_that_asked_for_it(tmp_path):
    """However that ends: here by a signal that leaves it no time."""
    request = Request(tiny(data=8), parse_topology("cpu-8"), {}, True)
    (tmp_path / "request.json").write_text(request.as_json())
    parent = "import os, subprocess, sys\nchild = subprocess.Popen([*sys.argv[1:], str(os.getpid())], "
    parent += "start_new_session=True)\nprint(child.pid, flush=True)\nchild.wait()"
    command = [sys.executable, "-c", parent, sys.executable, "-m", "maxlm.plan.child", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as asking:
        pid = int(asking.stdout.readline())
        while asking.poll() is None and not (tmp_path / "facts.json").exists():  # then the step is lowered and compiled
            time.sleep(0.02)
        asking.kill()
    end = time.monotonic() + 60
    while time.monotonic() < end and _runs(pid):
        time.sleep(0.05)
    assert not _runs(pid) and not (tmp_path / "step.hlo").exists()


def _runs(pid):
    """Whether the process is there, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_what_was_compiled_is_read_again_and_found_by_content(tmp_path):
    config, topology = tiny(data=8), parse_topology("v5e:2x4")
    request = Request(config, topology, {}, True)
    key = content_key(request)
    for other in (
        dataclasses.replace(request, topology=parse_topology("v5e:4x4")),
        dataclasses.replace(request, options={"x": "1"}),
        dataclasses.replace(request, config=tiny(data=4, fsdp=2)),
    ):
        assert content_key(other) != key
    assert content_key(dataclasses.replace(request, config=dataclasses.replace(config, name="another"))) == key
    assert content_key(dataclasses.replace(request, topology=with_chip(topology, price=1.0))) == key
    compiling._write(fake_step(), tmp_path / key)
    assert compiling._read(tmp_path / key) == fake_step()
    assert is_kept(config, topology, cache=str(tmp_path), options={})
    assert not is_kept(config, topology, cache=str(tmp_path), options={"x": "1"})


@pytest.mark.parametrize("name", ["quickstart", "gemma3_27b", "deepseek_v3"])
def test_a_request_reaches_the_child_as_it_is(name):
    module = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))
    config = resolve(module["get_config"]())
    for topology in (parse_topology("2*v5p-256"), with_chip(parse_topology("h100x8x32"), kinds=(), price=1.5)):
        request = Request(config, topology, {"a": "1"}, False)
        assert request_from_json(request.as_json()) == request


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("4*v6e-1", {"num_slices": 4, "chips_per_host_bounds": (1, 1, 1)}),  # each of less than a host
        ("v6e-1", {"chips_per_host_bounds": (1, 1, 1)}),
        ("2*v5e-4", {"num_slices": 2}),
        ("2*v6e-8", {"num_slices": 2}),
    ],
)
def test_a_slice_of_less_than_a_host_is_asked_for_as_one_however_many_there_are(name, asked, monkeypatch):
    def described(**given):
        return SimpleNamespace(devices=[{key: given[key] for key in given if key not in ("topology_name", "platform")}])

    monkeypatch.setattr(topologies, "get_topology_desc", described)
    assert child.devices_of(parse_topology(name)) == [asked]


def with_chip(topology, **figures):
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, **figures))


def test_what_changes_the_program_from_outside_the_config_changes_the_key(monkeypatch):
    request = Request(tiny(data=8), parse_topology("h100x8"), {}, True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    key = content_key(request)
    for figures in ({"hbm_bytes": 1e9}, {"hbm_bandwidth": 1e12}, {"kinds": ("mine",)}):  # of cuda.target_config
        assert content_key(dataclasses.replace(request, topology=with_chip(request.topology, **figures))) != key
    for name, value in (
        ("XLA_FLAGS", "--xla_a=2"),
        ("LIBTPU_INIT_ARGS", "--xla_b=1"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "highest"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert content_key(request) != key, name
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3 --xla_a=1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu,tpu")
    assert content_key(request) == key
