"""A step's time and memory on this machine's CPUs: what is measured in small, and what is made of it."""

import dataclasses
import runpy
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.model.flops import count_matmul_flops
from maxlm.plan import forecast as forecasting
from maxlm.plan.collectives import Traffic
from maxlm.plan.forecast import Rates, calibrate, forecast
from maxlm.resolve import resolve
from maxlm.train.watermark import Watermark
from tests.plan.test_analytic import LENGTH, ROWS, config
from tests.runs import ROOT

RATES = Rates(
    products=1e9,
    attend=1.0,
    attend_back=2.0,
    loss=0.0,
    elementwise=1e9,
    optimizer=0.0,
    meet=0.01,
    send=1e8,
    scratch=5.0,
    seconds=0.0,
)


@pytest.fixture(autouse=True)
def keep_the_allocator(monkeypatch):
    """Of this process, whose other tests are faster with it as it is."""
    monkeypatch.setattr(forecasting, "give_back_at_once", lambda: None)


@pytest.mark.parametrize(
    ("mesh", "train"),
    [
        ({}, {}),
        ({}, {"accumulation": 2}),
        ({"fsdp": 4, "pipeline": 2}, {"accumulation": 2}),
        ({"fsdp": 4, "context": 2}, {}),
        ({"fsdp": 2, "context": 2, "pipeline": 2}, {"accumulation": 4}),
        ({"fsdp": 4, "tensor": 2}, {}),
    ],
)
def test_on_cpus_every_row_is_attended_to_once_a_layer(mesh, train):
    resolved = config(mesh=mesh, remat="none", **train)
    parts = forecast(resolved, RATES, device_bytes=0.0, traffic=[]).parts
    # The rates are of the heads of one device.
    assert parts["attention"] == pytest.approx(ROWS * 2 * (1.0 + 2.0) * mesh.get("tensor", 1))


@pytest.mark.parametrize("context", [1, 2])
def test_attention_on_cpus_is_measured_on_whole_rows(context, monkeypatch):
    measured = []

    def note(function, *args, seconds):
        measured.append((jax.eval_shape(function, *args), [x.shape for x in args]))
        return 1.0

    monkeypatch.setattr(forecasting, "_measured", note)
    calibrate(config(mesh={"fsdp": 8 // context, "context": context}), seconds=0.0)
    attended = [shapes for _, shapes in measured if len(shapes[0]) == 4]
    assert attended == [[(1, LENGTH, 8, 16), (1, LENGTH, 2, 16), (1, LENGTH, 2, 16)]] * 2


def test_collectives_and_scratch_are_in_a_forecast_for_cpus():
    rows = [Traffic("all-reduce", ("fsdp",), count=3.0, payload=4e6, wire=7e6, exposed=4e6, asked=())]
    foretold = forecast(config(mesh={"fsdp": 8}), RATES, device_bytes=100.0, traffic=rows)
    assert foretold.parts["collectives"] == pytest.approx(3 * 0.01 + 4e6 / 1e8)
    assert foretold.bytes == 8 * (100 + 5)


def test_a_sum_over_devices_is_measured_where_they_are():
    few, many = forecasting._exchanges(jax.device_count(), 0.05)
    assert 0 < few < 1 and 0 < many < 1
    assert forecasting._exchanges(1, 0.05) == forecasting._exchanges(2 * jax.device_count(), 0.05) == (0, 0)


def test_what_a_kernel_takes_beside_its_plan_is_measured():
    def hidden(x):  # no plan knows of what is made here
        return jax.pure_callback(lambda x: np.ones(2**23, np.float32).sum() * 0 + x, x, x)

    x = jnp.ones(())
    with_much, without = (forecasting._beside(function, x) for function in (hidden, jnp.sin))
    if Watermark().growth() is not None:  # where the system tells
        assert without < 2**24 < 2**25 * 0.9 < with_much < 2**26


def test_a_kernel_is_measured_in_the_time_that_it_is_given():
    began = time.perf_counter()
    few, many = (forecasting._measured(lambda x: x @ x, jnp.ones((n, n)), seconds=0.1) for n in (32, 512))
    assert 0 < few < many < 1 and time.perf_counter() - began < 30


def test_attention_on_cpus_is_measured_with_every_window_of_the_layers(monkeypatch):
    base = config(layers=3)
    attention = dataclasses.replace(base.model.attention, windows=(16, 0))  # two layers of the one, one of the other
    resolved = dataclasses.replace(base, model=dataclasses.replace(base.model, attention=attention))
    took = iter([1.0, 4.0, 3.0, 10.0])  # forward with each, and there and back

    def measured(function, *args, seconds):
        return next(took) if args[0].ndim == 4 else 1.0

    monkeypatch.setattr(forecasting, "_measured", measured)
    rates = calibrate(resolved, seconds=0.0)
    assert rates.attend == pytest.approx(2 / 3 * 1 + 1 / 3 * 4)
    assert rates.attend + rates.attend_back == pytest.approx(2 / 3 * 3 + 1 / 3 * 10)
    assert next(took, None) is None


def counted(monkeypatch, resolved):
    """The rates of a machine that makes 1e9 products' FLOPs a second and does all else at once, with what it ran."""
    ran = []

    def measured(function, *args, seconds):
        flops = count_matmul_flops(jax.make_jaxpr(function)(*args))
        ran.append(([x.shape for x in args], flops))
        return flops / 1e9 or 1.0

    monkeypatch.setattr(forecasting, "_measured", measured)
    monkeypatch.setattr(forecasting, "_beside", lambda *_: 0.0)
    return calibrate(resolved, seconds=0.0), ran


def recipe(name, *, devices, **changes):
    """A config of the house on so many devices."""
    given = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    for section, values in changes.items():
        given[section].update(values)
    return resolve(given, devices=devices)


@pytest.mark.parametrize(("window", "length"), [(0, LENGTH), (0, 8192), (64, 8192)])
def test_what_is_measured_in_part_has_the_rates_of_the_whole(window, length, monkeypatch):
    base = config(mesh={"fsdp": 2})
    attention = dataclasses.replace(base.model.attention, windows=(window,))
    resolved = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, attention=attention),
        data=dataclasses.replace(base.data, sequence_length=length),
    )
    with monkeypatch.context() as patch:
        patch.setattr(forecasting, "FLOPS", 1e15)
        whole, ran = counted(monkeypatch, resolved)
    with monkeypatch.context() as patch:
        patch.setattr(forecasting, "FLOPS", 4e6)
        patch.setattr(forecasting, "POSITIONS", 64)
        part, less = counted(monkeypatch, resolved)
    assert part.products == pytest.approx(whole.products) and part.loss == pytest.approx(whole.loss)
    for name in ("attend", "attend_back"):  # but for the first positions of a row
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=0.05)
    assert all(a[1] < b[1] for a, b in zip(less, ran, strict=True) if b[1])


