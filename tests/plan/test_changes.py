"""What the analytical model serves: the search, and the changes that make a run fit."""

import dataclasses
import json
import math
import shlex
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import maxlm.plan.candidates
import maxlm.plan.changes
import maxlm.plan.compile
from maxlm import cli
from maxlm.chips import CHIPS
from maxlm.config import (
    AttentionConfig,
    Config,
    DataConfig,
    EvalConfig,
    MlpConfig,
    ModelConfig,
    ParallelConfig,
    PhaseConfig,
    StoreConfig,
    TrainConfig,
)
from maxlm.configfile import source
from maxlm.plan import searching, shortage
from maxlm.plan.analytic import Estimator
from maxlm.plan.candidates import candidates, leanest, overrides
from maxlm.plan.changes import cheapest, sentences
from maxlm.plan.compile import OutOfTime
from maxlm.plan.search import COMPILED, SearchError, Verdict, search, why
from maxlm.plan.topology import parse_topology
from maxlm.plan.uncompiled import figures
from maxlm.resolve import resolve
from maxlm.train.finish import foretold
from maxlm.train.report import Foretold
from tests.plan.test_analytic import TOPOLOGY, config

ALL_REMATS = maxlm.plan.candidates.REMATS  # before the tests cut them down


@pytest.fixture(scope="module")
def large():
    """About 8 billion parameters, which eight chips hold, but not with everything kept for the backward pass.

    Of the structure of the small model, so that nothing has to be traced anew.
    """
    model = ModelConfig(
        vocab_size=128_256,
        embed_dim=4096,
        num_layers=32,
        attention=AttentionConfig(q_heads=256, kv_heads=64, head_dim=16),
        mlp=MlpConfig(dim=14_336),
    )
    given = Config(
        model=model,
        data=DataConfig(stores={"a": StoreConfig()}, sequence_length=8192, batch_size=16, mask_documents=False),
        parallel=ParallelConfig(data=1, fsdp=8),
        train=TrainConfig(remat="none", loss_chunk=8192, precision="float32", norms_every=0),
        eval=EvalConfig(batch_size=8),
    )
    return resolve(given, devices=TOPOLOGY.devices)


@pytest.fixture(scope="module", autouse=True)
def two_policies():
    """Each policy is traced, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maxlm.plan.candidates, "REMATS", ("none", "full"))
        yield


@pytest.fixture(scope="module")
def found(large):
    return search(large, TOPOLOGY, None, budget_seconds=0.0)


def applied(large, words):
    """The config after overrides of the command line, as `maxlm train` reads them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.py"
        path.write_text(source(large))
        args = ["maxlm train", f"--config={path}", *words]
        values = cli._flags(args, config=True)
        cli._parse(values, args, required=("config",))
    return resolve(values.config, devices=TOPOLOGY.devices)


def test_the_winner_fits_keeps_the_batch_and_is_had_by_its_overrides(large, found):
    winner = found.winner
    assert winner.estimate.fits and found.judged > 500
    assert winner.config.data == large.data and winner.config.model == large.model
    assert winner.seconds == min(ranked.seconds for ranked in found.best)
    words = overrides(large, winner.config)
    assert words and applied(large, words) == winner.config
    assert why(found, TOPOLOGY)


