"""Three faults at a real training of two processes, and nothing lost; and that the torture itself sees what is lost."""

import json
import random
import shutil
import types

import pytest

from maxlm.train.goodput import FILE_NAME as LEDGER
from maxlm.train.metrics import FILE_NAME as METRICS
from tools import torture
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


def test_a_second_that_no_bucket_has_is_seen(two):
    judge, run, _ = two
    path = run / LEDGER
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["seconds"]["step"] += 2.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(Lost, match="the ledger of run has"):
        judge.account(run)
