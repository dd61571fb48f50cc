"""A run that has too little memory says what would fit; any other error stays what it is."""

import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from maxlm.config import ACTIVATION_NAMES, REMAT_WORDS, MlpConfig
from maxlm.configfile import source
from maxlm.plan import candidates
from maxlm.plan import shortage as plan_shortage
from maxlm.plan.candidates import REMATS
from maxlm.plan.shortage import explained, is_shortage, topology_of
from maxlm.resolve import resolve
from tests.runs import ROOT
from tests.tiny import MODEL, tiny_config, write_corpus

# A hidden layer of 2 ** 19 tokens x 2 ** 13 dims in float32: 16 GiB, which a few microbatches bring down.
TOO_MUCH = {
    "model": MODEL.__class__(**vars(MODEL) | {"mlp": MlpConfig(dim=2**13)}),
    "data__batch_size": 2**13,
    "data__prefetch": 0,
    "train__loss_chunk": 2**12,
}


@pytest.fixture(scope="module")
def shortage():
    """What JAX really raises."""
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(jax.jit(lambda: jnp.zeros(2**48, jnp.uint8))())
    return caught.value


def test_only_a_shortage_is_taken_for_one(shortage):
    assert is_shortage(shortage)
    assert not is_shortage(ValueError("RESOURCE_EXHAUSTED"))


def test_it_names_changes_and_what_to_type(shortage, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "REMATS", ("none", "full"))  # each policy is traced, which takes seconds
    config = resolve(tiny_config(tmp_path, **TOO_MUCH), devices=8)
    text = str(explained(shortage, config))
    assert text.startswith("out of memory: RESOURCE_EXHAUSTED")
    assert "  1. " in text and text.count("--config.") >= 1 and "GiB a device" in text


def gpus(monkeypatch, **stats):
    """Eight devices of a kind that the table does not name."""
    one = SimpleNamespace(platform="gpu", device_kind="NVIDIA GeForce RTX 4090", memory_stats=lambda: stats or None)
    seen = SimpleNamespace(devices=lambda: [one] * 8, local_devices=lambda: [one] * 8, errors=jax.errors)
    monkeypatch.setattr(plan_shortage, "jax", seen)
    return resolve(tiny_config("corpus", **TOO_MUCH), devices=8)


def test_a_chip_that_the_table_does_not_name_is_told_changes_too(shortage, monkeypatch):
    monkeypatch.setattr(candidates, "REMATS", ("none", "full"))
    config = gpus(monkeypatch, bytes_limit=24 * 2**30)
    text = str(explained(shortage, config))
    assert text.startswith("out of memory: RESOURCE_EXHAUSTED") and "a device has 24.0 GiB" in text
    assert "  1. " in text and "--config." in text and "could not be found out" not in text


@pytest.mark.parametrize(("platform", "kind"), [("gpu", "NVIDIA H100 80GB HBM3"), ("tpu", "TPU7x"), ("cpu", "cpu")])
def test_a_process_asks_its_own_devices_for_their_memory(platform, kind):
    def elsewhere():
        raise RuntimeError("not addressable")

    mine = SimpleNamespace(platform=platform, device_kind=kind, slice_index=1, memory_stats=lambda: {"bytes_limit": 7})
    theirs = SimpleNamespace(platform=platform, device_kind=kind, slice_index=0, memory_stats=elsewhere)
    found = topology_of([theirs] * 4 + [mine] * 4, [mine] * 4)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found.chip.usable_bytes == (machine / 4 if platform == "cpu" else 7)
    assert (found.devices, found.slices) == (8, 2)


def test_memory_that_is_not_known_is_said_to_be_so(shortage, monkeypatch):
    text = str(explained(shortage, gpus(monkeypatch)))
    assert text.startswith("out of memory: RESOURCE_EXHAUSTED") and "RTX 4090 has is not known" in text


def test_the_shortage_is_told_whatever_becomes_of_the_advice(shortage, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(plan_shortage, "cheapest", broken)
    text = str(explained(shortage, gpus(monkeypatch, bytes_limit=1e9)))
    assert text.startswith("out of memory: RESOURCE_EXHAUSTED")
    assert "could not be found out (ZeroDivisionError: float division by zero)" in text


@pytest.mark.slow
def test_a_real_run_that_runs_out_says_so(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(source(tiny_config(write_corpus(tmp_path / "corpus"), **TOO_MUCH)))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "maxlm.cli", "train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, 24 * 2**30))

    found = subprocess.run(
        command, cwd=ROOT, env=environment, preexec_fn=limit, capture_output=True, text=True, timeout=900
    )
    assert found.returncode == 1
    assert "out of memory" in found.stderr and "1. " in found.stderr and "--config.train" in found.stderr
    assert "Traceback" not in found.stderr


def test_what_candidates_keep_has_a_name_in_the_model():
    policies = [remat for remat in REMATS if remat not in REMAT_WORDS]
    assert policies and {name for remat in policies for name in remat.split("+")} <= set(ACTIVATION_NAMES)
