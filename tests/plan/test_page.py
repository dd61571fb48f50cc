"""Pages that plans are printed as."""

import dataclasses
import json

import pytest

from maxlm import cli
from maxlm.configfile import source
from maxlm.plan import commands
from maxlm.plan import compile as compiling
from tests.plan.test_plan import fake_step, tiny

NAME = "8b[/v2] x[v2] :fire:"  # what rich takes for markup and an emoji


def planned(tmp_path, *args):
    """The exit code of a plan of a config with that name, which is asked for figures besides."""
    file = tmp_path / "config.py"
    file.write_text(source(dataclasses.replace(tiny(data=4, fsdp=2), name=NAME)))
    return cli.main(["plan", f"--config={file}", f"--json={tmp_path / 'plan.json'}", *args])


@pytest.mark.parametrize("topology", ["v5p:2x4x1", "l4x8"])  # compiled, and by the model alone
def test_a_name_is_printed_as_it_is(topology, tmp_path, monkeypatch, capsys):
    if topology != "l4x8":
        monkeypatch.setattr(compiling, "check_installed", lambda *_: None)
        monkeypatch.setattr(compiling, "compile_step", lambda *_, **__: fake_step())
    assert planned(tmp_path, f"--topology={topology}") == 0
    assert f"{NAME} on 8 " in capsys.readouterr().out


def test_what_was_asked_for_is_written_before_the_page_is_printed(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("no terminal")

    monkeypatch.setattr(commands, "plain_console", fails)
    with pytest.raises(RuntimeError):
        planned(tmp_path, "--topology=l4x8")
    assert json.loads((tmp_path / "plan.json").read_text())["name"] == NAME
    monkeypatch.setattr(compiling, "check_installed", lambda *_: None)
    monkeypatch.setattr(compiling, "compile_step", lambda *_, **__: fake_step())
    with pytest.raises(RuntimeError):
        planned(tmp_path, "--topology=v5p:2x4x1", f"--html={tmp_path / 'plan.html'}")
    assert json.loads((tmp_path / "plan.json").read_text())["topology"] == "v5p:2x4x1"
    assert (tmp_path / "plan.html").exists()
