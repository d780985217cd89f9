"""Timing of programs in turns, and predicting what would take too long."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.compare.timing import compile_pass, exponent, in_turns, predict

pytestmark = pytest.mark.quick


def test_the_exponent_of_a_power_law():
    assert exponent({length: 3e-6 * length**1.37 for length in (256, 1024, 8192)}) == pytest.approx(1.37)
    assert exponent({256: 1.0}) is None


@pytest.mark.parametrize(
    ("known", "length", "expected"),
    [
        ({}, 4096, None),
        ({1024: 0.5}, 2048, 4.0),  # one point: cubic
        ({1024: 0.5, 2048: 2.0}, 8192, 32.0),  # quadratic goes on
        ({512: 9.0, 1024: 0.5, 2048: 2.0}, 4096, 8.0),  # the last two count
        ({1024: 0.5, 2048: 0.4}, 4096, 0.8),  # nothing gets cheaper: at least linear
        ({1024: 0.5, 2048: 50.0}, 4096, 400.0),  # nor steeper than cubic
        ({1024: 0.5, 2048: 2.0}, 1024, None),  # shorter lengths only
    ],
)
def test_the_prediction_continues_the_growth(known, length, expected):
    assert predict(known, length) == (None if expected is None else pytest.approx(expected))


def test_turns_are_taken_as_long_as_the_time_lasts(monkeypatch):
    """A clock that a slow call moves by 8 s and a quick one by 1 s; the warm-up counts only where it is alone."""
    clock, calls = [0.0], []

    def call(name, *durations):
        durations = iter(durations)

        def run():
            calls.append(name)
            clock[0] += next(durations)

        return run

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    runs = {"slow": call("slow", 8, 8, 8), "quick": call("quick", 9, 1, 2, 1), "slowest": call("slowest", 19)}
    assert in_turns(runs, 3, max_seconds=20) == {"slow": 8, "quick": 1, "slowest": 19}
    assert calls == ["slow", "quick", "slowest", "slow", "quick", "quick", "quick"]


def test_a_pass_returns_the_output_and_all_gradients():
    arrays = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.float32(2)}
    call = lambda arrays, shift: jnp.sin(arrays["a"]) * arrays["b"] + shift  # noqa: E731
    run, temporary_bytes = compile_pass("forward_backward", call, arrays, jnp.float32(1))
    out, (gradients,) = run()
    np.testing.assert_allclose(out, 2 * np.sin(arrays["a"]) + 1, rtol=1e-6)
    cotangent = jax.random.normal(jax.random.key(1), (2, 3))
    np.testing.assert_allclose(gradients["a"], 2 * np.cos(arrays["a"]) * cotangent, rtol=1e-5)  # float32
    np.testing.assert_allclose(gradients["b"], np.vdot(np.sin(arrays["a"]), cotangent), rtol=1e-5)
    assert temporary_bytes >= 0
    forward, _ = compile_pass("forward", call, arrays, jnp.float32(1))
    np.testing.assert_allclose(forward(), out, rtol=1e-6)
