"""A run in one process: what comes after what, so that a failure or a signal at any moment costs next to nothing."""

import contextlib
import functools
import json
import os
import shutil
import signal
from types import SimpleNamespace

import jax
import pytest

from maxlm.checkpoint.manager import SaveResult
from maxlm.checkpoint.pace import Pace
from maxlm.checkpoint.reader import CheckpointError, CheckpointReader
from maxlm.config import PhaseConfig, StoreConfig, TokenizerConfig
from maxlm.data.prepare import prepare_data
from maxlm.data.proof import HEAD_START, Proof
from maxlm.errors import UserError
from maxlm.infer.load import Asked, generate_from
from maxlm.infer.sampling import Sampling
from maxlm.model.flops import ledger
from maxlm.resolve import resolve
from maxlm.train import finish, loop
from maxlm.train.goodput import FILE_NAME as LEDGER
from maxlm.train.goodput import summarise
from maxlm.train.home import SAVED, Home
from maxlm.train.metrics import MetricsWriter, Truncation, read_metrics
from maxlm.train.outlook import outlook
from maxlm.train.run import tell_cut, train
from maxlm.train.signals import EXIT_PREEMPTED
from tests.tiny import replace, tiny_config, write_corpus

STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return tiny_config(
        write_corpus(folder / "corpus", documents=30),
        data__cache_dir=str(folder / "data"),
        train__steps=STEPS,
        train__norms_every=0,
        train__compilation_cache=str(folder / "xla"),
        checkpoint__every_steps=3,
        checkpoint__keep_best=1,
        eval__every_steps=1,
        eval__prompts=(),
    )


def at_evaluation(monkeypatch, step, event):
    """Something happens when the first batch of the evaluation after a step has come back."""
    evaluate, at = loop.Run.evaluate, []

    def evaluated(run, state, done):
        at[:] = [done]
        return evaluate(run, state, done)

    stores = loop.evaluate_stores

    def evaluate_stores(*args, progress, **kwargs):
        def came_on(*batches):
            if at == [step]:
                event()
            progress(*batches)

        return stores(*args, progress=came_on, **kwargs)

    monkeypatch.setattr(loop.Run, "evaluate", evaluated)
    monkeypatch.setattr(loop, "evaluate_stores", evaluate_stores)


def evaluations(workdir, until=STEPS):
    """The evaluations of a run in the order of the file."""
    records = [(record["step"], record["bits_per_byte"]) for record in read_metrics(workdir, "evaluation")]
    return [(step, bits) for step, bits in records if step <= until]


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def fail(*_args, **_kwargs):
    raise MemoryError("as where an evaluation takes more than there is")


def no_room(*_args, **_kwargs):
    raise OSError("no room")


def test_a_state_is_saved_before_anything_that_can_fail_and_evaluations_heed_signals(config, tmp_path, monkeypatch):
    """One run, ended in an evaluation at a step without a save, at one with a save, at the end, and after it."""
    workdir, whole, said = tmp_path / "run", tmp_path / "whole", []
    assert train(config, whole, log=said.append) == 0
    whole_reader = CheckpointReader(whole / "checkpoints", log=said.append)
    reader = CheckpointReader(workdir / "checkpoints", log=said.append)

    def go(**leaves):
        changed = functools.reduce(lambda c, leaf: replace(c, leaf[0].split("__"), leaf[1]), leaves.items(), config)
        return train(changed, workdir, log=said.append)

    with pytest.MonkeyPatch.context() as before:  # nothing is saved: it begins anew
        at_evaluation(before, 1, fail)
        with pytest.raises(MemoryError):
            go()
    assert not reader.steps() and SAVED not in Home(workdir, log=said.append).facts()
    with pytest.MonkeyPatch.context() as first:
        at_evaluation(first, 1, terminate)
        first.setattr(Home, "_push", no_room)
        first.setattr(MetricsWriter, "_close_files", no_room)
        assert go() == EXIT_PREEMPTED
    assert "metrics and reports could not be copied: no room" in said
    assert "the last records of metrics.jsonl are lost: no room" in said
    assert reader.steps() == [1] and "SIGTERM: saved at step 1; the same command continues" in said
    assert not list(read_metrics(workdir, "evaluation"))
    with pytest.MonkeyPatch.context() as second:
        at_evaluation(second, 3, fail)
        with pytest.raises(MemoryError):
            go()
    assert reader.steps()[-1] == 3 and reader.score_of(3) is None
    assert evaluations(workdir) == evaluations(whole, until=2)  # that of step 1 was made up for
    with pytest.MonkeyPatch.context() as third:
        at_evaluation(third, STEPS, terminate)
        assert go() == EXIT_PREEMPTED
    assert evaluations(workdir) == evaluations(whole, until=STEPS - 1)
    assert reader.score_of(3) == whole_reader.score_of(3) == dict(evaluations(workdir))[3]
    assert reader.steps()[-1] == STEPS and not (workdir / "report.json").exists()
    records = [json.loads(line) for line in (workdir / LEDGER).read_text().splitlines()]
    assert [record["mark"] for record in records if record["process"] == 4][
        -1
    ] is False  # of the evaluation nothing is left
    steps = list(read_metrics(workdir, "step"))
    with pytest.MonkeyPatch.context() as fourth:  # the last evaluation is written down, and the report is not
        fourth.setattr(finish, "write_report", fail)
        with pytest.raises(MemoryError):
            go()
    monkeypatch.setattr(finish, "generate_text", fail)  # nothing is left of the run but its report
    assert go(eval__prompts=("document 1\n",)) == 0 and list(read_metrics(workdir, "step")) == steps
    why = "no samples: MemoryError: as where an evaluation takes more than there is; maxlm generate --workdir="
    assert any(why in line for line in said)
    assert json.loads((workdir / "report.json").read_text())["samples"] == []
    assert evaluations(workdir) == evaluations(whole)
    assert reader.score_of(STEPS) == dict(evaluations(workdir))[STEPS]
    records = [json.loads(line) for line in (workdir / LEDGER).read_text().splitlines()]
    assert summarise(records).processes == 6

    # A mistaken start in its place is refused, and leaves the config that is written down.
    before = {path.name: path.read_bytes() for path in workdir.glob("config*")}
    with pytest.raises(UserError, match="batch"):
        train(replace(config, ["data", "batch_size"], 16), workdir, log=said.append)
    assert {path.name: path.read_bytes() for path in workdir.glob("config*")} == before

    # So is one of fewer steps than were made, and one whose checkpoints are gone: it does not begin from scratch.
    metrics = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="is at step 6, and train.steps is 4: type 6 or more, or take its weights"):
        go(train__steps=4)
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(
        CheckpointError, match=f"has had checkpoints, that of step 1 for one, .*{workdir}/checkpoints back"
    ):
        go()
    assert (workdir / "metrics.jsonl").read_bytes() == metrics and json.loads((workdir / "run.json").read_text())["id"]


