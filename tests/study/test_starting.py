"""How runs are started: with the code that planned them, here and through launchers."""

import dataclasses
import shlex
import sys

import pytest

from launch import hosts, slurm
from launch.job import make_job
from maxlm.study import identity, runner, starting
from maxlm.study.plan import plan
from maxlm.study.results import read_plan, read_result
from maxlm.study.spec import StudyError
from maxlm.study.starting import start_process, through
from tests.study.fake import Fake, isoflop_study, verb


def test_runs_execute_the_code_that_planned_them_wherever_it_is_typed(tmp_path, monkeypatch):
    trap = tmp_path / "maxlm"
    trap.mkdir()
    (trap / "__init__.py").write_text("raise SystemExit('the code of the folder')")
    (trap / "cli.py").write_text("")
    study = isoflop_study(tmp_path, budgets=(1e13,))
    (planned, *_) = plan(study)
    model = dataclasses.replace(planned.config.model, vocab_size=1)
    bad = dataclasses.replace(planned, config=dataclasses.replace(planned.config, model=model))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    with open(tmp_path / "lock", "w") as lock:
        assert start_process(bad, tmp_path / "run", (), lock).wait() == 1
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "model.vocab_size is 1, but" in log and "the code of the folder" not in log


def test_a_launcher_is_given_each_run_and_its_exit_code_counts(tmp_path, monkeypatch):
    study, folder = isoflop_study(tmp_path, budgets=(1e13,)), tmp_path / "out"
    here = iter(["a" * 40])  # asked for once: HEAD may move while the study runs
    monkeypatch.setattr(identity, "commit", lambda: next(here))
    program = tmp_path / "launcher.py"
    program.write_text(
        "import sys, pathlib\n"
        f"with open({str(tmp_path / 'given')!r}, 'a') as file: print(*sys.argv[1:], file=file)\n"
        "print('no nodes are left')\n"
        "sys.exit(3)\n"
    )
    launcher = shlex.join([sys.executable, str(program), "--time=1:00:00"])
    said, code = verb("run", study, folder, monkeypatch, launcher=launcher, jobs=2)
    assert code == 1 and said.count("failed: exit code 3 (no nodes are left)") == 5
    lines = [line.split() for line in (tmp_path / "given").read_text().splitlines()]
    names = {r.name for r in read_plan(folder).runs}
    assert {line[1] for line in lines} == {f"--name=s-made-up-{name}" for name in names}
    for time, name, code, config, workdir in lines:
        place = folder / "runs" / name.rpartition("-")[2]
        assert (time, config, workdir) == ("--time=1:00:00", f"--config={place / 'given.py'}", f"--workdir={place}")
        assert code == f"--commit={'a' * 40}"
        # Is well formed.
        make_job(name=name.partition("=")[2], config=str(place / "given.py"), workdir=str(place), commit="a" * 40)


def test_what_a_launcher_has_started_is_stamped_with_the_commit_that_it_was_given(tmp_path, monkeypatch):
    study, folder, known = isoflop_study(tmp_path, budgets=(1e13,)), tmp_path / "out", ["a" * 40]
    monkeypatch.setattr(identity, "commit", lambda: known[0])
    monkeypatch.setattr(runner, "commit", lambda: known[0])
    given = []

    class Committing(Fake):
        def __call__(self, *words):
            known[0] = "b" * 40  # somebody commits to the tree while the study runs
            return super().__call__(*words)

    def made(launcher, name, *, commit):
        given.append(commit)
        known[0] = "c" * 40  # and before it has prepared its data
        return Committing()

    monkeypatch.setattr(starting, "through", made)
    _, code = verb("run", study, folder, monkeypatch, launcher="python -m launch.slurm --wait")
    results = [read_result(folder / "runs" / planned.name) for planned in read_plan(folder).runs]
    assert code == 0 and given == ["a" * 40] and {result.commit for result in results} == {"a" * 40}


@pytest.mark.parametrize(
    ("launcher", "commit", "words"),
    [
        ("launch.slurm --wait", "a" * 40 + "+", "changes that its commit aaaaaaaaaaaa lacks.* commit them, or run"),
        ("launch.slurm --wait", "version 1, code ab", r"is of none \(version 1, code ab\); run .* from a checkout"),
        ("launch.slurm --commit=v1", "a" * 40, "says --commit, but all runs .* check out the commit that is to run"),
        ("launch.slurm --commit v1", "a" * 40, "says --commit"),
    ],
)
def test_a_launcher_starts_the_commit_that_plans_and_nothing_else(tmp_path, monkeypatch, launcher, commit, words):
    study = isoflop_study(tmp_path, budgets=(1e13,))
    monkeypatch.setattr(identity, "commit", lambda: commit)
    with pytest.raises(StudyError, match=words):
        verb("run", study, tmp_path / "out", monkeypatch, launcher=launcher)
    assert not (tmp_path / "out").exists()  # at the start, before anything is prepared
    assert through(["launch.slurm"], "made up", commit="a" * 40)


def test_every_launcher_takes_the_commit_of_a_study():
    job = ["--name=s-made-up-0", f"--commit={'a' * 40}", "--config=/c.py", "--workdir=/w"]
    for module, own in ((slurm, ["--time=1:00:00", "--folder=/f"]), (hosts, ["run", "--hosts=a,b"])):
        assert module._parser().parse_args([*own, *job]).commit == "a" * 40
