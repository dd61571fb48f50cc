"""The report is made of metrics.jsonl and a few facts; its numbers are those of the run."""

import json
import math
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest

from maxlm.config import Config
from maxlm.eval.baselines import Baselines
from maxlm.train.finish import foretold
from maxlm.train.goodput import BUCKETS, Summary
from maxlm.train.metrics import MetricsWriter
from maxlm.train.report import Facts, Foretold, Sample, write_report

BASELINES = Baselines(
    xz=1.546, xz_joined=1.318, zlib=1.621, zlib_joined=1.556, documents=38, bytes=789089, sampled=False
)
COST = {"flops_6n": 6e6, "flops_causal": 7e6, "peak_flops": 1e11, "peak_source": "measured", "devices": "2 CPU cores"}


def facts(**changes):
    seconds = dict.fromkeys(BUCKETS, 0.0) | {"start": 2.0, "compile": 8.0, "step": 90.0}
    values = dict(
        name="quick",
        parameters=1_234_567,
        model={"layers": 4, "optimizer": "a|b"},
        baselines=BASELINES,
        samples=[Sample("def ", "f():\n    return 1"), Sample("# ", "a ``` fence and \ud800 half a pair")],
        goodput=Summary(
            seconds=seconds, fractions={k: v / 100 for k, v in seconds.items()}, wall=100.0, down=5.0, processes=2
        ),
        train_command="maxlm train --config=quick.py --workdir=runs/quick",
        generate_command="maxlm generate --workdir=runs/quick --prompt='def '",
        extra={"compile_seconds": 8.0},
    )
    return Facts(**{**values, **changes})


def step(out, number, **changes):
    out.write("step", number, {"loss": 3.0, "tokens": 1000, "seconds": 0.5, "accepted": True, **changes})


def evaluation(out, number, store="stdlib", bits=1.7, size=1000):
    values = {"bits_per_byte": bits, "nats_per_token": 3.1, "documents": 3, "bytes": size, "tokens": 99, "seconds": 1.0}
    out.write("evaluation", number, {"store": store, **values})


@pytest.fixture
def run(tmp_path):
    """A run killed after step 6 and continued from step 4 on a machine of twice the speed."""
    with MetricsWriter(tmp_path, Config(), process_index=0) as out:
        out.truncate(0)
        out.write("cost", 0, COST)
        for number in range(1, 7):
            step(out, number, loss=4.0 - number / 10)
        evaluation(out, 4, bits=1.9)
    with MetricsWriter(tmp_path, Config(), process_index=0) as out:
        out.truncate(4)
        out.write("cost", 4, {**COST, "peak_flops": 2e11, "devices": "8 x TPU v5p", "peak_source": "data sheet"})
        for number in range(5, 11):
            refused = number == 7
            step(out, number, seconds=0.25, loss=math.nan if refused else 3.0, accepted=not refused)
        evaluation(out, 10, bits=1.7)
    return tmp_path


def strict(path):
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


def test_figures_are_those_of_the_whole_run(run):
    returned = write_report(run, facts())
    figures = strict(run / "report.json")
    assert figures == returned
    assert (figures["steps"], figures["updates"], figures["tokens"]) == (10, 9, 10_000)
    assert figures["train_seconds"] == pytest.approx(4 * 0.5 + 6 * 0.25)
    assert figures["tokens_per_second"] == pytest.approx(10_000 / 3.5)
    # The work over what either machine could have done in its own seconds.
    possible = 2.0 * 1e11 + 1.5 * 2e11
    assert figures["mfu_6n"] == pytest.approx(10_000 * 6e6 / possible)
    assert figures["mfu_causal"] == pytest.approx(10_000 * 7e6 / possible)
    assert figures["devices"] == ["2 CPU cores", "8 x TPU v5p"]
    assert figures["heldout_bits_per_byte"] == 1.7
    assert figures["xz_bits_per_byte"] == 1.546 and figures["xz_joined_bits_per_byte"] == 1.318
    assert figures["zlib_bits_per_byte"] == 1.621 and figures["zlib_joined_bits_per_byte"] == 1.556
    assert figures["wall_seconds"] == sum(figures["goodput"].values()) == 100.0
    assert figures["train_loss"] == 3.0 and figures["parameters"] == 1_234_567
    assert figures["samples"][0] == {"prompt": "def ", "text": "f():\n    return 1"}
    assert figures["compile_seconds"] == 8.0


