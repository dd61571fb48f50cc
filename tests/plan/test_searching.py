"""A search and its time: what is compiled in it, how far, and what is told of the config that it began with."""

import re

import pytest
from rich.console import Console

from maxlm.plan import compile as compiling
from maxlm.plan import search as search_module
from maxlm.plan import searching
from maxlm.plan.analytic import Estimate
from maxlm.plan.analytic.memory import Memory
from maxlm.plan.analytic.timing import Time
from maxlm.plan.search import Verdict, against_own, search
from maxlm.plan.topology import parse_topology
from tests.plan.test_plan import tiny
from tests.plan.test_search import guessed, unlike

MESHES = (
    {"data": 8},
    {"data": 4, "fsdp": 2},
    {"data": 2, "fsdp": 4},
    {"fsdp": 8},
    {"data": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "context": 4},
)


class Compilers:
    """Judges of as many meshes as there are, the fastest first by the model, in seconds that pass on a clock.

    Until the memory is laid out a compilation takes 50 s, to the end 200 s, and a step takes `seconds` of its mesh.
    """

    def __init__(self, monkeypatch, *seconds, too_large=None):
        self.now, self.asked, self.seconds, self.too_large = 0.0, [], seconds, too_large
        self.topology = parse_topology("v5e-8")
        self.ways = [tiny(batch=64, **mesh) for mesh, _ in zip(MESHES, seconds, strict=False)]
        guess = Memory({"state": 1.0}, "")
        pairs = [
            (one, Estimate(guess, Time({"products": 1.0 + place}), 1.0, 1.0)) for place, one in enumerate(self.ways)
        ]
        monkeypatch.setattr(search_module, "judged_candidates", lambda config, there, ways=None: iter(pairs))

    def __call__(self, config, topology, *, seconds, whole):
        place, takes = self.ways.index(config), 200.0 if whole else 50.0
        self.asked.append((place, whole))
        self.now += min(takes, seconds)
        if takes > seconds:
            raise compiling.OutOfTime("it was ended")
        usable = topology.chip.usable_bytes
        size = 1.1 * usable if self.too_large == (place, whole) else 0.5 * usable
        return Verdict(size, self.seconds[place], {}, whole)

    def search(self, place, *, minutes):
        """From the config that is the candidate of this place."""
        config = self.ways[place] if place is not None else unlike(self.ways[0])
        return search(config, self.topology, self, budget_seconds=60 * minutes, clock=lambda: self.now)


def test_ten_minutes_compile_a_handful_by_one_rule_and_then_the_winner_to_the_end(monkeypatch):
    judge = Compilers(monkeypatch, 5.0, 4.0, 3.2, 4.5, 3.9, 3.8, 3.7, 4.0)
    found = judge.search(7, minutes=10)
    # The config itself before all others, of which as many as there may be.
    assert judge.asked == [(7, False), *((place, False) for place in range(6)), (2, True)]
    assert found.winner.config == judge.ways[2] and found.ended.whole and not found.winner.verdict.whole
    assert not found.late and found.own.config == judge.ways[7] and found.own.verdict.seconds == 4.0
    assert found.over_own == pytest.approx(1.25)
    assert "the winner is 25.0% faster than the config itself (data 2 x context 4" in against_own(found, judge.topology)
    assert [row["own"] for row in searching.as_json(found, judge.ways[7], judge.topology)["best"]].count(True) == 1


@pytest.mark.parametrize(
    ("minutes", "asked", "late", "ended"),
    [
        (0.5, [(1, False)], True, False),  # ended while it compiles the config itself
        (1.5, [(1, False)], True, False),  # one more would not be done
        (2.9, [(1, False), (0, False), (2, False)], True, False),
        (5, [(1, False), (0, False), (2, False), (3, False), (3, True)], False, False),  # ended while it does that
        (8, [(1, False), (0, False), (2, False), (3, False), (3, True)], False, True),
    ],
)
def test_a_search_says_when_its_time_was_over_before_it_was_done(minutes, asked, late, ended, monkeypatch, capsys):
    judge = Compilers(monkeypatch, 5.0, 4.0, 3.8, 3.7)
    found = judge.search(1, minutes=minutes)
    assert (judge.asked, found.late, found.ended is not None) == (asked, late, ended)
    verdicts = {place: judge.seconds[place] for place, _ in asked} if minutes > 0.5 else {}
    best = min(verdicts, key=verdicts.get, default=0)
    assert found.winner.config == judge.ways[best]  # what was laid out is kept, however the rest went
    searching.print_found(found, judge.topology, Console())
    said = capsys.readouterr().out
    assert ("the time was over after" in said) == late and ("by FLOPs and bytes" in said) == bool(verdicts)


def test_what_does_not_fit_when_it_is_compiled_to_the_end_does_not_win(monkeypatch):
    judge = Compilers(monkeypatch, 5.0, 4.0, 3.8, too_large=(2, True))
    found = judge.search(None, minutes=60)
    assert judge.asked[-2:] == [(2, True), (1, True)]
    assert found.winner.config == judge.ways[1] and found.ended.seconds == 4.0
    assert judge.ways[2] not in [ranked.config for ranked in found.best]


def test_the_config_itself_is_told_of_wherever_it_stands(monkeypatch, capsys):
    judge = Compilers(monkeypatch, *[3.0] * 7, 9.0)
    found = judge.search(7, minutes=10)
    assert judge.ways[7] not in [ranked.config for ranked in found.best]  # it is the seventh
    searching.print_found(found, judge.topology, Console())
    assert re.search(r"^ *config .*9\.000", capsys.readouterr().out, re.M)
    told = searching.as_json(found, judge.ways[7], judge.topology)
    assert told["own"]["seconds"] == 9.0 and told["own"]["overrides"] == [] and told["over_own"] == pytest.approx(3)
    one = Compilers(monkeypatch, 3.0, 4.0, too_large=(1, False)).search(1, minutes=10)
    assert "the config itself does not fit: it takes " in against_own(one, judge.topology)
    assert against_own(Compilers(monkeypatch, 3.0, 4.0).search(0, minutes=10), judge.topology).endswith("is the winner")
    early = Compilers(monkeypatch, 3.0, 4.0).search(0, minutes=1)
    assert against_own(early, judge.topology).endswith("is the winner: nothing else was compiled that fits")
    assert against_own(Compilers(monkeypatch, 3.0, 4.0).search(None, minutes=10), judge.topology) == ""


def test_a_near_twin_of_the_config_itself_is_compiled(monkeypatch):
    topology, asked = parse_topology("v5e-8"), []
    config, ways = guessed(monkeypatch, topology, 0.5, 0.6)

    def judge(candidate, there, *, seconds, whole):
        asked.append(candidate)
        return Verdict(1.0, 2.0 if candidate == ways[0] else 1.0, {}, True)

    assert search(config, topology, judge, budget_seconds=60.0).winner.config == ways[1]
    assert asked == ways
