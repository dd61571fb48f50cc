"""The denominator of MFU."""

import types

import pytest

from maxlm.train import peak


def test_peaks_on_paper_are_those_of_the_facts():
    # TFLOP/s of a chip as published; a TPU7x chip is two JAX devices.
    published = {"TPU v5 lite": 197, "TPU v5p": 459, "TPU v6 lite": 918, "NVIDIA H100 80GB HBM3": 989.4}
    for kind, tera in published.items():
        platform = "tpu" if "TPU" in kind else "gpu"
        assert peak.peak_flops(platform, kind, "bfloat16") == tera * 1e12
    assert peak.peak_flops("tpu", "TPU7x", "bfloat16") * 2 == 2307e12
    # Float32 products lose no bits: not TF32's 494.7 there, and six products of bfloat16 parts on a TPU.
    assert peak.peak_flops("gpu", "NVIDIA H100 80GB HBM3", "float32") == pytest.approx(66.9e12)
    assert peak.peak_flops("tpu", "TPU v5p", "float32") == pytest.approx(76.5e12)
    assert peak.peak_flops("gpu", "something new", "bfloat16") is None
    assert peak.peak_flops("cpu", "cpu", "float32") is None


class Device:
    def __init__(self, platform, device_kind, process_index=0):
        self.platform, self.device_kind, self.process_index = platform, device_kind, process_index


def test_the_peak_of_a_run_is_that_of_all_devices(monkeypatch):
    v5p = [Device("tpu", "TPU v5p", i // 4) for i in range(8)]
    assert peak.run_peak(v5p, "bfloat16") == peak.Peak(flops=8 * 459e12, source="data sheet")
    assert peak.run_peak([*v5p, Device("tpu", "TPU v99")], "bfloat16") is None
    # Virtual CPU devices share the cores of their process: they do not multiply its peak, processes do.
    monkeypatch.setattr(peak, "measured_flops", lambda dtype: 1e11)
    cpus = [Device("cpu", "cpu", i // 4) for i in range(8)]
    assert peak.run_peak(cpus, "float32") == peak.Peak(flops=2e11, source="measured")
    assert peak.describe_devices(v5p) == "8 x TPU v5p"
    assert "8 devices, 2 processes" in peak.describe_devices(cpus)


def test_the_best_product_in_either_dtype_is_the_measured_peak(monkeypatch):
    # What the clock shows: once for the end of measuring, then before and after each product, then past the end.
    slow = [0.0, 0.0, 2.0, 2.0, 3.0, 3.0, 3.5, 99.0]
    fast = [100.0, 100.0, 101.0, 101.0, 101.25, 101.25, 104.0, 199.0]
    for readings in ([*slow, *fast], [*fast, *slow]):
        monkeypatch.setattr(peak, "time", types.SimpleNamespace(perf_counter=iter(readings).__next__))
        assert peak.measured_flops("bfloat16", size=8, seconds=50.0) == 2 * 8**3 / 0.25


def test_the_measured_peak_is_a_rate_of_this_machine():
    # From a slow phone core to a large server.
    assert 1e8 < peak.measured_flops("float32", size=256, seconds=0.02) < 1e14
