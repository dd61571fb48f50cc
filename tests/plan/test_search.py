"""Which ways to run a training the search looks at, and what it refuses. Nothing here is traced or compiled."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from maxlm import cli
from maxlm.config import MESH_AXES, ParallelConfig
from maxlm.configfile import source
from maxlm.parallel.mesh import MeshError, arrange
from maxlm.plan import child, searching
from maxlm.plan.analytic.timing import axis_spans
from maxlm.plan.candidates import candidates
from maxlm.plan.compile import CompileError
from maxlm.plan.search import SearchError, search
from maxlm.plan.topology import parse_topology
from tests.parallel.test_mesh import nodes
from tests.plan.test_plan import tiny


def laid_out(parallel, count):
    """The mesh over eight GPUs in so many nodes, in the order of their numbers."""
    return arrange(parallel, sorted(nodes(count, 8 // count), key=lambda device: device.id))


def spread(mesh):
    """Over how many nodes the groups along each axis are, at most."""
    slices = np.vectorize(lambda device: device.slice_index)(mesh)
    return {
        axis: max(len(set(group)) for group in np.moveaxis(slices, at, -1).reshape(-1, slices.shape[at]).tolist())
        for at, axis in enumerate(MESH_AXES)
    }


@pytest.mark.parametrize("across", ["data", "fsdp", "any"])
@pytest.mark.parametrize("count", [2, 4])
def test_every_candidate_can_be_laid_over_the_nodes_and_is_priced_as_it_lies(across, count):
    config, topology = tiny(data=8), parse_topology(f"h100x{8 // count}x{count}")
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, across_slices=across))
    found = {tuple(one.parallel.sizes.items()): one.parallel for one in candidates(config, topology)}
    assert len(found) > 3
    for sizes, parallel in found.items():
        spans = axis_spans(sizes, across, slices=count, sides=())
        assert {axis: span.slices for axis, span in spans.items()} == spread(
            arrange(parallel, nodes(count, 8 // count))
        )


def test_a_mesh_that_the_nodes_cannot_share_out_is_no_candidate():
    config = tiny(data=8)
    meshes = [
        {tuple(one.parallel.sizes.values()) for one in candidates(config, parse_topology(name))}
        for name in ("h100x8", "h100x4x2")
    ]
    refused = meshes[0] - meshes[1]
    assert meshes[1] < meshes[0] and refused
    for sizes in refused:
        with pytest.raises(MeshError, match="use a multiple of 2"):
            arrange(ParallelConfig(**dict(zip(MESH_AXES, sizes, strict=True))), nodes(2, 4))


def test_a_chip_without_figures_is_refused_in_a_sentence():
    with pytest.raises(SearchError, match=r"no peak in .*\(flops\), .*memory \(usable_bytes\) of cpu; plan without"):
        search(tiny(data=8), parse_topology("cpu-8"), None, budget_seconds=0.0)


@pytest.mark.parametrize("given", ["--html=x.html", "--price=2", "--memory_only", "--mtbf=1000"])
def test_a_flag_of_one_plan_is_refused_with_a_search(given, tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text(source(tiny(data=8)))
    args = ["plan", f"--config={file}", "--topology=v5e-8", "--search", "--budget_minutes=0", given]
    assert cli.main(args) == 1
    said = capsys.readouterr().err
    assert "--search" in said and given.split("=")[0] in said and "Traceback" not in said


def test_the_compilers_options_reach_every_compilation_of_a_search(monkeypatch):
    asked = []

    def compiled(config, topology, **settings):
        asked.append((settings["options"], settings["seconds"]))
        raise CompileError("enough")

    monkeypatch.setattr(searching, "compile_step", compiled)
    values = SimpleNamespace(plan_cache="", limit_gib=1.0)
    judge = searching.compiling(values, {"xla_a": "1"}, log=print)
    with pytest.raises(CompileError, match="enough"):
        judge(tiny(data=8), parse_topology("v5e-8"), 60.0)
    assert asked == [({"xla_a": "1"}, 60.0)]


def told(args, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(source(tiny(data=8)))
    return cli.main(["plan", f"--config={file}", *args])


@pytest.mark.parametrize("given", ["--winner=x.flags", "--budget_minutes=3"])
def test_a_flag_of_a_search_is_refused_without_one(given, tmp_path, capsys):
    assert told(["--topology=v5e-8", given], tmp_path) == 1
    said = capsys.readouterr().err
    assert given.split("=")[0] in said and "type --search besides" in said and "Traceback" not in said


def test_a_plan_of_nodes_is_refused_where_the_run_would_be(tmp_path, capsys):
    """Eight GPUs in two nodes, along `fsdp` alone: no axis that may cross them divides into them."""
    args = ["--config.parallel.data=1", "--config.parallel.fsdp=8", "--topology=h100x4x2"]
    assert told(args, tmp_path) == 1
    said = capsys.readouterr().err
    assert "the 8 devices are in 2 slices or nodes" in said and "use a multiple of 2" in said


def test_the_planners_mesh_over_nodes_is_the_runs():
    """A description of GPUs does not say which node they are in; the devices of a run do."""
    topology = parse_topology("h100x4x2")
    parallel = dataclasses.replace(tiny(data=8).parallel, data=2, fsdp=2, tensor=2)
    described = [SimpleNamespace(id=i, platform="gpu", device_kind="gpu") for i in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "Mesh", lambda placed, *_, **__: placed)
        placed = child.mesh_of(parallel, topology, described)
    real = arrange(parallel, nodes(2, 4))
    assert [device.id for device in placed.flat] == [device.id for device in real.flat]
    other = dataclasses.replace(parallel, data=1, fsdp=4)
    with pytest.raises(MeshError, match="use a multiple of 2"):
        child.mesh_of(other, topology, described)
