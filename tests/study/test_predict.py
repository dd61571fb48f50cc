"""Predictions, judgements and reports of a study, and the commands that are typed for them."""

import csv
import dataclasses
import json
import os
import shlex

import pytest

from maxlm.data.prepare import prepare_data
from maxlm.errors import UserError
from maxlm.resolve import resolve
from maxlm.storage import Folder
from maxlm.study import predict as prediction
from maxlm.study.fitting import as_json, describe, fit_study
from maxlm.study.plan import plan
from maxlm.study.report import write_report
from maxlm.study.spec import Rungs, StudyError
from maxlm.train.home import first_start
from tests.study.fake import LAW, Fake, isoflop_study, run, verb


def test_rungs_have_a_curve_a_forecast_and_a_picture(tmp_path):
    budgets = tuple(1e13 * 2**n for n in range(6))
    study = isoflop_study(tmp_path, design=Rungs("flops", budgets))
    outcome, _ = run(study, tmp_path / "out", Fake(noise=0.001, bearing=0.8))
    assert outcome.code == 0
    fit = fit_study(tmp_path / "out")
    assert fit.law is None and fit.isoflops is None and fit.way == "curve"
    assert fit.held_back.flops == pytest.approx(budgets[-1], rel=0.05) and fit.held_back.by == "curve"
    assert abs(fit.held_back.miss) < 0.02 and fit.held_back.how.startswith("curve through 5 rungs")
    words = "\n".join(describe(fit))
    for row in fit.gathered.rows:
        assert f"{row.planned.label}: N {row.planned.params_nonembedding:,}, D {row.result.tokens:,}" in words
        assert f"loss {row.loss:.4f}" in words
    assert [each["loss"] for each in as_json(fit)["losses"]] == [row.loss for row in fit.gathered.rows]
    page = write_report(study, tmp_path / "out", fit).read_text()
    assert 'src="compute.png"' in page
    place = prediction.predict(study, tmp_path / "out", flops=4 * budgets[-1])
    said = json.loads((place / "prediction.json").read_text())
    assert said["how"].startswith("curve through 6 rungs")
    truth = float(LAW.loss(said["params_nonembedding"], said["tokens"]))
    assert said["interval"][0] < truth < said["interval"][1]
    # Few rungs have no curve, which is said, and their losses and picture all the same.
    few = dataclasses.replace(study, design=Rungs("flops", budgets[:4]))
    run(few, tmp_path / "few", Fake())
    fit = fit_study(tmp_path / "few")
    words = "\n".join(describe(fit))
    assert "note: no curve goes through the rungs: 4 rungs, but" in words and words.count(", loss ") == 4
    assert 'src="compute.png"' in write_report(few, tmp_path / "few", fit).read_text()
    with pytest.raises(UserError, match="no forecast can be made: no curve goes through the rungs: 4 rungs"):
        prediction.predict(few, tmp_path / "few", flops=1e15)


def test_tokens_that_bear_no_loss_are_not_predicted(tmp_path):
    study = isoflop_study(tmp_path)
    run(study, tmp_path / "out", Fake(noise=0.001, bearing=0.9))
    place = prediction.predict(study, tmp_path / "out", flops=2 * max(run.flops for run in plan(study)))
    said = json.loads((place / "prediction.json").read_text())
    assert said["tokens"] == pytest.approx(0.9 * said["positions"], rel=1e-4)
    larger = tmp_path / "larger"
    first_start(larger)
    older = said["config"] | {"gone": {"once": 1}}  # a section that this version has no more
    (larger / "config.json").write_text(json.dumps(older))
    prepare_data(resolve(said["config"]), larger)
    tokens = round(0.9 * said["positions"])
    report = {
        "heldout": {"tiny": {"nats_per_token": float(LAW.loss(said["params_nonembedding"], tokens)), "tokens": 10}},
        "tokens": tokens,
        "model": {"parameters besides embeddings": said["params_nonembedding"]},
    }
    (larger / "report.json").write_text(json.dumps(report))
    assert "the prediction held" in prediction.judge(tmp_path / "out", place, larger)


