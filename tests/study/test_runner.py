"""A study's runs: run once, continued, reported; and what the fits make of those that are missing or bad."""

import dataclasses
import errno
import fcntl
import json
import os
import subprocess

import pytest

import maxlm
from maxlm.checkpoint.reader import COMMIT_MARKER, RECORD_FILE, RECORD_ITEM, Record, record_to_json
from maxlm.chips import CHIPS
from maxlm.errors import UserError
from maxlm.study import runner
from maxlm.study.fitting import describe, fit_study
from maxlm.study.identity import commit
from maxlm.study.ladder import Shape
from maxlm.study.plan import plan
from maxlm.study.results import read_plan, read_result, write_result
from maxlm.study.runner import devices_here, run_study
from maxlm.study.spec import Isoflops, Rungs, StudyError, Sweep, Trunks
from maxlm.train.home import run_id, weights_given
from maxlm.train.metrics import read_metrics
from maxlm.train.rollback import Rollback, recorded, skips
from tests.study.fake import LAW, Fake, isoflop_study, run, verb, workdir_of


def test_a_second_time_does_nothing_but_say_so(done):
    study, folder = done
    fake = Fake()
    outcome, said = run(study, folder, fake)
    assert fake.started == [] and outcome.code == 0
    assert "nothing to do" in said and str(len(plan(study))) in said


def test_failures_are_reported_passed_over_and_tried_again(tmp_path):
    study = isoflop_study(tmp_path)
    labels = [planned.label for planned in plan(study)]
    outcome, said = run(study, tmp_path / "out", Fake(fails=labels[:1], diverges=labels[1:2]))
    assert outcome.code == 1
    assert list(outcome.failed) == labels[:1] and "the disk is full" in said
    assert outcome.diverged == labels[1:2]
    assert outcome.finished == labels[2:]
    again = Fake()
    outcome, said = run(study, tmp_path / "out", again)
    assert again.started == labels[:1]  # the diverged one would diverge again
    assert outcome.code == 0
    # The diverged one is named and left out; its slice has sizes to spare.
    words = "\n".join(describe(fit_study(tmp_path / "out")))
    assert f"left out: {labels[1]}: diverged, the guard refused" in words


