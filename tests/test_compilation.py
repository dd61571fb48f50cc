"""What CPU devices that work together need is set, and set before they start."""

import os
import subprocess
import sys

import jax
import pytest

from maxlm.chips import CHIPS
from maxlm.compilation import IN_ORDER, compiler_options, settle_cpu_devices

EIGHT = "--xla_force_host_platform_device_count=8"


@pytest.fixture
def settled(monkeypatch):
    def settled(flags, **environment):
        monkeypatch.delenv("NPROC", raising=False)
        monkeypatch.setenv("XLA_FLAGS", flags)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        settle_cpu_devices()
        settle_cpu_devices()  # changes nothing
        return os.environ.get("NPROC"), os.environ["XLA_FLAGS"]

    return settled


def test_several_devices_of_one_process_have_threads_and_an_order(settled):
    assert settled(EIGHT) == ("32", f"{EIGHT} {IN_ORDER}")


def test_one_device_alone_is_left_as_it_is(settled):
    assert settled("--xla_force_host_platform_device_count=1") == (None, "--xla_force_host_platform_device_count=1")
    assert settled("") == (None, "")


def test_several_processes_have_an_order(settled, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert settled("") == (None, IN_ORDER)


def test_what_the_user_has_set_stays(settled):
    other = f"{EIGHT} {IN_ORDER.replace('false', 'true')}"
    assert settled(other, NPROC="9") == ("9", other)


def test_only_steps_that_accumulate_on_a_tpu_do_without_the_pass_that_moves_their_sums():
    off = {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}
    for name, chip in CHIPS.items():
        alone = compiler_options(chip, accumulation=1)
        assert not set(off) & set(alone)
        assert compiler_options(chip, accumulation=2) == (alone | off if chip.platform == "tpu" else alone), name


@pytest.mark.parametrize(
    "module, call",
    [
        ("maxlm.train.run", "train(None, folder, log=print)"),
        ("maxlm.train.replay", "replay(folder, 1, log=print)"),
        ("maxlm.infer.load", "generate_from(Path(folder), module.Asked(['a'], 1, None, 0), log=print, write=print)"),
    ],
)
def test_commands_settle_before_jax_starts_its_devices(tmp_path, module, call):
    code = f"""
import sys
from pathlib import Path
import {module} as module
from jax._src import xla_bridge
folder = {str(tmp_path)!r}
def settle():
    print("started" if xla_bridge.backends_are_initialized() else "not started")
    sys.stdout.flush()
    raise SystemExit(0)
module.settle_cpu_devices = settle
module.{call}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("not started", 0), done.stderr[-500:]
