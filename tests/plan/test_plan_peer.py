"""The comparison with another stack: what it prints, and what it says where that stack cannot be had."""

import json
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest

from tools import plan_peer


def test_ratios_are_of_ours_to_theirs_and_only_of_what_both_have():
    mine = {
        "memory": 2**30,
        "wire": 3e9,
        "reduce-scatter": 2e9,
        "all-reduce": 0.0,
        "all-to-all": 0.0,
        "all-gather": 1e9,
    }
    theirs = {"memory": 2**31, "wire": 2e9, "reduce-scatter": 0.0, "all-reduce": 4e9, "all-to-all": 0.0, "flops": 1.0}
    lines = plan_peer.table(mine, theirs)
    assert [line.split()[0] for line in lines[1:]] == ["memory,", "wire,", "all-reduce,", "reduce-scatter,"]
    assert [line.split()[-1] for line in lines[1:]] == ["0.500", "1.500", "0.000", "-"]


PROGRAM = """HloModule step, num_partitions=2

ENTRY main {
  p = f32[1024]{0} parameter(0)
  ROOT sum = f32[1024]{0} all-reduce(p), replica_groups={{0,1}}, to_apply=add, channel_id=1
}
"""


def test_the_step_of_the_other_stack_is_caught_with_its_mesh(monkeypatch, tmp_path):
    """By the names of its arguments, in a stand-in with the signatures of MaxText 0.2.5."""
    step = SimpleNamespace(as_text=lambda: PROGRAM, memory_analysis=lambda: SimpleNamespace(peak_memory_in_bytes=77))
    seen = []

    def jit_and_compile(
        func,
        func_input_args,
        func_input_kwargs,
        mesh,
        in_shardings,
        out_shardings,
        static_argnums,
        donate,
        config,
        rules,
    ):
        return step

    def compiles(argv):
        seen.extend(argv)
        shardings = ("state", "data")
        mesh = SimpleNamespace(shape={"fsdp": 2})
        train_compile.jit_and_compile(None, (), {}, mesh, shardings, shardings, (), (), None, None)

    package, middle, train_compile = (types.ModuleType(name) for name in ("maxtext", "pre_train", "train_compile"))
    package.__path__ = [str(tmp_path)]
    train_compile.jit_and_compile, train_compile.main = jit_and_compile, compiles
    middle.train_compile = train_compile
    for name, module in {
        "maxtext": package,
        "maxtext.trainers": types.ModuleType("maxtext.trainers"),
        "maxtext.trainers.pre_train": middle,
        "maxtext.trainers.pre_train.train_compile": train_compile,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "1.2")  # libtpu need not be installed here
    found = plan_peer.peers(plan_peer.WORKS["llama3-8b-v5p"])
    assert (found["memory"], found["wire"], found["all-reduce"], found["exposed"]) == (77, 4096, 4096, 4096)
    assert "per_device_batch_size=2" in seen and "compile_topology=v5p-128" in seen


def test_a_side_that_fails_loses_nothing_of_the_others(monkeypatch, tmp_path, capsys):
    def sides(python, side, name, *, folder):
        if (side, name) in {("peer", "llama3-8b-v5p"), ("ours", "llama3-70b-v5p")}:
            raise subprocess.CalledProcessError(1, ["python"])
        return {"wire": 1e9, "by": side}

    monkeypatch.setattr(plan_peer, "run_side", sides)
    monkeypatch.setattr(plan_peer, "environment", lambda folder, python: "python")
    monkeypatch.setattr(plan_peer, "interpreter", lambda asked: "python3.12")
    assert plan_peer.main([f"--folder={tmp_path}", f"--json={tmp_path}/peer.json"]) == 1
    kept = json.loads((tmp_path / "peer.json").read_text())
    assert list(kept) == ["llama3-8b-v5p", "llama3-8b-v6e", "mixtral-8x7b-v5p"]
    given = plan_peer.WORKS["llama3-8b-v5p"].given
    assert kept["llama3-8b-v5p"]["peer"] == given | {"by": plan_peer.FOUND}
    said = capsys.readouterr().out
    assert "llama3-8b-v5p: ours / found by this tool before" in said and "llama3-70b-v5p of ours (" in said


def test_without_maxtext_ours_stand_beside_what_was_found_before(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(plan_peer, "run_side", lambda python, side, name, *, folder: {"memory": 2**30, "by": side})
    monkeypatch.setattr(plan_peer, "interpreter", lambda asked: "")
    assert plan_peer.main([f"--folder={tmp_path}"]) == 0
    said = capsys.readouterr().out
    for name, work in plan_peer.WORKS.items():
        assert f"{name}: ours / {plan_peer.FOUND}" in said
        assert f"{work.given['memory'] / 2**30:12.4g}" in said


def test_only_a_python_of_the_right_version_is_taken(tmp_path):
    wrong = tmp_path / "python3.12"
    wrong.write_text("#!/bin/sh\necho '(3, 11)'\n")
    wrong.chmod(0o755)
    assert plan_peer.interpreter(str(wrong)) != str(wrong)
    right = tmp_path / "right"
    right.write_text("#!/bin/sh\necho '(3, 12)'\n")
    right.chmod(0o755)
    assert plan_peer.interpreter(str(right)) == str(right)


def test_work_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        plan_peer.main(["llama9"])
    assert "llama9: no such work; there are llama3-8b-v5p" in capsys.readouterr().err
