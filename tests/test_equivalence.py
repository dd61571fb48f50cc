"""A slice of the equivalence program, and that its cases are what it says they are."""

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from maxlm.config import MESH_AXES
from maxlm.resolve import resolve
from tools import equivalence, equivalence_cases

ROOT, KEPT = Path(__file__).parent.parent, equivalence_cases.KEPT
SLICE = (
    "data 2 x pipeline 2 x context 2, dense, packed, remat none, accumulation 4, zero_bubble",
    "fsdp 2 x pipeline 2 x expert 2, moe, packed, remat none, accumulation 2, gpipe",
    f"fsdp 2 x pipeline 2 x tensor 2, learned positions, packed, remat {KEPT}, accumulation 4, zero_bubble",
    "context 2 x expert 2 x tensor 2, moe, packed, remat full, accumulation 1",
)


def test_every_mesh_of_eight_devices_is_there():
    found = list(equivalence_cases.meshes(8))
    assert len(found) == math.comb(3 + len(MESH_AXES) - 1, 3)  # three twos over six axes
    assert all(math.prod(mesh.values()) == 8 for mesh in found)
    assert len({tuple(mesh.items()) for mesh in found}) == len(found)


def test_every_pair_of_features_occurs_on_every_mesh():
    arrays = [case for case in equivalence_cases.cases(8) if not case.model]
    for mesh, group in itertools.groupby(arrays, key=lambda case: case.mesh):
        rows = list(group)
        names = ("moe", "packed", "remat", "accumulation", "schedule", "method")
        values = {name: {getattr(row, name) for row in rows} for name in names}
        assert len(values["packed"]) == len(values["remat"]) == len(values["accumulation"]) == 2
        assert len(values["schedule"]) == (4 if "pipeline" in dict(mesh) else 1)
        context = dict(mesh).get("context", 1) if "pipeline" not in dict(mesh) else 1
        ways = {equivalence_cases.method_of("", method, context=context, staged=False) for method in values["method"]}
        assert ways == ({"ring", "gather"} if context > 1 else {""})
        for a, b in itertools.combinations(names, 2):
            pairs = {(getattr(row, a), getattr(row, b)) for row in rows}
            assert pairs == set(itertools.product(values[a], values[b])), (mesh, a, b)


def test_every_case_is_a_config_that_resolves():
    for devices in (8, *equivalence_cases.LARGE):
        for case in equivalence_cases.cases(devices):
            config = equivalence_cases.config_of(case, kind=case.kind, packed=case.packed, layers=case.layers)
            assert bool(resolve(config, devices=devices).model.moe.experts) == case.moe


def test_keys_go_round_on_the_larger_meshes_too():
    for devices in (16, 32):
        ring = [case for case in equivalence_cases.cases(devices) if case.method == "ring"]
        assert {case.moe for case in ring} == ({False, True} if devices == 16 else {True})
        for case in ring:
            config = equivalence_cases.config_of(case, kind=case.kind, packed=case.packed, layers=case.layers)
            assert config.parallel.context_method == "ring"


def test_all_six_axes_are_run_together():
    assert all(dict(case.mesh) == dict.fromkeys(MESH_AXES, 2) for case in equivalence_cases.cases(64))


@pytest.mark.parametrize("name", [*SLICE[:-1], pytest.param(SLICE[-1], marks=pytest.mark.slow)])
def test_a_case_agrees_with_one_device(name):
    (case,) = [case for case in equivalence_cases.cases(8) if case.name == name]
    worst = equivalence.run(case)[0]
    assert worst.share <= 1, worst


def test_a_case_that_is_not_there_is_not_a_success():
    command = [sys.executable, "tools/equivalence.py", "--devices=8", "--case=no such case"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1


def results_of_all() -> list[dict]:
    found = [case for devices in (8, *equivalence_cases.LARGE) for case in equivalence_cases.cases(devices)]
    assert len({case.name for case in found}) == len(found)
    kept = {"share": 0.1, "what": "loss"}
    return [{**dataclasses.asdict(case), "mesh": dict(case.mesh), "case": case.name, **kept} for case in found]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page with the table, in a folder of its own."""
    page = tmp_path / "docs" / "parallelism.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- equivalence -->\nold\n<!-- /equivalence -->\nafter\n")
    monkeypatch.setattr(equivalence, "ROOT", tmp_path)
    return page


def join(monkeypatch, *parts):
    monkeypatch.setattr(sys, "argv", ["equivalence.py", "--docs", "--join", *map(str, parts)])
    return equivalence.main()


def test_parts_are_joined_into_one_table(tmp_path, monkeypatch, capsys, page):
    results, kept = results_of_all(), [tmp_path / "0.json", tmp_path / "1.json"]
    for result in results[100:]:
        if not result["model"]:
            del result["model"]  # as the program wrote them before it had models
    kept[0].write_text(json.dumps(results[:100]))
    kept[1].write_text(json.dumps(results[100:]))
    assert join(monkeypatch, *kept) == 0
    text = page.read_text()
    assert f"{len(results)} cases agree with one device" in text and "2 on 64 devices" in text and "old" not in text
    assert re.search(r"^\| alibi \| 1 \| 3 \| 2 \| 2 \|  \| 4 \|$", text, re.MULTILINE)
    first, further = text.split("Further models")
    assert "refused" in first and re.search(r"^\| ring \| \d+ \| \d+ \|  \| \d+ \| \d+ \| \d+ \|$", first, re.MULTILINE)
    assert "not refused" in further.split("\n")[0]  # where nothing was run, nothing is said
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    kept[0].write_text(kept[0].read_text().replace("0.1", "1.5"))
    before = page.read_text()
    assert join(monkeypatch, *kept) == 1 and page.read_text() == before  # no table of what does not hold
    assert "100 too far" in capsys.readouterr().out


def test_no_table_is_made_of_a_part(tmp_path, monkeypatch, capsys, page):
    results, before, part = results_of_all(), page.read_text(), tmp_path / "part.json"
    smaller = [result for result in results if math.prod(result["mesh"].values()) not in (16, 32)]
    for given, message in (
        (smaller, rf"{len(results) - len(smaller)} of {len(results)} cases are missing \(\d+ on 16 devices, \d+ on 32"),
        ([*results, results[5]], "1 cases are there more than once"),
        ([*results, {**results[5], "case": "a mesh of cheese"}], "1 results are of cases that there are none of"),
    ):
        part.write_text(json.dumps(given))
        assert join(monkeypatch, part) == 1
        assert re.search(message, capsys.readouterr().err)
        assert page.read_text() == before


@pytest.mark.parametrize("arguments", [["--part=0/2"], ["--devices=8", "--part=2/2"], ["--devices=8", "--part=half"]])
def test_a_part_of_nothing_is_refused(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["equivalence.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        equivalence.main()


def test_a_program_that_dies_is_not_a_success(tmp_path, monkeypatch):
    """Not even where a file of an earlier run, or only some of the cases, could be taken for its results."""
    program = tmp_path / "program.py"
    monkeypatch.setattr(equivalence, "__file__", str(program))
    (tmp_path / "8-0-1.json").write_text("[]")
    program.write_text("import os; os.abort()")
    with pytest.raises(SystemExit, match=r"8 devices, part 0-1 ended with -6"):
        equivalence.run_together([(8, "0/1")], tmp_path, case="all")
    (tmp_path / "8-0-1.json").unlink()
    program.write_text("raise SystemExit(1)")
    with pytest.raises(SystemExit, match="ended with 1, unfinished"):
        equivalence.run_together([(8, "0/1")], tmp_path, case="all")