def test_later_phases_have_their_own_cost_and_the_first_step_does_not_wait_for_the_proof(config, tmp_path, monkeypatch):
    for path, value in (
        ("train.steps", 3),
        ("checkpoint.keep_best", 0),
        ("eval.every_steps", 0),
        ("data.phases", {"short": PhaseConfig(from_step=2, sequence_length=32)}),
    ):
        config = replace(config, path.split("."), value)
    config = resolve(config)
    now, run_peak, peaks = [0.0], loop.run_peak, []

    class Clocked(loop.Progress):
        def __init__(self, **kwargs):
            super().__init__(**kwargs, clock=lambda: now[0])

    def check(proof, wait=0.0):
        now[0] += wait  # nothing else takes time

    monkeypatch.setattr(loop, "Progress", Clocked)
    monkeypatch.setattr(Proof, "check", check)
    monkeypatch.setattr(loop, "run_peak", lambda *args: peaks.append(run_peak(*args)) or peaks[-1])
    watermarks, reports = [], []

    class Watermark:
        def __init__(self):
            watermarks.append(self)

        def device_bytes(self, state):
            return 1.0 + watermarks.index(self)

    monkeypatch.setattr(loop, "Watermark", Watermark)
    monkeypatch.setattr(finish, "write_report", lambda workdir, facts: reports.append(facts))
    plan = {"forecast": {"seconds": 0.4}, "memory": {"total": 3}, "topology": "cpu", "devices": jax.device_count()}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert train(config, tmp_path, log=lambda line: None) == 0
    # A plan is of the heaviest steps: the first two, though nothing stops the run before the phase that follows them.
    assert reports[0].foretold.device_bytes_held == 1.0 and len(watermarks) == 2
    assert reports[0].foretold_steps == range(1, 3)
    seconds = [record["seconds"] for record in read_metrics(tmp_path, "step")]
    assert now == [HEAD_START] and seconds == [0.0] * 3
    costs = [(record["step"], record["flops_causal"]) for record in read_metrics(tmp_path, "cost")]
    long, short = (ledger(config.model, sequence_length=length).causal_exact for length in (64, 32))
    assert costs == [(0, long), (2, short)] and len(peaks) == 1 and short < long
    tokens = 8 * (2 * 64 * long + 32 * short)
    assert outlook(config)["training FLOPs"]["in all, causal-exact"] == pytest.approx(tokens)


