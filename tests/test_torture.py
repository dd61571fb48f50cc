"""Three faults at a real training of two processes, and nothing lost; and that the torture itself sees what is lost."""

import json
import random
import shutil
import types

import pytest

from maxlm.train.goodput import FILE_NAME as LEDGER
from maxlm.train.metrics import FILE_NAME as METRICS
from tools import torture
from tools.torture_costs import costed, simulated
from tools.torture_run import Lost, newest

SILENCE = 6
FAULTS = "kill_one,stop_one,terminate"
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torture")
    # Of this seed one fault comes with the first checkpoint, one at the start and one with the next checkpoint.
    command = ["--processes=2", f"--steps={STEPS}", f"--faults={FAULTS}", f"--silence={SILENCE}", "--seed=235"]
    assert torture.main([*command, f"--keep={folder}", f"--json={folder / 'found.json'}"]) == 0
    return folder


def test_three_faults_lose_nothing_and_each_is_seen_in_time(folder):
    found = json.loads((folder / "found.json").read_text())
    assert found["rounds"] == 1 and 0 < found["effective_share"] < 1
    # The run may be through before the last fault comes.
    assert 2 <= found["faults"] <= 3 and set(found["by_kind"]) <= set(FAULTS.split(","))
    assert max(found["by_kind"]["stop_one"]["seconds_until_left"]) < SILENCE + 20
    assert max(found["by_kind"]["kill_one"]["seconds_until_left"]) < 20  # the machine may be busy
    assert found["faults"] - 1 <= found["restarts"] <= found["faults"]  # SIGTERM may find a run that is through


def test_a_simulation_with_what_was_measured_foretells_the_goodput(folder):
    """Of three faults only the size can be held: one of them warns the run, and loses nothing."""
    found = json.loads((folder / "found.json").read_text())["simulated"]
    assert 0 < found["measured"] < 1 and found["apart"] < 1.0
    assert 0 < found["write"] < 20 and 0 < found["stall"] < 20 and 0 < found["mtbf"] < 200 and found["restart"] > 2


STEP, STALL, WRITE, START, WARMING = 0.5, 0.4, 1.5, 12.0, 3.0


def made_up_run(folder, *, steps, mean, every):
    """A run that failures end at random, event by event: its ledger and the moments of its failures."""
    draw, now, saved, records, faults = random.Random(1), 1000.0, 0, [], []
    while saved < steps:
        begun, dies = now, now + START + WARMING + draw.expovariate(1 / mean)
        base = {"process": len(faults) + 1, "begun": begun, "start_step": saved}
        seconds = {"start": 4.0, "restore": 3.0, "compile": 5.0, "step": WARMING, "checkpoint_stall": 0.0}
        now, step, commits = begun + START + WARMING, saved, []
        while now + STEP < dies and step < steps:
            now, step = now + STEP, step + 1
            seconds["step"] += STEP
            mark = step % every == 0
            if mark:
                commits.append((now + WRITE, step))
                now, seconds["checkpoint_stall"] = now + STALL, seconds["checkpoint_stall"] + STALL
            if mark or step % 2:  # in between it has beaten now and then
                records.append({**base, "time": now, "step": step, "seconds": dict(seconds), "mark": mark})
        if step == steps:
            records.append({**records[-1], "time": now + 60, "seconds": {**seconds, "evaluation": 60.0}})
            break
        faults.append(dies)
        saved = max([at for when, at in commits if when <= dies], default=saved)
        now = dies
        if not records or records[-1]["process"] != base["process"]:
            records.append({**base, "time": begun + START, "step": saved, "seconds": seconds, "mark": False})
    lines = [json.dumps({"kind": "step", "step": n + 1, "seconds": STEP}) for n in range(steps)]
    (folder / METRICS).write_text("".join(f"{line}\n" for line in lines))
    return records, faults


def test_the_costs_of_a_run_are_found_in_its_ledger(tmp_path):
    records, faults = made_up_run(tmp_path, steps=4000, mean=20.0, every=8)
    run = costed(tmp_path, records, faults, every=8)._replace(writes=[WRITE])
    found = simulated([run])
    assert len(faults) > 100
    assert found.every == 8 * STEP and found.stall == pytest.approx(STALL) and found.write == WRITE
    # Starts that were ended before their first step, half a second long, count as parts of the next.
    assert found.restart == pytest.approx(START + WARMING, rel=0.05) and found.mtbf == pytest.approx(20.0, rel=0.2)
    assert found.apart < 0.05  # a few hundred failures
    assert simulated([run._replace(writes=[])]) is None


def test_too_little_torture_fails():
    asked = types.SimpleNamespace(least_faults=30, least_restarts=15, most_apart=0.5)
    enough = {"faults": 30, "restarts": 15, "simulated": {"apart": 0.5}}
    assert torture.shortcomings(enough, asked) == []
    (said,) = torture.shortcomings(enough | {"faults": 29}, asked)
    assert said == "29 faults, and at least 30 were asked for"
    (said,) = torture.shortcomings(enough | {"restarts": 14}, asked)
    assert said == "14 restarts, and at least 15 were asked for"
    (said,) = torture.shortcomings(enough | {"simulated": {"apart": 0.51}}, asked)
    assert "51% apart, and at most 50%" in said
    assert torture.shortcomings(enough | {"simulated": None}, asked)


