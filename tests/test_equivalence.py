"""A slice of the equivalence program, and that its cases are what it says they are."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from maxlm.config import MESH_AXES, ParallelConfig
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from tools import equivalence

ROOT = Path(__file__).parent.parent
SLICE = (
    "data 2 x pipeline 2 x context 2, dense, packed, remat none, accumulation 4, zero_bubble",
    "fsdp 2 x pipeline 2 x expert 2, moe, packed, remat none, accumulation 2, gpipe",
    "context 2 x expert 2 x tensor 2, moe, packed, remat full, accumulation 1",
)


def test_every_mesh_of_eight_devices_is_there():
    found = list(equivalence.meshes(8))
    assert len(found) == math.comb(3 + len(MESH_AXES) - 1, 3)  # three twos over six axes
    assert all(math.prod(mesh.values()) == 8 for mesh in found)
    assert len({tuple(mesh.items()) for mesh in found}) == len(found)


def test_every_pair_of_features_occurs_on_every_mesh():
    for mesh, group in itertools.groupby(equivalence.cases(8), key=lambda case: case.mesh):
        rows = list(group)
        names = ("moe", "packed", "remat", "accumulation", "schedule")
        values = {name: {getattr(row, name) for row in rows} for name in names}
        assert len(values["packed"]) == len(values["remat"]) == len(values["accumulation"]) == 2
        assert len(values["schedule"]) == (4 if "pipeline" in dict(mesh) else 1)
        for a, b in itertools.combinations(names, 2):
            pairs = {(getattr(row, a), getattr(row, b)) for row in rows}
            assert pairs == set(itertools.product(values[a], values[b])), (mesh, a, b)


def test_every_case_is_a_config_that_resolves():
    for devices in (8, *equivalence.LARGE):
        for case in equivalence.cases(devices):
            config = equivalence.config_of(case, moe=case.moe, packed=case.packed, layers=equivalence.layers(case))
            resolve(config, devices=devices)


def test_all_six_axes_are_run_together():
    assert all(dict(case.mesh) == dict.fromkeys(MESH_AXES, 2) for case in equivalence.cases(64))


@pytest.mark.parametrize("name", SLICE)
def test_a_case_agrees_with_one_device(name):
    (case,) = [case for case in equivalence.cases(8) if case.name == name]
    worst = equivalence.run(case)[0]
    assert worst.share <= 1, worst


def test_a_case_that_is_not_there_is_not_a_success():
    command = [sys.executable, "tools/equivalence.py", "--devices=8", "--case=no such case"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1


def test_parts_are_joined_into_one_table(tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "parallelism.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- equivalence -->\nold\n<!-- /equivalence -->\nafter\n")
    monkeypatch.setattr(equivalence, "ROOT", tmp_path)
    kept = []
    for number, case in enumerate([next(equivalence.cases(8)), next(equivalence.cases(64))]):
        result = {**dataclasses.asdict(case), "mesh": dict(case.mesh), "case": case.name, "share": 0.1, "what": "loss"}
        kept.append(tmp_path / f"{number}.json")
        kept[-1].write_text(json.dumps([result]))
    monkeypatch.setattr(sys, "argv", ["equivalence.py", "--docs", "--join", *map(str, kept)])
    assert equivalence.main() == 0
    text = page.read_text()
    assert "2 cases agree with one device (1 on 8 devices, 1 on 64 devices)" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    kept[0].write_text(kept[0].read_text().replace("0.1", "1.5"))
    before = page.read_text()
    assert equivalence.main() == 1 and page.read_text() == before  # no table of what does not hold
    assert "1 too far" in capsys.readouterr().out


def test_a_permute_in_a_branch_is_seen_before_it_hangs():
    def program(x):
        def permuted(x):
            return jax.lax.ppermute(x, "pipeline", [(0, 1), (1, 0)])

        first = jax.lax.axis_index("pipeline") == 0
        return jax.lax.cond(first, permuted, lambda x: x + 1, x)

    mesh = make_mesh(ParallelConfig(data=1, pipeline=2), jax.devices()[:2])
    spec = jax.sharding.PartitionSpec("pipeline")
    mapped = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    text = mapped.lower(jax.ShapeDtypeStruct((2, 4), "float32")).compile().as_text()
    with pytest.raises(RuntimeError, match="a branch of the program permutes"):
        equivalence.refuse_permutes_in_branches(text)