def test_cores_are_shared_out(tmp_path):
    fake = Fake()
    run(isoflop_study(tmp_path, budgets=(1e13,)), tmp_path / "out", fake, jobs=2)
    available = sorted(os.sched_getaffinity(0))
    share = max(len(available) // 2, 1)
    assert all(len(cores) == share and set(cores) <= set(available) for cores in fake.cores)
    if len(available) > 1:
        assert {core for cores in fake.cores for core in cores} == set(available[: 2 * share])


def test_asked_to_stop_it_stops_and_goes_on_later(tmp_path):
    study = isoflop_study(tmp_path, budgets=(1e13,))
    labels = [planned.label for planned in plan(study)]
    outcome, said = run(study, tmp_path / "out", Fake(hangs=labels[1:]), jobs=1)
    assert outcome.code == 75 and outcome.finished == labels[:1]
    assert "jobs that they have handed to a scheduler or to other hosts go on" in said
    fake = Fake()
    outcome, _ = run(study, tmp_path / "out", fake)
    assert fake.started == labels[1:] and outcome.code == 0


def test_on_a_file_system_without_locks_a_study_runs_and_says_so(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    outcome, said = run(isoflop_study(tmp_path, budgets=(1e13,)), tmp_path / "out", Fake())
    assert outcome.code == 0 and outcome.finished
    assert said.count("is on a file system without locks") == 1 and "no other `maxlm study run`" in said


def test_names_say_what_matters_and_no_more(done, tmp_path):
    study, folder = done
    fake = Fake()
    renamed = dataclasses.replace(
        study,
        base=dataclasses.replace(study.base, checkpoint=dataclasses.replace(study.base.checkpoint, every_steps=7)),
    )
    run(renamed, folder, fake)
    assert fake.started == []
    other = dataclasses.replace(
        study, base=dataclasses.replace(study.base, optim=dataclasses.replace(study.base.optim, b2=0.97))
    )
    run(other, tmp_path / "out", fake)
    names = {r.name for r in read_plan(folder).runs} & {r.name for r in read_plan(tmp_path / "out").runs}
    assert not names


def test_a_default_that_has_changed_is_noticed(done, tmp_path):
    study, folder = done
    path = workdir_of(folder, plan(study)[0].label) / "config.json"
    kept = path.read_text()
    recorded = json.loads(kept)
    recorded["optim"]["b1"] = 0.85
    path.write_text(json.dumps(recorded))
    with pytest.raises(StudyError, match="optim.b1 was 0.85 and is 0.9"):
        run(study, folder, Fake())
    path.write_text(kept)


def test_a_default_that_has_changed_is_noticed_before_a_killed_run_goes_on(done):
    study, folder = done
    workdir = workdir_of(folder, plan(study)[0].label)
    ended, path = (workdir / "result.json").read_text(), workdir / "config.json"
    (workdir / "result.json").unlink()
    kept = path.read_text()
    recorded = json.loads(kept)
    recorded["optim"]["b1"] = 0.85
    path.write_text(json.dumps(recorded))
    fake = Fake()
    try:
        with pytest.raises(StudyError, match="begun when defaults were others: optim.b1 was 0.85 and is 0.9"):
            run(study, folder, fake)
        assert fake.started == []
        # A setting that the schema has had once, and one that came later, change nothing.
        recorded["optim"] |= {"b1": 0.9, "gone": [1, 2]}
        del recorded["optim"]["b2"]
        path.write_text(json.dumps(recorded))
        run(study, folder, fake)
        assert len(fake.started) == 1
    finally:
        path.write_text(kept)
        (workdir / "result.json").write_text(ended)


def test_the_commit_is_that_of_this_code_and_of_no_repository_around_it(tmp_path, monkeypatch):
    assert not commit().startswith("version")  # this checkout's
    package = tmp_path / "venv" / "maxlm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "note").write_text("a repository of something else")
    who = ["-c", "user.name=n", "-c", "user.email=e@x"]
    for words in (["init", "-q"], ["add", "note"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(maxlm, "__file__", str(package / "__init__.py"))
    first = commit()
    assert first.startswith(f"version {maxlm.__version__}, code ")
    (package / "more.py").write_text("x = 1")
    assert commit() != first
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    assert len(commit().rstrip("+")) == 40


def test_devices_that_nothing_was_planned_for_are_refused_before_the_first_run(tmp_path, monkeypatch):
    study = isoflop_study(tmp_path, budgets=(1e13,))
    assert devices_here() == ("cpu", 8)  # as tests/conftest.py has it
    with pytest.raises(StudyError, match=r"8 of platform cpu, but .* runs of 1; set Machine\(devices=8\)"):
        run_study(study, tmp_path / "out", log=print)
    assert not list((tmp_path / "out").glob("runs/*/log.txt"))
    monkeypatch.setattr(runner, "devices_here", lambda: runner.Devices("gpu", 1))
    with pytest.raises(StudyError, match="2 runs at a time would each take all 1 devices .* type --jobs=1"):
        run_study(study, tmp_path / "out", jobs=2, log=print)


def test_a_study_without_held_out_documents_is_refused_before_the_first_run(tmp_path):
    study = isoflop_study(tmp_path, budgets=(1e13,))
    stores = {name: dataclasses.replace(store, heldout_permille=0) for name, store in study.base.data.stores.items()}
    base = dataclasses.replace(study.base, data=dataclasses.replace(study.base.data, stores=stores))
    fake = Fake()
    with pytest.raises(StudyError, match="held-out losses, but tiny holds no document out; set .*heldout_permille"):
        run(dataclasses.replace(study, base=base), tmp_path / "out", fake)
    assert fake.started == []


def test_the_fit_finds_the_law_and_foretells_the_largest_budget(done):
    study, folder = done
    fit = fit_study(folder)
    assert fit.law is None
    assert any("only the isoflop fit is offered" in note for note in fit.notes)
    assert fit.isoflops is not None and fit.isoflops.params is not None
    # FLOPs are not 6 N D here, so the exponent of the law holds about.
    assert fit.isoflops.params.exponent == pytest.approx(LAW.exponent, abs=0.12)
    assert fit.held_back is not None
    assert abs(fit.held_back.miss) < 0.02 and fit.held_back.reach < 0.03
    assert fit.held_back.found in fit.held_back.interval
    assert "the prediction held" in "\n".join(describe(fit))


def test_missing_runs_and_other_data_are_named_and_left_out(done):
    study, folder = done
    labels = [planned.label for planned in plan(study)]
    gone, other = workdir_of(folder, labels[0]), workdir_of(folder, labels[7])
    result, kept = read_result(gone), read_result(other)
    assert result is not None and kept is not None
    (gone / "result.json").unlink()
    write_result(other, dataclasses.replace(kept, fingerprint="f" * 32, loss=0.1))
    (folder / "runs" / "stranger").mkdir()
    try:
        fit = fit_study(folder)
        words = "\n".join(describe(fit))
        assert f"left out: {labels[0]}: missing" in words
        assert f"left out: {labels[7]}: run on other data (fingerprint ffffffffffff" in words
        assert "runs/stranger: not in the study's plan" in words
        assert {row.planned.label for row in fit.gathered.rows} == set(labels) - {labels[0], labels[7]}
    finally:
        write_result(gone, result)
        write_result(other, kept)
        (folder / "runs" / "stranger").rmdir()


def test_a_source_that_changes_while_the_study_runs_is_noticed_in_what_the_runs_have_read(tmp_path):
    study = isoflop_study(tmp_path, budgets=(1e13,))
    labels = [planned.label for planned in plan(study)]
    more = tmp_path / "corpus" / "more.txt"

    class Writing(Fake):
        def __call__(self, planned, workdir, cores, lock):
            if planned.label == labels[2]:
                more.write_text("a note that was written while the study ran\n" * 20)
            return super().__call__(planned, workdir, cores, lock)

    outcome, said = run(study, tmp_path / "out", Writing(), jobs=1)
    assert outcome.code == 1 and outcome.finished == labels[:2] and outcome.strangers == labels[2:]
    assert f"{labels[2]} read other data" in said and "3 on other data" in said
    fit = fit_study(tmp_path / "out")
    assert [row.planned.label for row in fit.gathered.rows] == labels[:2]
    assert sum("run on other data" in words for words in fit.gathered.left_out) == 3
    more.unlink()
    again = Fake()
    outcome, said = run(study, tmp_path / "out", again)
    assert again.started == [] and outcome.code == 1 and f"remove {workdir_of(tmp_path / 'out', labels[2])}" in said


class Weighed(Fake):
    """Runs that are given the weights of a digest: `weights[label]`, or else those of `others`."""

    def __init__(self, weights, others="a"):
        super().__init__()
        self.weights, self.others = weights, others

    def __call__(self, planned, workdir, cores, lock):
        known = {"id": "0", "weights": self.weights.get(planned.label, self.others)}
        (workdir / "run.json").write_text(json.dumps(known))
        return super().__call__(planned, workdir, cores, lock)


def test_weights_that_change_while_the_study_runs_are_noticed(tmp_path):
    study, folder = isoflop_study(tmp_path, budgets=(1e13,)), tmp_path / "out"
    labels = [planned.label for planned in plan(study)]
    outcome, said = run(study, folder, Weighed({labels[2]: "b", labels[3]: ""}), jobs=1)
    assert outcome.code == 1 and outcome.strangers == [labels[2]]
    assert f"{labels[2]} began with other weights (digest b, that of the first to end is a)" in said
    fit = fit_study(folder)
    assert {row.planned.label for row in fit.gathered.rows} == set(labels) - {labels[2]}
    assert [words for words in fit.gathered.left_out if labels[2] in words and "other weights (digest b" in words]
    # A result from before runs wrote down their weights is still read, and counts.
    place = workdir_of(folder, labels[1]) / "result.json"
    result = json.loads(place.read_text())
    assert result.pop("weights") == "a"
    place.write_text(json.dumps(result))
    outcome, _ = run(study, folder, Fake(), jobs=1)
    assert outcome.strangers == [labels[2]] and labels[1] in outcome.reused


def test_a_sweep_over_where_the_weights_are_compares_those_from_one_place(tmp_path):
    settings = {"train.init_from": ("one", "two"), "seed": (0, 1)}
    study = isoflop_study(tmp_path, design=Sweep(shapes=(Shape(2, 32),), tokens=1e5, settings=settings))
    *first, third, fourth = [planned.label for planned in plan(study)]
    outcome, _ = run(study, tmp_path / "out", Weighed({third: "b", fourth: "b"}), jobs=1)
    assert outcome.code == 0 and outcome.finished == [*first, third, fourth]


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("data.stores.tiny.heldout_permille", (50, 100)),
        ("data.tokenizer.sample_bytes", (10**6, 10**7)),
        ("model.vocab_size", (264, 300)),
    ],
)
def test_runs_that_would_read_other_tokens_are_refused(tmp_path, setting, values):
    design = Sweep(shapes=(Shape(2, 32),), tokens=1e5, settings={setting: values})
    with pytest.raises(StudyError, match=f"differ in {setting[:11]}.*make a study of each value"):
        plan(isoflop_study(tmp_path, design=design))


def test_runs_evaluated_over_other_windows_are_refused_and_over_the_same_are_not(tmp_path):
    study = isoflop_study(tmp_path)

    def planned(settings, **evaluated):
        design = Sweep(shapes=(Shape(2, 32),), tokens=1e5, settings=settings)
        base = dataclasses.replace(study.base, eval=dataclasses.replace(study.base.eval, **evaluated))
        return plan(dataclasses.replace(study, base=base, design=design))

    with pytest.raises(StudyError, match="differ in the length of the windows evaluated"):
        planned({"data.sequence_length": (32, 64)})
    assert len(planned({"data.sequence_length": (32, 64)}, sequence_length=64)) == 2
    with pytest.raises(StudyError, match="differ in eval.stores"):
        planned({"eval.stores": ((), ("tiny",))})


def trunks_study(folder, **changes):
    """A trunk with two branches."""
    study = isoflop_study(folder, design=Trunks(params=(3e4,), tokens=(5e5, 1e6)))
    wsd = dataclasses.replace(study.base.optim, schedule="wsd")
    return dataclasses.replace(study, base=dataclasses.replace(study.base, optim=wsd, **changes))


def test_branches_wait_for_their_trunk_and_begin_with_its_checkpoint(tmp_path):
    saved = dataclasses.replace(isoflop_study(tmp_path).base.checkpoint, mtbf_hours=1.0, every_seconds=30.0)
    study = trunks_study(tmp_path, checkpoint=saved)
    trunk, *branches = plan(study)
    # Every save is at a multiple of the stride, where branches leave, and none is chosen by a clock.
    keeping = trunk.config.checkpoint
    assert keeping.every_steps == keeping.keep_every_steps
    assert (keeping.mtbf_hours, keeping.every_seconds) == (0.0, 0.0)
    assert branches[0].config.checkpoint == saved
    assert len(branches) == 2 and not trunk.fitted
    outcome, said = run(study, tmp_path / "out", Fake(fails=[trunk.label]))
    assert set(outcome.failed) == {planned.label for planned in (trunk, *branches)}
    assert f"its trunk {trunk.label} has not finished" in said

    class Saving(Fake):
        def __call__(self, planned, workdir, cores, lock):
            if planned.label == trunk.label:
                for branch in branches:
                    (workdir / "checkpoints" / str(branch.branch.step)).mkdir(parents=True)
            else:
                assert [p.name for p in (workdir / "checkpoints").iterdir()] == [str(planned.branch.step)]
                assert [record["step"] for record in read_metrics(workdir)][-1] == planned.branch.step
                copied = list(read_metrics(workdir))
            ended = super().__call__(planned, workdir, cores, lock)
            if planned.label != trunk.label:
                own = [copied[-1] | {"step": planned.branch.step + n, "seconds": 0.25} for n in (1, 2)]
                (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in copied + own))
            else:
                leaves = [branch.branch.step for branch in branches]
                records = [{"kind": "step", "step": step, "loss": 1.0, "accepted": True, "tokens": 1, "seconds": 1.0}
                           for step in (1, *leaves, planned.config.train.steps)]  # fmt: skip
                (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            return ended

    outcome, said = run(study, tmp_path / "out", Saving())
    assert said.count("begins; about") == 3 and "begins, from" not in said
    assert outcome.finished == [planned.label for planned in (trunk, *branches)]
    for branch in branches:
        step = branch.branch.step
        result = read_result(workdir_of(tmp_path / "out", branch.label))
        assert result.seconds == 2 * 0.25 and result.steps > 2  # the trunk's steps took the trunk's time
        assert step % trunk.config.checkpoint.keep_every_steps == 0
        assert branch.config.train.steps - branch.config.optim.decay_steps == step


def test_a_branch_is_told_of_the_rollbacks_before_it_left_and_of_the_first_weights(tmp_path):
    study = trunks_study(tmp_path)
    trunk, *branches = plan(study)
    leaves = [branch.branch.step for branch in branches]
    rollbacks = [Rollback(leaves[0] - 1, leaves[0] - 2), Rollback(leaves[1] - 1, leaves[0])]  # one before each leave
    found = []

    class RolledBack(Fake):
        def __call__(self, planned, workdir, cores, lock):
            if planned.label == trunk.label:
                for number, step in enumerate(leaves):
                    place = workdir / "checkpoints" / str(step)
                    (place / RECORD_ITEM).mkdir(parents=True)
                    known = [list(skip) for skip in skips(rollbacks[: number + 1])]
                    record = record_to_json(Record(step, 0.0, {}, {"data": {"skips": known}}))
                    (place / RECORD_ITEM / RECORD_FILE).write_text(json.dumps(record))
                    (place / COMMIT_MARKER).touch()
                (workdir / "rollbacks.json").write_text(json.dumps([each._asdict() for each in rollbacks]))
                (workdir / "run.json").write_text(json.dumps({"id": "of the trunk", "weights": "a"}))
            else:
                found.append(recorded(workdir))
                assert weights_given(workdir) == "a" and run_id(workdir) not in ("", "of the trunk")
            return super().__call__(planned, workdir, cores, lock)

    outcome, _ = run(study, tmp_path / "out", RolledBack(), jobs=1)
    assert outcome.code == 0 and found == [rollbacks[:1], rollbacks]


@pytest.mark.parametrize(
    ("design", "words"),
    [
        (Sweep((Shape(2, 32),), 1e5, {"optim.peak_lr": (0.01, 0.010001)}), "two values are the same to three digits"),
        (Trunks(params=(3e4,), tokens=(5e5, 5.001e5)), "two token counts round to the same steps"),
        (Rungs("params", (3e4, 3.00000001e4)), "come twice: two sizes round to one shape"),
        (Isoflops(budgets=(1e13, 1.0001e13), sizes=(1.0,)), "two budgets are the same to three digits"),
    ],
    ids=["sweep", "trunks", "rungs", "isoflops"],
)
def test_why_two_runs_are_one_is_said_of_the_design(tmp_path, design, words):
    study = isoflop_study(tmp_path, design=design)
    wsd = dataclasses.replace(study.base.optim, schedule="wsd")
    with pytest.raises(StudyError, match=words):
        plan(dataclasses.replace(study, base=dataclasses.replace(study.base, optim=wsd)))


def test_a_topology_says_what_a_study_costs_there(tmp_path, monkeypatch):
    study, found = isoflop_study(tmp_path, budgets=(1e15, 2e15)), {}
    with pytest.raises(StudyError, match=r"cannot run on 16 devices.*eval.batch_size is 8, which .* 16 shards"):
        verb("plan", study, tmp_path / "out", monkeypatch, topology="v5p-32")
    evaluated = dataclasses.replace(study.base.eval, batch_size=16)
    study = dataclasses.replace(study, base=dataclasses.replace(study.base, eval=evaluated))
    for hardware, chips in (("v5p-8", 4), ("v5p-32", 16)):
        made = tmp_path / f"{hardware}.json"
        said, code = verb("plan", study, tmp_path / "out", monkeypatch, topology=hardware, json=made)
        assert code == 0 and f"on {chips} v5p chips" in said and "dollars" in said
        found[hardware] = json.loads(made.read_text())
    small, large = found["v5p-8"], found["v5p-32"]
    runs = len(small["runs"])
    overhead = runs * study.machine.overhead_seconds
    # Four times the chips: four times as fast but for what a run takes besides, at four times the price an hour.
    assert small["seconds"] - overhead == pytest.approx(4 * (large["seconds"] - overhead))
    hourly = 4 * CHIPS["v5p"].price
    assert small["dollars"] == pytest.approx(small["seconds"] / 3600 * hourly)
    assert large["dollars"] == pytest.approx(large["seconds"] / 3600 * 4 * hourly)
    with pytest.raises(UserError, match="cpu-8"):
        verb("plan", study, tmp_path / "out", monkeypatch, topology="cpu-8")