@pytest.mark.parametrize("remat", ["attention_qkv+attention_out", "attention_out"])
def test_the_winners_file_and_line_go_through_a_shell(large, found, remat, tmp_path, monkeypatch):
    train = dataclasses.replace(large.train, remat=remat)
    other = dataclasses.replace(large, train=train, parallel=dataclasses.replace(large.parallel, fsdp=4, tensor=2))
    won = dataclasses.replace(found, best=(dataclasses.replace(found.winner, config=other), *found.best))
    monkeypatch.setattr(searching, "search", lambda *_, **__: won)
    file, said = tmp_path / "winner.flags", []
    asked = SimpleNamespace(budget_minutes=0.0, winner=str(file), json=None)
    assert searching.run_search(asked, large, TOPOLOGY, options=None, log=said.append) == 0

    def words(typed):  # in a folder where a pattern would find something
        (tmp_path / "a").touch()
        command = ["bash", "-c", f"printf '%s\\n' {typed}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()

    assert applied(large, words(f"$(cat {file})")) == other
    line = next(line for line in said if line.startswith("add to maxlm train: "))
    assert applied(large, words(line.partition(": ")[2])) == other


def test_compiled_figures_rank_and_the_time_is_kept(large):
    clock = iter(range(0, 100_000, 10)).__next__  # every look at the clock is 10 s later
    asked = []

    def judge(candidate, topology, seconds, whole):  # finds every later candidate faster, and the first too large
        assert 0 <= seconds < 400
        if not whole:
            asked.append(candidate)
        place = asked.index(candidate)
        return Verdict(1e15 if place == 0 else 1e9, 10.0 - place, {}, whole)

    found = search(large, TOPOLOGY, judge, budget_seconds=400.0, clock=clock)
    assert 2 <= len(asked) <= COMPILED + 1 and not found.late
    assert found.winner.config == asked[-1] and found.winner.verdict is not None
    assert asked[0] not in [ranked.config for ranked in found.best if ranked.verdict]


def test_a_first_compilation_that_takes_too_long_is_ended_and_the_model_answers(large):
    def judge(candidate, topology, seconds, whole):
        assert seconds < 60.0 and not whole
        raise OutOfTime("enough")

    found = search(large, TOPOLOGY, judge, budget_seconds=60.0)
    assert found.late and all(ranked.verdict is None and not ranked.refused for ranked in found.best)
    assert found.winner.seconds == min(ranked.seconds for ranked in found.best)


def test_without_a_compiler_the_model_answers_alone(large, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(maxlm.plan.compile, "_installed", lambda package: False)
    file, said = tmp_path / "config.py", tmp_path / "plan.json"
    file.write_text(source(large))
    code = cli.main(["plan", f"--config={file}", f"--topology={TOPOLOGY.name}", f"--json={said}", "--price=2"])
    out = " ".join(capsys.readouterr().out.split())
    guess, told = Estimator(large, TOPOLOGY)(large), json.loads(said.read_text())
    assert code == 1 and not guess.fits and not told["fits"]  # keeps everything; it needs remat
    assert "libtpu has to be installed" in out and "answers alone: within 3% of the compiler" in out
    assert "these changes would make it fit" in out
    assert told["memory"]["total"] == pytest.approx(guess.memory.total)
    assert told["forecast"]["seconds"] == pytest.approx(guess.time.total) and not told["compiled"]
    assert told["dollars"] == pytest.approx(told["days"] * 24 * 8 * 2)
    assert told["days"] == pytest.approx(large.train.steps * guess.time.total / 86_400)
    mesh = SimpleNamespace(size=TOPOLOGY.devices)  # the report of a run reads it as it does a compiled plan
    run = SimpleNamespace(workdir=tmp_path, setup=SimpleNamespace(mesh=mesh), device_bytes=None, log=pytest.fail)
    found = foretold(run)
    assert found == Foretold(TOPOLOGY.name, guess.time.total, pytest.approx(guess.memory.total), None)


def test_of_phases_the_heaviest_is_judged(large):
    phases = {"long": PhaseConfig(from_step=9_000, sequence_length=32_768, batch_size=8)}
    phased = dataclasses.replace(
        large,
        data=dataclasses.replace(large.data, phases=phases),
        train=dataclasses.replace(large.train, steps=10_000),
    )
    longer = dataclasses.replace(
        large, data=dataclasses.replace(large.data, sequence_length=32_768, batch_size=8, phases={})
    )
    estimator = Estimator(large, TOPOLOGY)
    assert estimator(phased) == estimator(longer) != estimator(large)
    said = figures(phased, TOPOLOGY, estimator(phased), price=None)
    assert (said["rows"], said["positions"]) == (8, 32_768)
    assert said["phase"] == "steps 9,000 to 9,999, the heaviest of the run's 2 phases"
    assert 1_000 < said["run_steps"] < 1_000 + 9_000 / 2  # a short step has half the tokens, and cheaper ones


def test_what_cannot_fit_is_told_the_smallest_slice_that_can(large):
    small = parse_topology("v5e-4")
    there = resolve(
        dataclasses.replace(large, parallel=ParallelConfig(data=1, fsdp=4), eval=EvalConfig(batch_size=4)), devices=4
    )
    with pytest.raises(SearchError, match=r"does not fit v5e-4: .* the smallest slice that can hold it is v5e-\d+"):
        search(there, small, None, budget_seconds=0.0)


def test_where_none_of_the_leanest_fits_none_of_the_candidates_does(large):
    """Of every mesh, one of them takes as little as any."""
    judge, least = Estimator(large, TOPOLOGY), [{}, {}]
    for place, ways in enumerate((leanest, candidates)):
        for one in ways(large, TOPOLOGY):
            mesh, held = tuple(one.parallel.sizes.values()), judge(one).memory.total
            least[place][mesh] = min(least[place].get(mesh, math.inf), held)
    assert least[0].keys() == least[1].keys()
    for mesh, held in least[0].items():
        assert held == pytest.approx(least[1][mesh], rel=0.01), mesh


def test_three_changes_that_fit_are_named_with_their_cost(large):
    assert not Estimator(large, TOPOLOGY)(large).fits
    changes = cheapest(large, TOPOLOGY)
    assert len(changes) == 3 and [c.slower for c in changes] == sorted(c.slower for c in changes)
    for change in changes:
        after = applied(large, change.overrides)
        assert Estimator(large, TOPOLOGY)(after).fits, change.words
    assert all("--config." in line and "GiB" in line for line in sentences(changes))


def test_changes_keep_to_what_several_slices_can_share_out(large, monkeypatch):
    monkeypatch.setattr(maxlm.plan.changes, "SHOWN", 100)
    sizes = {"data": 2, "fsdp": 4}
    there = dataclasses.replace(large, parallel=dataclasses.replace(large.parallel, **sizes))
    found = {
        name: [change.words for change in cheapest(there, parse_topology(name), usable=200e9)]
        for name in ("v5p-16", "2*v5p-8")
    }
    assert any("from data" in words for words in found["v5p-16"])
    assert found["2*v5p-8"] and not any("from data" in words for words in found["2*v5p-8"])


def test_a_known_need_scales_the_model(large):
    full = dataclasses.replace(large, train=dataclasses.replace(large.train, remat="full"))
    need = 2 * Estimator(full, TOPOLOGY)(full).memory.total
    usable = 1.2 * Estimator(full, TOPOLOGY)(full).memory.total
    assert all(change.bytes <= usable for change in cheapest(full, TOPOLOGY, needs=need, usable=usable))


def test_a_run_that_ran_out_is_told_of_nothing_that_takes_more(large, monkeypatch):
    """Though by the model it would have fitted: the model is known to be wrong there."""
    full = dataclasses.replace(large, train=dataclasses.replace(large.train, remat="full"))
    before = Estimator(full, TOPOLOGY)(full).memory.total
    one = SimpleNamespace(
        platform="tpu", device_kind=CHIPS["v5p"].kinds[0], memory_stats=lambda: {"bytes_limit": 2 * before}
    )
    monkeypatch.setattr(shortage, "jax", SimpleNamespace(devices=lambda: [one] * 8, local_devices=lambda: [one] * 8))
    monkeypatch.setattr(maxlm.plan.changes, "SHOWN", 100)
    lines = [line for line in shortage._advice(full) if "--config." in line]
    assert lines
    for line in lines:
        after = applied(large, shlex.split(line[line.index("--config.") :]) + ["--config.train.remat=full"])
        assert Estimator(full, TOPOLOGY)(after).memory.total < before, line


def test_every_policy_is_one_that_resolve_takes():
    for remat in ALL_REMATS:
        resolve(dataclasses.replace(config(), train=dataclasses.replace(config().train, remat=remat)))


def test_every_candidate_has_the_devices_and_the_tokens(large):
    for candidate in candidates(large, TOPOLOGY):
        product = 1
        for size in candidate.parallel.sizes.values():
            product *= size
        assert product == TOPOLOGY.devices
        assert candidate.data == large.data