def test_the_page_says_what_a_reader_wants_to_know(run):
    write_report(run, facts())
    page = (run / "report.md").read_text()
    for words in (
        "1,234,567 parameters",
        "2 CPU cores, then 8 x TPU v5p",
        "10 steps (1 refused)",
        "**1.7000 bits per byte**",
        "(loss.png)",
        "| `xz -9` | 1.318 | all files joined |",
        "| `zlib -9` | 1.621 | file by file |",
        "| compile | 0:08 | 8.0% |",
        "in 2 pieces, with 0:05 between them",
        "a\\|b",
        "maxlm generate --workdir=runs/quick",
        "```\ndef f():\n    return 1\n```",
        "````\n# a ``` fence",  # a longer fence around a text that has one
    ):
        assert words in page, words


def test_nothing_is_left_beside_the_report(run):
    write_report(run, facts())
    write_report(run, facts())
    assert {path.name for path in run.iterdir()} == {
        "metrics.jsonl", "tensorboard", "loss.png", "report.md", "report.json",
    }  # fmt: skip


def test_an_old_report_outlives_a_failure(run, monkeypatch):
    write_report(run, facts())
    before = {name: (run / name).read_bytes() for name in ("report.md", "report.json", "loss.png")}

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run, facts(name="other"))
    assert before == {name: (run / name).read_bytes() for name in before}


def test_several_stores_are_pooled_by_bytes(run):
    with MetricsWriter(run, Config(), process_index=0) as out:
        out.truncate(10)
        evaluation(out, 10, bits=1.6, size=3000)  # again, on more documents: the last counts
        evaluation(out, 10, store="books", bits=2.0, size=1000)
    figures = write_report(run, facts())
    assert figures["heldout_bits_per_byte"] == pytest.approx((1.6 * 3000 + 2.0 * 1000) / 4000)
    assert figures["heldout"]["books"]["bits_per_byte"] == 2.0
    assert "all stores | 1.7 |" in (run / "report.md").read_text()
    with MetricsWriter(run, Config(), process_index=0) as out:
        out.truncate(20)
        evaluation(out, 20, bits=1.5, size=3000)  # continued with this store's evaluation alone
    figures = write_report(run, facts())
    assert figures["heldout_bits_per_byte"] == 1.5 and list(figures["heldout"]) == ["stdlib"]


def test_an_unknown_or_impossible_peak_leaves_mfu_out(tmp_path):
    for peak_flops in (None, 1e9):  # 1000 tokens of 6e6 FLOPs in half a second are 1.2e10 FLOP/s
        with MetricsWriter(tmp_path, Config(), process_index=0) as out:
            out.truncate(0)
            out.write("cost", 0, {**COST, "peak_flops": peak_flops})
            step(out, 1)
        figures = write_report(tmp_path, facts())
        assert figures["mfu_6n"] is None and figures["mfu_causal"] is None
        assert figures["tokens_per_second"] == 2000


def test_steps_on_an_unknown_machine_leave_mfu_out(tmp_path):
    with MetricsWriter(tmp_path, Config(), process_index=0) as out:
        out.truncate(0)
        for number, peak_flops in ((1, None), (2, 1e11)):
            out.write("cost", number - 1, {**COST, "peak_flops": peak_flops})
            step(out, number)
    assert write_report(tmp_path, facts())["mfu_6n"] is None  # the work of step 1 has nothing to be held against


def test_a_run_without_anything_still_has_a_report(tmp_path):
    figures = write_report(tmp_path, facts(baselines=None, samples=[]))
    assert figures["heldout_bits_per_byte"] is None and figures["tokens_per_second"] is None
    assert figures["xz_bits_per_byte"] is None and figures["steps"] == 0
    strict(tmp_path / "report.json")
    assert "## Samples" not in (tmp_path / "report.md").read_text()


def test_extra_figures_cannot_replace_one_of_the_report(run):
    with pytest.raises(ValueError, match="'steps'"):
        write_report(run, facts(extra={"steps": 3}))


def test_the_plot_is_a_picture_and_changes_with_the_run(run):
    write_report(run, facts())
    first = (run / "loss.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", first[16:24])
    assert width > 2 * height > 800
    write_report(run, facts(baselines=BASELINES._replace(xz=1.2)))
    assert (run / "loss.png").read_bytes() != first