def test_a_prediction_is_written_first_and_judged_after(done, tmp_path):
    study, folder = done
    largest = max(run.flops for run in plan(study))
    with pytest.raises(StudyError, match="predict a larger one"):
        prediction.predict(study, folder, flops=largest / 2)
    rules = dataclasses.replace(study.rules, base_rate=2 * study.rules.base_rate)
    with pytest.raises(StudyError, match="not those that the study plans now"):
        prediction.predict(dataclasses.replace(study, rules=rules), folder, flops=2 * largest)
    place = prediction.predict(study, folder, flops=2 * largest)
    said = json.loads((place / "prediction.json").read_text())
    assert said["interval"][0] < said["loss"] < said["interval"][1]
    assert (said["interval"][1] - said["interval"][0]) / said["loss"] < 0.06
    with pytest.raises(StudyError, match="it stays as it is"):
        prediction.predict(study, folder, flops=2 * largest)

    def larger(name, factor, began=None):
        """The predicted run with its true loss times a factor."""
        workdir = tmp_path / name
        first_start(workdir)
        if began is not None:
            (workdir / "run.json").write_text(json.dumps({"id": "0"} | ({"began": began} if began else {})))
        (workdir / "config.json").write_text(json.dumps(said["config"]))
        prepare_data(resolve(said["config"]), workdir)
        loss = float(LAW.loss(said["params_nonembedding"], said["tokens"])) * factor
        report = {
            "heldout": {"tiny": {"nats_per_token": loss, "tokens": 10}},
            "tokens": said["tokens"],
            "model": {"parameters besides embeddings": said["params_nonembedding"]},
        }
        (workdir / "report.json").write_text(json.dumps(report))
        return workdir

    good = larger("good", 1.0)
    assert "the prediction held" in prediction.judge(folder, place, good)
    assert "the prediction did not hold" in prediction.judge(folder, place, larger("bad", 1.2))
    prediction.judge(folder, place, good)
    # The first verdict stays, whatever is judged after it, and the same run is not counted twice.
    (told,) = (each["judgements"] for each in prediction.predictions(folder) if each["name"] == place.name)
    assert [each["held"] for each in told] == [True, False]
    assert json.loads((place / "judgement.json").read_text())["held"]
    # The config is written again when a setting changes, the run's own note of its first start never is.
    early = larger("early", 1.0, began="2020-01-01T00:00:00+00:00")
    with pytest.raises(StudyError, match="began .2020-01-01T00:00:00.* before the prediction was written"):
        prediction.judge(folder, place, early)
    late = larger("late", 1.0)
    os.utime(late / "config.json", (1, 1))
    assert "written down" not in prediction.judge(folder, place, late)
    older = larger("older", 1.0, began="")
    assert "it has not written down" in prediction.judge(folder, place, older)
    os.utime(older / "report.json", (1, 1))
    with pytest.raises(StudyError, match="began .1970-01-01"):
        prediction.judge(folder, place, older)
    drawn = said.pop("weights")
    (place / "prediction.json").write_text(json.dumps(said | {"weights": "abc"}))  # as if the study had been given some
    for name, weights in (("same", "abc"), ("other", "def")):
        given = larger(name, 1.0)
        (given / "run.json").write_text(json.dumps(json.loads((given / "run.json").read_text()) | {"weights": weights}))
    assert drawn == "" and "the prediction held" in prediction.judge(folder, place, tmp_path / "same")
    with pytest.raises(StudyError, match=r"began with other weights .digest def. than the study's runs .abc."):
        prediction.judge(folder, place, tmp_path / "other")
    changed = larger("changed", 1.0)
    config = said["config"] | {"seed": 5}
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(StudyError, match="seed was 0 and is 5"):
        prediction.judge(folder, place, changed)


