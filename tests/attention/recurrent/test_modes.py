"""Convolutions with sums of exponentials, against the sums themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.attention.recurrent.modes import CHUNK, convolve
from tests.support.mixers import assert_same

BATCH, CHANNELS, MODES = 2, 3, 4


def given(length, complex_modes, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(BATCH, length, CHANNELS))
    rate, weight = -rng.uniform(0.001, 2, size=(CHANNELS, MODES)), rng.normal(size=(CHANNELS, MODES))
    state = rng.normal(size=(BATCH, CHANNELS, MODES))
    if complex_modes:
        rate, weight, state = (x + 1j * rng.normal(size=x.shape) for x in (rate, weight, state))
    return x, rate, weight, state


def loop(x, rate, weight, state):
    """Token by token, in float64; and the states after each."""
    y, states = np.zeros(x.shape), []
    for t in range(x.shape[1]):
        state = np.exp(rate) * state + x[:, t, :, None]
        y[:, t] = (weight * state).sum(-1).real
        states.append(state)
    return y, np.stack(states, axis=1)


@pytest.mark.parametrize("complex_modes", [False, True])
@pytest.mark.parametrize("length", [1, CHUNK, 2 * CHUNK + 5])
def test_equals_the_recurrence_from_any_state_to_any_count(length, complex_modes):
    x, rate, weight, state = given(length, complex_modes)
    y, states = loop(x, rate, weight, state)
    count = np.array([length, length // 2])
    run = jax.jit(convolve)
    with jax.enable_x64(True):
        out, end = run(x, rate, weight, state=state, count=count)
        assert_same(out, y, 1e-11)
        assert_same(end[0], states[0, -1], 1e-11)
        assert_same(end[1], state[1] if length == 1 else states[1, count[1] - 1], 1e-11)
        one, after = run(x[:, :1], rate, weight, state=state)
        assert_same(one, y[:, :1], 1e-11)
        assert_same(after, states[:, 0], 1e-11)
        first, between = run(x[:, :3], rate, weight, state=state)
        if length > 3:
            second, end = run(x[:, 3:], rate, weight, state=between)
            assert_same(np.concatenate([first, second], axis=1), y, 1e-11)
            assert_same(end, states[:, -1], 1e-11)


@pytest.mark.slow
def test_derivatives_are_those_of_the_sum():
    x, rate, weight, state = given(CHUNK + 3, True)
    length = x.shape[1]
    lag = np.arange(length)[:, None] - np.arange(length)

    def plain(x, rate, weight, state):
        kernel = jnp.einsum("dn,dnt->dt", weight, jnp.exp(rate[..., None] * np.arange(length))).real
        within = jnp.einsum("bsd,dts->btd", x, jnp.where(lag >= 0, kernel[:, np.maximum(lag, 0)], 0))
        before = jnp.exp(rate[..., None] * np.arange(1, length + 1)) * weight[..., None]
        return within + jnp.einsum("bdn,dnt->btd", state, before).real

    w = np.random.default_rng(1).normal(size=x.shape)
    with jax.enable_x64(True):
        ours = jax.jit(jax.grad(lambda *args: (w * convolve(*args[:3], state=args[3])[0]).sum(), (0, 1, 2, 3)))
        theirs = jax.jit(jax.grad(lambda *args: (w * plain(*args)).sum(), (0, 1, 2, 3)))
        for mine, other in zip(ours(x, rate, weight, state), theirs(x, rate, weight, state)):
            assert_same(mine, other, 1e-10)


def test_decays_that_end_at_once_and_never_stay_finite():
    """exp of their differences over a chunk would overflow."""
    x = given(3 * CHUNK, False)[0].astype(np.float32)
    rate = np.broadcast_to(np.float32([-200.0, -np.inf, 0.0, -1e-6]), (CHANNELS, MODES))
    out, pull = jax.vjp(lambda x, rate: convolve(x, rate, jnp.ones_like(rate))[0], x, rate)
    y, _ = loop(x.astype(np.float64), rate.astype(np.float64), np.ones(rate.shape), np.zeros((BATCH, CHANNELS, MODES)))
    assert_same(out, y)
    assert all(np.isfinite(leaf).all() for leaf in pull(np.ones_like(out)))


def test_later_tokens_change_no_bit():
    x, rate, weight, _ = given(CHUNK + 9, True)
    x, rate, weight = x.astype(np.float32), rate.astype(np.complex64), weight.astype(np.complex64)
    later = x.copy()
    later[:, CHUNK + 1 :] = 1e6
    run = jax.jit(lambda x: convolve(x, rate, weight)[0])
    np.testing.assert_array_equal(run(x)[:, : CHUNK + 1], run(later)[:, : CHUNK + 1])
