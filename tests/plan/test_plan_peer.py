"""The comparison with another stack: what it prints, and what it says where that stack cannot be had."""

import pytest

from tools import plan_peer


def test_ratios_are_of_ours_to_theirs_and_only_of_what_both_have():
    mine = {"memory": 2**30, "wire": 3e9, "cycles": 0.0, "all-gather": 1e9}
    lines = plan_peer.table(mine, {"memory": 2**31, "wire": 2e9, "cycles": 5.0, "flops": 1.0})
    assert [line.split()[-1] for line in lines[1:]] == ["0.500", "1.500"]


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
