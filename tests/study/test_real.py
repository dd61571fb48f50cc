"""A real study, tiny: killed and continued, and a branch that is the straight run to the bit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maxlm.configfile import source
from maxlm.study.plan import plan
from maxlm.study.results import read_plan, read_result
from maxlm.study.spec import load_study
from maxlm.train.metrics import read_metrics
from tests.conftest import FAST_COMPILE
from tests.tiny import write_corpus

ROOT = Path(__file__).parent.parent.parent
STUDY = """
import dataclasses
from pathlib import Path
from maxlm.study.spec import Machine, Study, Trunks
from tests.study.fake import RULES, base_config


def get_study():
    base = base_config(Path({corpus!r}))
    base = dataclasses.replace(base, optim=dataclasses.replace(base.optim, schedule="wsd"))
    train = dataclasses.replace(base.train, compilation_cache={cache!r})
    base = dataclasses.replace(base, train=train)
    return Study("tiny", base, RULES, Trunks(params=(2e4,), tokens=(60e3, 120e3)), Machine(jobs=1))
"""


def command(*words) -> list[str]:
    return [sys.executable, "-m", "maxlm.cli", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_COMPILE, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_killed_continued_and_branched(tmp_path):
    write_corpus(tmp_path / "corpus")
    file, out = tmp_path / "study.py", tmp_path / "out"
    file.write_text(STUDY.format(corpus=str(tmp_path / "corpus"), cache=str(tmp_path / "xla")))
    words = command("study", "run", str(file), f"--dir={out}")
    with open(tmp_path / "first.log", "w") as log:
        first = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    trunk, *branches = plan(load_study(file))
    deadline = time.monotonic() + 300
    while not list(out.glob("runs/*/checkpoints/[0-9]*/commit_success.txt")):
        assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "first.log").read_text()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()

    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{trunk.label} (" in done.stdout and "3 finished" in done.stdout
    again = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0 and "nothing to do" in again.stdout

    record = read_plan(out)
    names = {run.label: run.name for run in record.runs}
    branch = branches[-1]
    workdir = out / "runs" / names[branch.label]
    result = read_result(workdir)
    assert result is not None and result.status == "finished"
    assert result.steps == branch.config.train.steps

    # One uninterrupted run with the same schedule. The numbers of a schedule are operands of the program, so that
    # trunk, branch and straight run share one: all comes out the same to the bit, the trunk's own steps included.
    config = dataclasses.replace(
        branch.config, data=dataclasses.replace(branch.config.data, cache_dir=str(out / "data"))
    )
    straight = tmp_path / "straight.py"
    straight.write_text(source(config))
    words = command("train", f"--config={straight}", f"--workdir={tmp_path / 'straight'}")
    subprocess.run(words, cwd=ROOT, env=environment(), check=True, capture_output=True)
    steps, wanted = (list(read_metrics(folder, "step")) for folder in (workdir, tmp_path / "straight"))
    exact = ("step", "batch", "tokens", "lr", "loss", "grad_norm")
    assert [[r[k] for k in exact] for r in steps] == [[r[k] for k in exact] for r in wanted]
    assert json.loads((workdir / "report.json").read_text())["steps"] == len(steps)
