"""The progress line is honest: time on completed steps, no MFU above the peak, pauses left out."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.train.progress import Cost, Progress, Reading, format_duration, format_line


class Clock:
    """Time that moves only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def tick(self, seconds):
        self.now += seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


COST = Cost(flops_6n=6e6, flops_causal=7e6, peak_flops=1e10)
VALUES = {"loss": 2.5, "learning_rate": 3e-4, "grad_norm": 0.5, "accepted": True}


def progress(clock, *, total=100, start=0, log_every=10, cost=COST, stream=None):
    return Progress(total_steps=total, start_step=start, log_every=log_every, cost=cost, stream=stream, clock=clock)


def run(bar, clock, steps, *, seconds=0.5, tokens=500):
    for step in steps:
        clock.tick(seconds)
        reading = bar.update(step, tokens=tokens, **VALUES)
    return reading


def test_speed_is_of_completed_steps():
    clock = Clock()
    with progress(clock) as bar:
        reading = run(bar, clock, range(1, 11))
    assert reading.seconds == pytest.approx(0.5)
    assert reading.tokens_per_second == pytest.approx(1000)
    assert reading.mfu_6n == pytest.approx(0.6)
    assert reading.mfu_causal == pytest.approx(0.7)
    assert reading.eta_seconds == pytest.approx(90 * 0.5)
    assert bar.train_seconds == pytest.approx(5)


def test_pauses_are_no_training_time_but_count_for_the_end():
    clock = Clock()
    with progress(clock) as bar:
        run(bar, clock, range(1, 6))
        with bar.paused():
            clock.tick(3)
            with bar.paused():  # an evaluation that saves
                clock.tick(2)
            clock.tick(0)
            assert bar.train_seconds == pytest.approx(2.5)
        reading = run(bar, clock, range(6, 11))
    assert bar.train_seconds == pytest.approx(5)
    assert reading.seconds == pytest.approx(0.5)
    assert reading.tokens_per_second == pytest.approx(1000)
    assert reading.eta_seconds == pytest.approx(90 * 0.5 * 2)  # as much paused as trained so far


def test_what_does_not_come_again_is_not_expected_again():
    clock = Clock()
    with progress(clock) as bar:
        with bar.once():
            clock.tick(60)
        reading = run(bar, clock, range(1, 6))
        assert reading.eta_seconds == pytest.approx(95 * 0.5) and bar.train_seconds == pytest.approx(2.5)
        with bar.paused():
            clock.tick(2.5)
        with bar.once():
            clock.tick(30)
        reading = run(bar, clock, range(6, 11))
    assert reading.seconds == pytest.approx(0.5) and reading.eta_seconds == pytest.approx(90 * 0.5 * 1.5)


def test_another_cost_counts_from_its_own_steps_on():
    clock = Clock()
    with progress(clock) as bar:
        run(bar, clock, range(1, 11))
        bar.renew(Cost(flops_6n=3e6, flops_causal=4e6, peak_flops=1e10))
        reading = run(bar, clock, range(11, 13), seconds=0.25)
    assert reading.tokens_per_second == pytest.approx(2000)
    assert (reading.mfu_6n, reading.mfu_causal) == (pytest.approx(0.6), pytest.approx(0.8))


def test_a_step_cannot_be_reported_in_a_pause():
    clock = Clock()
    with progress(clock) as bar, bar.paused(), pytest.raises(RuntimeError, match="step 1 .* before pausing"):
        bar.update(1, tokens=1, **VALUES)


def test_speed_follows_the_recent_past():
    clock = Clock()
    with progress(clock, total=10_000) as bar:
        run(bar, clock, range(1, 101), seconds=1.0)
        reading = run(bar, clock, range(101, 201), seconds=0.25)
    assert reading.tokens_per_second == pytest.approx(2000)


@settings(deadline=None, database=None)
@given(
    steps=st.lists(st.tuples(st.floats(1e-4, 1e3), st.floats(0, 1e9)), min_size=1, max_size=20),
    peak_flops=st.none() | st.floats(1.0, 1e18),
)
def test_mfu_is_never_above_the_peak(steps, peak_flops):
    clock = Clock()
    cost = Cost(flops_6n=6e6, flops_causal=7e6, peak_flops=peak_flops)
    with progress(clock, cost=cost) as bar:
        for step, (seconds, tokens) in enumerate(steps, 1):
            clock.tick(seconds)
            reading = bar.update(step, tokens=tokens, **VALUES)
            for mfu, flops in ((reading.mfu_6n, 6e6), (reading.mfu_causal, 7e6)):
                if mfu is None:
                    assert peak_flops is None or reading.tokens_per_second * flops > peak_flops
                else:
                    assert 0 <= mfu <= 1


def test_a_log_gets_lines_every_log_every_steps_the_first_and_the_last():
    clock, log = Clock(), io.StringIO()
    with progress(clock, total=25, start=3, log_every=10, stream=log) as bar:
        run(bar, clock, range(4, 26))
    lines = log.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [4, 10, 20, 25]
    assert {len(line) for line in lines[:-1]} == {len(lines[0])}  # aligned
    assert lines[-1] == (
        "step 25/25 100.0%  loss  2.500  lr 3.00e-4  grad   0.500  1.00k tok/s  MFU 60.0% 6N 70.0% causal  ETA 0:00"
    )


def test_a_refused_update_is_shown():
    clock, log = Clock(), io.StringIO()
    with progress(clock, stream=log) as bar:
        clock.tick(1)
        run(bar, clock, [1])
        clock.tick(1)
        bar.update(2, tokens=1, loss=float("nan"), learning_rate=0.0, grad_norm=float("inf"), accepted=False)
    assert log.getvalue().splitlines()[1] == "step 2: update refused (loss nan, gradient norm inf)"


def test_a_terminal_gets_a_bar_and_notes_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    clock, screen = Clock(), Terminal()
    with progress(clock, total=25, stream=screen) as bar:
        run(bar, clock, range(1, 25))
        bar.note("held-out 1.700")
        run(bar, clock, [25])
    shown = screen.getvalue()
    assert "━" in shown and "held-out 1.700" in shown and "25/25 100.0%" in shown
    assert "\x1b[" in shown  # redrawn in place


def test_other_processes_measure_in_silence(capsys):
    clock = Clock()
    with progress(clock, stream=None) as bar:
        assert run(bar, clock, range(1, 11)).tokens_per_second == pytest.approx(1000)
        bar.note("x")
    assert capsys.readouterr() == ("", "")


@settings(database=None)
@given(
    total=st.integers(1, 9_999_999),
    part=st.floats(0, 1),
    loss=st.floats(0, 99) | st.just(float("nan")),
    lr=st.just(0.0) | st.floats(1e-99, 1),
    grad=st.floats(0, 3e38) | st.sampled_from([float("nan"), float("inf")]),
    rate=st.floats(0, 9e11),
    mfu=st.none() | st.floats(0, 0.99),
    eta=st.floats(0, 3e7),
)
def test_lines_fit_into_120_columns(total, part, loss, lr, grad, rate, mfu, eta):
    reading = Reading(seconds=1.0, tokens_per_second=rate, mfu_6n=mfu, mfu_causal=mfu, eta_seconds=eta)
    step = int(part * total)
    line = format_line(step, total=total, loss=loss, learning_rate=lr, grad_norm=grad, reading=reading)
    assert len(line) <= 119


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0:00"), (59.6, "1:00"), (3599.6, "1:00:00"), (360_000, "4d04h"), (float("inf"), "–")],
)
def test_durations(seconds, words):
    assert format_duration(seconds) == words