def test_a_run_that_cannot_be_judged_is_named_in_a_sentence(done, tmp_path):
    study, folder = done
    place = prediction.predict(study, folder, flops=3 * max(run.flops for run in plan(study)))
    said = json.loads((place / "prediction.json").read_text())
    good = {"tiny": {"nats_per_token": 2.0, "tokens": 10}}

    def judged(name, *, heldout=good, config=True, data=None):
        workdir = tmp_path / name
        workdir.mkdir()
        model = {"parameters besides embeddings": said["params_nonembedding"]}
        (workdir / "report.json").write_text(json.dumps({"heldout": heldout, "tokens": said["tokens"], "model": model}))
        if config:
            (workdir / "config.json").write_text(json.dumps(said["config"]))
        if data is not False:
            prepare_data(data or resolve(said["config"]), workdir)
        with pytest.raises(StudyError) as caught:
            prediction.judge(folder, place, workdir)
        return str(caught.value)

    diverged = {"nats_per_token": None, "tokens": 10}
    assert "no held-out loss that is finite" in judged("diverged", heldout=good | {"other": diverged})
    assert "no held-out loss that is finite" in judged("nothing", heldout={})
    assert "has no config.json" in judged("bare", config=False)
    assert "cannot be told" in judged("moved", data=False)
    more = folder.parent / "corpus" / "more.txt"
    more.write_text("a document that the study has not seen")
    try:
        config = resolve(said["config"])
        grown = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=str(tmp_path / "cache")))
        assert "was run on other data (fingerprint" in judged("other", data=grown)
    finally:
        more.unlink()
    assert not (place / "judgement.json").exists()


def test_the_report_shows_every_run(done):
    study, folder = done
    page = write_report(study, folder, fit_study(folder)).read_text()
    for planned in plan(study):
        assert planned.label in page
    assert 'src="isoflops.png"' in page and 'src="optima.png"' in page
    lines = (folder / "report" / "runs.csv").read_text().splitlines()
    assert len(lines) == 1 + len(plan(study)) and lines[0].startswith("label,name,status,params_besides_embeddings")
    for planned, row in zip(plan(study), csv.DictReader(lines), strict=True):
        config = planned.config
        assert row["label"] == planned.label and int(row["batch"]) == config.data.batch_size
        assert (int(row["layers"]), int(row["width"])) == (config.model.num_layers, config.model.embed_dim)
        assert float(row["rate"]) == config.optim.peak_lr and float(row["seconds_of_steps"]) == pytest.approx(1.0)
    assert (folder / "report" / "isoflops.png").read_bytes()[:4] == b"\x89PNG"


def test_the_words_to_judge_by_can_be_typed(done, monkeypatch):
    study, folder = done
    flops = 5 * max(run.flops for run in plan(study))
    said, code = verb("predict", study, folder, monkeypatch, flops=flops)
    place = next(path for path in (folder / "predictions").iterdir() if f"{flops:.2e}".replace("+", "") in path.name)
    words = ["maxlm", "study", "judge", "study.py", f"--dir={folder}", f"--prediction={place.name}"]
    assert code == 0 and f"and then: {shlex.join([*words, '--workdir=' + str(place / 'run')])}" in said


def test_a_study_in_a_bucket_is_refused_and_a_run_in_one_can_be_judged(done, bucket, monkeypatch):
    study, folder = done
    with pytest.raises(UserError, match="--dir is gs://b/s, but a study .* give a folder, as"):
        verb("run", study, "gs://b/s", monkeypatch)
    verb("predict", study, folder, monkeypatch, flops=7 * max(run.flops for run in plan(study)))
    place = max(
        (folder / "predictions").iterdir(), key=lambda path: json.loads((path / "prediction.json").read_text())["flops"]
    )
    Folder(f"{bucket}/run").write("config.json", "{}")
    judge = {"prediction": place.name, "workdir": f"{bucket}/run"}
    with pytest.raises(StudyError, match="has no report.json"):
        verb("judge", study, folder, monkeypatch, **judge)
    seen = {}

    def judged(folder, place, workdir, *, home):
        seen[home] = sorted(path.name for path in workdir.rglob("*"))
        return "the prediction held"

    monkeypatch.setattr(prediction, "judge", judged)
    Folder(f"{bucket}/run").write("report.json", "{}")
    Folder(f"{bucket}/run").write("checkpoints/4-a-0/state", "large")
    assert verb("judge", study, folder, monkeypatch, **judge) == ("the prediction held", 0)
    assert seen == {f"{bucket}/run": ["config.json", "report.json"]}


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("run", {"topology": "v5e-8"}, "--topology is for plan, and says nothing to run"),
        ("judge", {"json": "x"}, "--json is for plan and fit, and says nothing to judge"),
        ("plan", {"jobs": 0}, "--jobs is for run"),
    ],
)
def test_flags_of_other_verbs_are_refused(done, tmp_path, monkeypatch, name, given, words):
    with pytest.raises(UserError, match=words):
        verb(name, *done, monkeypatch, **given)