def test_calibrating_a_large_model_takes_no_longer_than_the_recipe_that_it_is_tuned_on(monkeypatch):
    large = recipe("gpt2_124m", devices=8, train={"precision": "float32"})
    _, ran = counted(monkeypatch, large)
    assert max(flops for _, flops in ran) < 2 * forecasting.FLOPS
    assert max(int(np.prod(shape)) for shapes, _ in ran for shape in shapes) * 4 < 2 * forecasting.UNCACHED
    longest = dataclasses.replace(large, data=dataclasses.replace(large.data, sequence_length=32_768))
    _, ran = counted(monkeypatch, longest)
    assert max(flops for _, flops in ran) < 2 * forecasting.FLOPS


@pytest.mark.parametrize("devices", [1, 8])
def test_a_model_as_small_as_the_quickstarts_is_measured_whole(devices, monkeypatch):
    _, ran = counted(monkeypatch, recipe("quickstart", devices=devices, parallel={"data": devices}))
    rows = 8 // devices
    shapes = [shapes for shapes, _ in ran]
    assert [(rows, 256, 128), (128, 384), (rows, 256, 384)] in shapes
    assert [(rows, 256, 128), (128, 4096)] in shapes
    assert [(1, 256, 2, 64)] * 3 in shapes


def test_what_is_done_to_logits_is_of_the_loss_alone():
    """Which is measured with it: elementwise work grows with the vocabulary by the head's entries, not by a token's."""

    def elementwise(vocab, rows):
        given = config()
        model = dataclasses.replace(given.model, vocab_size=vocab)
        data = dataclasses.replace(given.data, batch_size=rows)
        resolved = dataclasses.replace(given, model=model, data=data)
        return forecast(resolved, RATES, device_bytes=0.0, traffic=[]).parts["elementwise"]

    grown = [elementwise(8192, rows) - elementwise(512, rows) for rows in (ROWS, 4 * ROWS)]
    assert grown[0] == pytest.approx(grown[1]) and grown[0] >= 0
    assert elementwise(512, 4 * ROWS) > 2 * elementwise(512, ROWS)


def test_every_layer_that_predicts_further_tokens_has_a_loss():
    rates, tokens = RATES._replace(loss=1e-6), ROWS * LENGTH
    for more in (0, 2):
        parts = forecast(config(mtp=more), rates, device_bytes=0.0, traffic=[]).parts
        assert parts["loss"] == pytest.approx((1 + more) * tokens * 1e-6)