def test_a_save_that_is_refused_at_once_says_nothing_of_what_one_costs():
    """With a cost of next to nothing the next one would be due at once, and so would all that follow."""
    pace, results = Pace(1000, mtbf=3600.0), iter([SaveResult(True, 2.0), SaveResult(False, 1e-6)])
    nothing = SimpleNamespace(
        bucket=lambda name: contextlib.nullcontext(), checkpoint=lambda step: None, write=lambda *record: None
    )
    run = SimpleNamespace(
        config=SimpleNamespace(checkpoint=SimpleNamespace(mtbf_hours=1.0)),
        checkpointer=SimpleNamespace(pace=pace, write_seconds=0.0, save=lambda *args, **kwargs: next(results)),
        copy_pace=None, step_seconds=1.0, goodput=nothing, writer=nothing, rollbacks=[],
        sentries=SimpleNamespace(refusals=SimpleNamespace(steps=[])),
        flush=dict, metadata=dict, note_saved=dict, tell_failures=str,
    )  # fmt: skip
    run.settle_pace = functools.partial(loop.Run.settle_pace, run)

    def next_due(step):
        return next(later for later in range(step + 1, 9999) if pace.due(later))

    loop.Run.save(run, None, 100)
    apart = next_due(100) - 100
    loop.Run.save(run, None, 100 + apart)
    assert next_due(100 + apart) == 100 + 2 * apart and apart > 10


def test_a_gap_in_the_metrics_is_told():
    said = []
    tell_cut(Truncation(kept=9, dropped=3, unreadable=0, last_step=8), 8, log=said.append)
    assert not said
    tell_cut(Truncation(kept=9, dropped=0, unreadable=2, last_step=6), 8, log=said.append)
    assert "had 2 lines that could not be read" in said[0] and "ends with step 6, the run goes on from 8" in said[1]


def test_a_start_that_is_refused_leaves_the_run_with_its_tokenizer(tmp_path):
    """Where the text has changed, another tokenizer is trained: not for the weights that are there."""
    corpus, workdir, said = write_corpus(tmp_path / "corpus", documents=30), tmp_path / "run", []
    tokenizer = TokenizerConfig(kind="sentencepiece", sample_bytes=100_000)
    config = tiny_config(corpus, model__vocab_size=320, data__tokenizer=tokenizer, train__steps=3, eval__prompts=())
    assert train(config, workdir, log=said.append) == 0
    prepared = (workdir / "data" / "prepared.json").read_bytes()
    (corpus / "more.txt").write_text("quite other words, zebras and quartz among them " * 200)
    more = replace(config, ["train", "steps"], 4)
    with pytest.raises(UserError, match="the store 'tiny' was"):
        train(more, workdir, log=said.append)
    assert (workdir / "data" / "prepared.json").read_bytes() == prepared
    asked = Asked(["a"], 1, Sampling(temperature=0.0), 0)
    generate_from(workdir, asked, log=said.append, write=said.append)
    prepare_data(config, workdir)  # as `maxlm prepare` does
    with pytest.raises(UserError, match="another tokenizer"):
        generate_from(workdir, asked, log=said.append, write=said.append)


def test_the_text_that_a_run_is_judged_by_does_not_change_under_its_name(config, tmp_path):
    """No step changes by it, so that nothing but its fingerprint tells."""
    workdir, judge = tmp_path / "run", write_corpus(tmp_path / "judge", documents=5)
    tiny, other = config.data.stores["tiny"], StoreConfig(source=f"text:{judge}/*.txt", heldout_permille=1000)

    def go(steps, **stores):
        given = replace(config, ["data", "stores"], {"tiny": tiny, **stores})
        return train(replace(given, ["train", "steps"], steps), workdir, log=lambda line: None)

    assert go(3, judge=other) == 0
    steps = list(read_metrics(workdir, "step"))
    (judge / "more.txt").write_text("another document to be judged by")
    with pytest.raises(UserError, match=r"on other text under the same name: the store 'judge' was .* name of its own"):
        go(4, judge=other)
    assert list(read_metrics(workdir, "step")) == steps
    assert go(4, second=other) == 0
    last = [record["store"] for record in read_metrics(workdir, "evaluation") if record["step"] == 4]
    assert sorted(last) == ["second", "tiny"]


def test_a_local_copy_alone_is_no_checkpoint(config, tmp_path):
    """The machine that held it may be gone: the run then begins again, as if there had been none."""
    workdir, disk, said = tmp_path / "run", tmp_path / "disk", []
    given = {"local_dir": str(disk), "local_every_steps": 1, "every_steps": 100, "keep_best": 0}
    local = functools.reduce(lambda c, leaf: replace(c, ["checkpoint", leaf[0]], leaf[1]), given.items(), config)
    for step in (2, 4):
        with pytest.MonkeyPatch.context() as patch:
            at_evaluation(patch, step, fail)
            with pytest.raises(MemoryError):
                train(local, workdir, log=said.append)
    assert any("using the local copies of step" in line for line in said)
    assert SAVED not in Home(workdir, log=said.append).facts()
    shutil.rmtree(disk)
    assert train(local, workdir, log=said.append) == 0
    assert [record["step"] for record in read_metrics(workdir, "step")] == list(range(1, STEPS + 1))