@pytest.fixture
def two(folder, tmp_path):
    """A tortured run and an undisturbed one that are equal, and what compares them."""
    for name in ("whole", "run"):
        shutil.copytree(folder / "whole", tmp_path / name)
    judge = torture.Torture(tmp_path, 2, random.Random(0), print, steps=STEPS)
    judge.compare(tmp_path / "run", tmp_path / "whole", elastic=False)
    return judge, tmp_path / "run", tmp_path / "whole"


@pytest.mark.parametrize(
    ("field", "elastic", "message"),
    [
        ("batch", True, "other steps or tokens"),
        ("loss", False, "other losses at 1 steps"),
        ("loss", True, "other losses"),
    ],
)
def test_another_token_or_loss_is_seen(two, field, elastic, message):
    judge, run, whole = two
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    record = next(line for line in lines if line["kind"] == "step" and line["step"] == 7)
    record[field] = record[field] * (1 + 1e-3) if field == "loss" else record[field] ^ 1
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(Lost, match=message):
        judge.compare(run, whole, elastic=elastic)


def test_another_bit_of_the_state_is_seen(two):
    judge, run, whole = two
    assert newest(run) == STEPS
    judge.steps = STEPS - 4  # an earlier state stands for another one
    with pytest.raises(Lost, match="final state"):
        monkey = torture.digests
        try:
            torture.digests = lambda workdir, step: monkey(workdir, step if workdir == run else STEPS)
            judge.compare(run, whole, elastic=False)
        finally:
            torture.digests = monkey


@pytest.mark.parametrize(
    ("kind", "there", "booked"),
    [
        ("flip_store", False, "kill_all"),
        ("truncate_store", False, "kill_all"),
        ("truncate_checkpoint", False, "kill_all"),
        ("flip_checkpoint", False, "kill_all"),
        ("flip_checkpoint", True, "flip_checkpoint"),
    ],
)
def test_what_found_nothing_to_damage_is_booked_as_what_it_was(two, tmp_path, kind, there, booked):
    judge, run, _ = two
    judge.draw = types.SimpleNamespace(choice=lambda of: of[0], uniform=lambda low, high: 0.0, randrange=lambda n: 0)
    killed: list[str] = []
    company = types.SimpleNamespace(
        workdir=run if there else tmp_path / "nothing yet",
        processes=[None, None],
        running=lambda: True,
        kill=lambda: killed.append(kind),
    )
    judge.throw(kind, company)
    assert [fault.kind for fault in judge.thrown] == [booked] and killed == [kind]


@pytest.mark.parametrize(
    ("codes", "named", "sound"),
    [
        ([1, 1], True, True),
        ([1, 69], True, True),
        ([69, 1], True, False),
        ([1, -6], True, False),
        ([75, 75], True, False),
        ([1, 0], True, False),
        ([1, 1], False, False),
    ],
)
def test_a_damaged_store_has_to_be_refused_with_the_right_code(tmp_path, monkeypatch, codes, named, sound):
    judge = torture.Torture(tmp_path, 2, random.Random(0), print)
    shard = tmp_path / "data" / "a" / "train-00000.bin"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"whole")
    refused = types.SimpleNamespace(wait=lambda: codes, said=lambda: f"{shard.name if named else ''} is damaged")
    monkeypatch.setattr(judge, "start", lambda workdir, processes: refused)
    company = types.SimpleNamespace(workdir=tmp_path, processes=[None, None], kill=lambda: None)
    if sound:
        assert judge.damage_store(company, lambda data, _: b"torn")
    else:
        with pytest.raises(Lost, match="the damaged store was not refused"):
            judge.damage_store(company, lambda data, _: b"torn")
    assert shard.read_bytes() == b"whole"


@pytest.mark.parametrize(
    ("said", "codes", "sound"),
    [
        ("compiled the step", [75, 75], True),
        ("compiled the step", [75, 69], False),
        ("", [75, 69], True),
        ("", [75, 1], False),
    ],
)
def test_a_wrong_code_after_sigterm_is_seen(tmp_path, said, codes, sound):
    judge = torture.Torture(tmp_path, 2, random.Random(0), print)
    victim = types.SimpleNamespace(send_signal=lambda number: None)
    company = types.SimpleNamespace(processes=[victim] * 2, said=lambda: said, wait=lambda: codes)
    if sound:
        judge.terminate(company)
    else:
        with pytest.raises(Lost, match="after SIGTERM"):
            judge.terminate(company)


def test_a_second_that_no_bucket_has_is_seen(two):
    judge, run, _ = two
    path = run / LEDGER
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["seconds"]["step"] += 2.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(Lost, match="the ledger of run has"):
        judge.account(run)