def test_plotting_is_not_paid_for_at_the_start_of_a_run():
    code = "import sys; import maxlm.train.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_forecast_stands_beside_what_came(tmp_path):
    with MetricsWriter(tmp_path, Config(), process_index=0) as out:
        out.truncate(0)
        out.write("cost", 0, COST)
        for number, seconds in enumerate((9.0, 0.5, 0.4), start=1):
            step(out, number, seconds=seconds)
    said = Foretold(hardware="cpu-8", seconds=0.4, device_bytes=3 * 2**30, device_bytes_held=4 * 2**30)
    figures = write_report(tmp_path, facts(foretold=said))
    assert figures["foretold"]["seconds_taken"] == 0.5  # the median: the first step waits for the compiler
    page = (tmp_path / "report.md").read_text()
    assert "| a step | 0.4 | 0.5 | 0.80 |" in page and "| 3 | 4 | 0.75 |" in page and "cpu-8" in page
    assert "Forecast" not in write_page(tmp_path, facts())


def test_of_phases_the_steps_that_the_plan_is_of_are_measured(tmp_path):
    with MetricsWriter(tmp_path, Config(), process_index=0) as out:
        out.truncate(0)
        out.write("cost", 0, COST)
        for number, seconds in enumerate((1.0,) * 9 + (30.0, 4.0, 4.0, 4.0, 2.0), start=1):
            step(out, number, seconds=seconds)
    said = Foretold(hardware="cpu-8", seconds=4.0, device_bytes=3.0, device_bytes_held=None)
    figures = write_report(tmp_path, facts(foretold=said, foretold_steps=range(10, 14)))
    assert figures["foretold"]["seconds_taken"] == 4.0 and figures["train_seconds"] == 53.0


def test_a_machine_counts_that_has_made_a_step_and_every_save_that_failed(tmp_path):
    """A start that was killed before its first step has left its cost, at the step where the next one begins."""
    for devices, failed in (("2 CPU cores", None), ("4 x H100", 7), ("8 x H100", None)):
        with MetricsWriter(tmp_path, Config(), process_index=0) as out:
            out.truncate(5 if devices == "8 x H100" else 0)
            out.write("cost", 5 if devices == "8 x H100" else 0, {**COST, "devices": devices})
            for number in range(1, 9) if failed else ():
                step(out, number)
                if number in (3, failed):
                    out.write("checkpoint_failed", number, {"reason": "no room", "in_row": 1})
    figures = write_report(tmp_path, facts())
    assert figures["steps"] == 5 and figures["devices"] == ["4 x H100"]
    assert figures["failed_saves"] == 2  # that after step 5, too, where the run went on
    assert "**Saves that failed: 2**" in (tmp_path / "report.md").read_text()


def test_a_plan_for_other_devices_is_no_forecast_of_the_run(tmp_path):
    said = []
    mesh = SimpleNamespace(size=1)
    run = SimpleNamespace(workdir=tmp_path, setup=SimpleNamespace(mesh=mesh), device_bytes=4.0, log=said.append)
    assert foretold(run) is None and not said  # there is none
    plan = {"forecast": {"seconds": 0.4}, "memory": {"total": 3}, "topology": "cpu-8", "devices": 8}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert foretold(run) is None
    assert len(said) == 1 and said[0].startswith("plan.json is for 8 devices, and the run has 1: ")
    mesh.size = 8
    assert foretold(run) == Foretold("cpu-8", 0.4, 3.0, 4.0) and len(said) == 1
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"phase": "steps 3 to 4"}))
    assert foretold(run).hardware == "cpu-8 (steps 3 to 4)"


@pytest.mark.parametrize(
    ("content", "says"), [("{", "JSONDecodeError"), ('{"seconds": 1}', "KeyError: 'forecast'"), ("[]", "list")]
)
def test_a_plan_that_cannot_be_read_is_said_to_be_none(tmp_path, content, says):
    said = []
    run = SimpleNamespace(
        workdir=tmp_path, setup=SimpleNamespace(mesh=SimpleNamespace(size=1)), device_bytes=4.0, log=said.append
    )
    (tmp_path / "plan.json").write_text(content)
    assert foretold(run) is None
    assert len(said) == 1 and "plan.json is no plan that can be read" in said[0] and says in said[0]


def write_page(folder, given):
    write_report(folder, given)
    return (folder / "report.md").read_text()
