"""Which ways to run a training the search looks at, and what it refuses. Nothing here is traced or compiled."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from maxlm import cli
from maxlm.chips import CHIPS
from maxlm.config import MESH_AXES, ParallelConfig
from maxlm.configfile import source
from maxlm.errors import UserError
from maxlm.parallel.mesh import MeshError, arrange
from maxlm.plan import child, searching
from maxlm.plan import compile as compiling
from maxlm.plan import search as search_module
from maxlm.plan.analytic import Estimate, estimate
from maxlm.plan.analytic.memory import Memory
from maxlm.plan.analytic.timing import Time, axis_spans
from maxlm.plan.candidates import REMATS, candidates, microbatches, policies
from maxlm.plan.compile import CompileError
from maxlm.plan.search import (
    Found,
    Ranked,
    SearchError,
    Verdict,
    search,
    slices_of,
    smallest_slice,
    why,
)
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


def test_the_config_itself_is_a_candidate_once():
    topology, config = parse_topology("v5e-8"), tiny(data=4, tensor=2)
    train = dataclasses.replace(config.train, remat="mlp_gate")  # no other candidate's
    for own in (config, dataclasses.replace(config, train=train)):
        found = list(candidates(own, topology))
        assert found[0] == own and found.count(own) == 1 and len(found) > 50
    assert config not in candidates(config, parse_topology("v5e-16"))  # it is for eight devices


def test_a_model_without_a_gate_is_searched_with_no_policy_twice():
    model = tiny().model
    assert policies(model) == REMATS
    ungated = policies(dataclasses.replace(model, mlp=dataclasses.replace(model.mlp, kind="relu2")))
    assert "mlp_gate" not in "+".join(ungated) and len(set(ungated)) == len(ungated) == len(REMATS) - 1
    assert ungated[0] == "none" and ungated[-1] == "full"


def test_microbatches_are_what_the_rows_divide_into():
    assert microbatches(12, 1) == [1, 2, 3, 4, 6, 12]
    assert microbatches(12, 3) == [3, 4, 6, 12]
    assert max(microbatches(512, 1)) == 64 and max(microbatches(512, 32)) == 128
    config = tiny(data=3, devices=3, batch=24)
    model = dataclasses.replace(config.model, num_layers=6)
    found = list(candidates(dataclasses.replace(config, model=model), parse_topology("h100x3")))
    interleaved = {
        (one.parallel.pipeline, one.train.accumulation)
        for one in found
        if one.parallel.pipeline_schedule == "interleaved"
    }
    assert interleaved == {(3, 3), (3, 6), (3, 12), (3, 24)}


def guessed(monkeypatch, topology, *sizes):
    """A config in so many microbatches a candidate, the fastest first, each of a size in parts of what is usable."""
    usable, config = topology.chip.usable_bytes, tiny(data=1, tensor=2, fsdp=4, batch=64)
    pairs = []
    for place, size in enumerate(sizes):
        one = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=2**place))
        held = Memory({"state": size * usable}, "")
        pairs.append((one, Estimate(held, Time({"products": 1.0 + place}), usable * (1 - size), 1.0)))
    monkeypatch.setattr(search_module, "judged_candidates", lambda config, there, ways=None: iter(pairs))
    return config, [one for one, _ in pairs]


def unlike(config):
    """One that is none of the candidates."""
    return dataclasses.replace(config, name="another")


def test_a_twin_of_what_turns_out_too_large_is_compiled_if_it_takes_less(monkeypatch):
    topology, asked = parse_topology("v5e-8"), []
    config, ways = guessed(monkeypatch, topology, 1.02, 1.03, 0.9, 0.8)

    def judge(candidate, there, *, seconds, whole):
        asked.append(candidate)
        return Verdict((1.1 if candidate == ways[2] else 0.9) * there.chip.usable_bytes, 2.0, {}, True)

    found = search(unlike(config), topology, judge, budget_seconds=60.0)
    # Not those that take more; what fits by the model comes before what is faster and nearly fits.
    assert asked == [ways[2], ways[3]]
    assert found.winner.config == ways[3] and found.winner.verdict is not None
    asked.clear()
    config, ways = guessed(monkeypatch, topology, 1.02, 1.03, 1.1)
    assert search(unlike(config), topology, judge, budget_seconds=60.0).winner.config == ways[0]
    assert asked == ways[:1]  # and where nothing fits by the model, what nearly does


def test_without_a_compiler_nothing_wins_that_does_not_fit(monkeypatch):
    topology = parse_topology("v5e-8")
    config, _ = guessed(monkeypatch, topology, 1.02, 1.01)
    with pytest.raises(SearchError, match="does not fit v5e-8: the least that any way of running it takes is"):
        search(config, topology, None, budget_seconds=0.0)


def test_a_candidate_that_resolve_refuses_does_not_end_the_search(monkeypatch):
    topology, real = parse_topology("v5e-8"), search_module.resolve
    config, ways = guessed(monkeypatch, topology, 0.9, 0.8)
    other = dataclasses.replace(ways[1], train=dataclasses.replace(ways[1].train, remat="full"))
    monkeypatch.setattr(
        search_module,
        "judged_candidates",
        lambda config, there: iter([(ways[0], estimate(0.9)), (other, estimate(0.8))]),
    )

    def estimate(seconds):
        return Estimate(Memory({"state": 1.0}, ""), Time({"products": seconds}), 1.0, 1.0)

    def resolve(given, *, devices):
        if given == other:
            raise UserError("not this one")
        return real(given, devices=devices)

    monkeypatch.setattr(search_module, "resolve", resolve)
    found = search(config, topology, lambda *_, **__: Verdict(1.0, 2.0, {}), budget_seconds=60.0)
    assert found.winner.config == ways[0] and found.winner.verdict is not None


def test_where_several_slices_cannot_one_of_as_many_devices_may(monkeypatch):
    def judged(config, there, ways=None):
        yield config, Estimate(Memory({"state": 1.0}, ""), Time({}), 1.0 if there.slices == 1 else -1.0, 1.0)

    monkeypatch.setattr(search_module, "judged_candidates", judged)
    monkeypatch.setattr(search_module, "relations", lambda config, devices: [])
    config = tiny(data=8)
    assert smallest_slice(config, parse_topology("2*v5e-4")).topology.name == "v5e-8"
    assert smallest_slice(config, parse_topology("v5e-8")).topology.name == "v5e-16"


def of_size(monkeypatch, gib):
    """The model judges a state of so many GiB, which every axis but `data` and `context` cuts, and nothing else."""
    judged = []

    class Judged:
        def __init__(self, config, topology):
            self.usable = topology.chip.usable_bytes

        def __call__(self, one):
            judged.append(one)
            sizes = one.parallel.sizes
            held = gib * 2**30 / (sizes["fsdp"] * sizes["tensor"] * sizes["pipeline"] * sizes["expert"])
            return Estimate(Memory({"state": held}, ""), Time({"products": 1.0}), self.usable - held, 1.0)

    monkeypatch.setattr(search_module, "Estimator", Judged)
    return judged


@pytest.mark.parametrize(
    ("gib", "layers", "asked", "expected", "across"),
    [
        (140, 2, "h100x1", "h100x2", "data"),  # of 75.7 GiB
        (590, 2, "h100x1", "h100x8", "data"),
        (590, 2, "h100x4x2", "h100x4x2", "pipeline"),  # as many devices as of one node
        (900, 2, "h100x1", "h100x8x2", "pipeline"),  # replicas make the state of none smaller
        (900, 2, "h100x8x2", "h100x8x2", "pipeline"),
        (900, 3, "h100x8", "h100x8x2", "any"),  # three layers are no stages for two nodes
    ],
)
def test_nodes_are_filled_before_there_are_more_and_other_axes_may_cross_them(
    gib, layers, asked, expected, across, monkeypatch
):
    of_size(monkeypatch, gib)
    config, topology = tiny(data=8, batch=64), parse_topology(asked)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=layers))
    asked_of = []
    found = smallest_slice(config, topology, log=asked_of.append)
    assert (found.topology.name, found.across) == (expected, across)
    assert asked_of[-1] == f"does it fit {expected} ({found.topology.devices} devices)?"
    with pytest.raises(SearchError, match=f"parallel.across_slices={across}" if across != "data" else expected) as said:
        search(config, topology, None, budget_seconds=0.0)
    assert (f"the smallest slice that can hold it is {expected} (" in str(said.value)) == (asked != expected)


def test_nodes_that_turned_out_too_small_are_named_again_with_another_axis_alone(monkeypatch):
    of_size(monkeypatch, 500)  # by the model it fits along `data`, too
    found = smallest_slice(tiny(data=8, batch=64), parse_topology("h100x8x2"))
    assert (found.topology.name, found.across) == ("h100x8x2", "pipeline")


def test_what_no_hardware_holds_is_judged_by_the_leanest_of_each_mesh(monkeypatch):
    judged, config = of_size(monkeypatch, 1e9), tiny(data=8, batch=64)
    assert smallest_slice(config, parse_topology("h100x4")) is None
    assert {one.train.remat for one in judged} == {"full"}
    per_mesh = {
        (tuple(one.parallel.sizes.values()), one.parallel.pipeline_schedule, one.parallel.context_method): 0
        for one in judged
    }
    assert len(judged) <= 2 * len(per_mesh)
    names = [topology.name for topology in slices_of(parse_topology("h100x4"))]
    assert names[:6] == ["h100x1", "h100x2", "h100x4", "h100x8", "h100x8x2", "h100x8x4"]
    assert names[-1] == "h100x8x8192"
    several = [topology.name for topology in slices_of(parse_topology("v6e-8"))][-4:]
    assert several == ["v6e-256", "2*v6e-256", "4*v6e-256", "8*v6e-256"]
    for name, largest in (("v4-8", "8*v4-8192"), ("v5p-8", "8*v5p-12288"), ("tpu7x-8", "8*tpu7x-18432")):
        assert [topology.name for topology in slices_of(parse_topology(name))][-1] == largest
    said = search_module.nothing_fits(config, parse_topology("v6e-8"), least=1.0, log=lambda line: None)
    assert "no slice that is known can, nor can 8 of the largest together; lower data.sequence_length, keep" in said


def test_several_slices_of_the_largest_may_hold_what_one_cannot(monkeypatch):
    def judged(config, there, ways=None):
        room = 1.0 if there.slices >= 4 else -1.0
        yield config, Estimate(Memory({"state": 1.0}, ""), Time({}), room, 1.0)

    monkeypatch.setattr(search_module, "judged_candidates", judged)
    monkeypatch.setattr(search_module, "relations", lambda config, devices: [])
    said = search_module.nothing_fits(tiny(data=8), parse_topology("v6e-8"), least=1.0, log=lambda line: None)
    assert said.endswith("the smallest slice that can hold it is 4*v6e-256 (4 slices, 1024 devices)")


def test_what_is_known_to_be_too_large_does_not_win(monkeypatch):
    """It was not compiled, since a twin that takes less by the model was too large."""
    topology = parse_topology("v5e-8")
    config, _ = guessed(monkeypatch, topology, 0.95, 0.97)
    usable = topology.chip.usable_bytes
    with pytest.raises(SearchError, match=f"any way of running it takes is {1.1 * usable / 2**30:.1f} GiB"):
        search(config, topology, lambda *_, **__: Verdict(1.1 * usable, 2.0, {}), budget_seconds=60.0)


def test_what_could_not_be_compiled_is_not_said_to_be_too_large(monkeypatch):
    topology = parse_topology("v5e-8")
    config, _ = guessed(monkeypatch, topology, 0.9)

    def judge(*_, **__):
        raise CompileError("the compiler needs more than 24 GiB")

    with pytest.raises(SearchError, match=r"none of .* could be compiled \(the compiler needs more .*\)") as said:
        search(config, topology, judge, budget_seconds=60.0)
    assert "does not fit" not in str(said.value)


def ranked(seconds, compiled):
    """By the model, and by the compiler; None: not compiled."""
    verdict = Verdict(1.0, sum(compiled.values()), compiled) if compiled else None
    return Ranked(tiny(data=8), Estimate(Memory({"state": 1.0}, ""), Time(seconds), 1.0, 1.0), verdict=verdict)


def test_the_winner_is_compared_by_figures_of_one_kind():
    topology = parse_topology("v5e-8")

    def said(*best):
        return why(Found(best, 2, 2, 0.0), topology)

    first = ranked({"products": 3.0, "memory": 1.0}, {"kernels": 1.0, "waiting for data": 1.0})
    second = ranked({"products": 1.0, "memory": 1.0}, {"kernels": 1.0, "waiting for fsdp": 1.5})
    assert said(first, second).startswith("it is 25.0% faster than the next (")
    assert said(first, second).endswith("which loses 1.500 s on waiting for fsdp")
    guess = ranked({"products": 2.0, "memory": 3.0}, None)
    assert said(first, guess) == "it is the only one that was compiled and fits"
    other = ranked({"products": 4.0, "memory": 2.0}, None)
    assert said(guess, other).startswith("by the model it is 20.0% faster than the next (")
    assert said(guess, other).endswith("which loses 2.000 s on products")
    assert said(first) == "it is the only one that fits"


@pytest.mark.parametrize("given", ["--json", "--html"])
def test_a_file_that_cannot_be_written_is_told_before_the_work(given, tmp_path, capsys, monkeypatch):
    def compiled(*_, **__):
        raise AssertionError("it compiled")

    monkeypatch.setattr(compiling, "compile_step", compiled)
    assert told(["--topology=cpu-8", f"{given}={tmp_path}/nowhere/x"], tmp_path) == 1
    assert "give a file in a folder that exists" in capsys.readouterr().err


def test_a_chip_without_figures_is_refused_in_a_sentence():
    with pytest.raises(
        SearchError, match=r"no peak in .*\(flops\), .*\(usable_bytes\), .*\(link_bandwidth\) of cpu; plan"
    ):
        search(tiny(data=8), parse_topology("cpu-8"), None, budget_seconds=0.0)


@pytest.mark.parametrize(
    ("name", "given", "missing"),
    [
        ("x-8", {}, r"no bandwidth of links \(link_bandwidth\) of x;"),
        ("2*x-4", {"link_bandwidth": 1e9}, r"no bandwidth of the network \(network_bandwidth\) of x;"),
        ("8*x-1", {"link_bandwidth": 1e9}, r"no bandwidth of the network \(network_bandwidth\) of x;"),
        ("2*x-4", {"network_bandwidth": 1e9}, r"no bandwidth of links \(link_bandwidth\) of x;"),
    ],
)
def test_a_chip_whose_links_are_not_known_is_refused_where_they_carry_something(name, given, missing):
    known = {"flops": dict.fromkeys(CHIPS["cpu"].flops, 1e12), "hbm_bandwidth": 1e11, "usable_bytes": 1e10}
    table = {"x": dataclasses.replace(CHIPS["cpu"], name="x", **known, **given)}
    with pytest.raises(SearchError, match=missing):
        search(tiny(data=8), parse_topology(name, table), None, budget_seconds=0.0)
    alone = parse_topology("x-1", table)
    assert search(tiny(devices=1), alone, None, budget_seconds=0.0).winner.seconds > 0
    assert estimate(tiny(data=8), parse_topology(name, table)).time.total > 0  # a plan does without


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
        asked.append((settings["options"], settings["seconds"], settings["whole"]))
        raise CompileError("enough")

    monkeypatch.setattr(searching, "compile_step", compiled)
    values = SimpleNamespace(plan_cache="", limit_gib=1.0)
    judge = searching.compiling(values, {"xla_a": "1"}, log=print)
    with pytest.raises(CompileError, match="enough"):
        judge(tiny(data=8), parse_topology("v5e-8"), seconds=60.0, whole=False)
    assert asked == [({"xla_a": "1"}, 60.0, False)]


def told(args, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(source(tiny(data=8)))
    return cli.main(["plan", f"--config={file}", *args])


def test_a_mesh_for_other_hardware_is_no_candidate_and_refuses_no_search(tmp_path, monkeypatch, capsys):
    of_size(monkeypatch, 1)
    file, winner = tmp_path / "config.py", tmp_path / "winner.flags"
    file.write_text(source(tiny(devices=256, batch=256, data=4, fsdp=32, tensor=2)))
    args = [f"--config={file}", "--config.data.batch_size=64"]  # which the mesh of 256 could not share out, either
    asked = ["--topology=v5e-16", "--search", "--budget_minutes=0", f"--winner={winner}"]
    assert cli.main(["plan", *args, *asked]) == 0
    out = capsys.readouterr().out
    assert "own mesh is no candidate: " in out and "has 256 devices, but there are 16" in out
    assert cli.main(["check", *args, "--devices=16"]) == 1
    assert cli.main(["check", *args, "--devices=16", *winner.read_text().split()]) == 0
    capsys.readouterr()
    assert cli.main(["plan", *args, *asked, "--config.model.moe.dense_layers=1"]) == 1
    said = capsys.readouterr().err
    assert "model.moe.dense_layers is 1" in said and "devices" not in said


@pytest.mark.parametrize(
    "own",
    [
        {"data": 1, "tensor": 8},  # of two kv heads
        {"data": 4, "pipeline": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2},  # in one microbatch
        {"data": 0},
    ],
)
def test_a_config_that_cannot_run_is_neither_judged_nor_compared_with(own, tmp_path, monkeypatch, capsys):
    """Though its mesh has as many devices. Of such a pipeline the model has no table, and raised."""
    judged, page = of_size(monkeypatch, 1), tmp_path / "search.json"
    asked = [f"--config.parallel.{name}={value}" for name, value in own.items()]
    asked += ["--config.data.batch_size=64", "--topology=v5e-8", "--search", "--budget_minutes=0", f"--json={page}"]
    assert told([*asked, f"--winner={tmp_path}/winner.flags"], tmp_path) == 0
    assert not any(own.items() <= vars(one.parallel).items() for one in judged)
    out = capsys.readouterr().out
    assert "own mesh is no candidate: " in out and "the config itself" not in out
    said = json.loads(page.read_text())
    assert said["own"] is None and said["over_own"] is None


@pytest.mark.parametrize("given", ["--winner=x.flags", "--budget_minutes=3"])
def test_a_flag_of_a_search_is_refused_without_one(given, tmp_path, capsys):
    assert told(["--topology=v5e-8", given], tmp_path) == 1
    said = capsys.readouterr().err
    assert given.split("=")[0] in said and "type --search besides" in said and "Traceback" not in said


@pytest.mark.parametrize("given", ["--stall_seconds=3", "--write_seconds=60"])
def test_what_a_save_costs_is_refused_where_no_failure_is_simulated(given, tmp_path, capsys):
    assert told(["--topology=v5e-8", given], tmp_path) == 1
    said = capsys.readouterr().err
    assert given.split("=")[0] in said and "type --mtbf=HOURS besides" in said and "Traceback" not in said


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
