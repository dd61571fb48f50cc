import jax.numpy as jnp
import numpy as np

from maxlm.optim.average import update_average


def test_average_is_the_weighted_sum_of_the_past_in_float32():
    rng = np.random.default_rng(0)
    history = rng.normal(size=(6, 4)).astype(np.float32)
    average = {"a": jnp.asarray(history[0])}
    for params in history[1:]:
        average = update_average(average, {"a": jnp.asarray(params)}, 0.8)
    weights = np.array([0.8**5] + [0.2 * 0.8 ** (5 - i) for i in range(1, 6)])
    np.testing.assert_allclose(average["a"], weights @ history, rtol=1e-5, atol=1e-6)
    narrow = update_average(average, {"a": jnp.ones(4, jnp.bfloat16)}, 0.8)
    assert narrow["a"].dtype == jnp.float32


def test_an_average_of_constant_parameters_is_those_parameters():
    params = {"a": jnp.asarray([0.1, -3.7e-5, 1e9], jnp.float32)}
    assert (update_average(params, params, 0.999)["a"] == params["a"]).all()


def test_no_average_stays_none():
    assert update_average({}, {"a": jnp.ones(3)}, 0.9) == {}
