"""The whole layer of S4D, against its convolution as the authors write it, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from efficient_tx.attention import S4D, s4d
from tests.support.mixers import assert_same, tokens

FEATURES, STATES, LENGTH = 6, 8, 150


def kernels(mixer):
    """The kernel of every direction, `[directions, features, LENGTH]`: a Vandermonde product."""
    rate = -np.exp(np.asarray(mixer.log_rate[...], np.float64)) + 1j * np.asarray(mixer.frequency[...])
    step = np.exp(np.asarray(mixer.log_step[...], np.float64))[:, None]
    readout = np.asarray(mixer.readout_real[...]) + 1j * np.asarray(mixer.readout_imag[...])
    weights = readout * (np.exp(rate * step) - 1) / rate
    return 2 * np.einsum("bdn,dnt->bdt", weights, np.exp((rate * step)[..., None] * np.arange(LENGTH))).real


def layer(mixer, x, causal):
    """One sequence: the convolutions by Fourier transforms, the second of later tokens; then GELU, product and GLU."""
    k = kernels(mixer)
    kernel = np.concatenate([k[0], np.zeros_like(k[0]) if causal else k[1][:, ::-1]], axis=1)
    spectrum = np.fft.rfft(kernel, axis=1) * np.fft.rfft(x.T, 2 * LENGTH, axis=1)
    y = np.fft.irfft(spectrum, 2 * LENGTH, axis=1)[:, :LENGTH].T + np.asarray(mixer.skip[...]) * x
    y = y * (1 + erf(y / 2**0.5)) / 2
    first, second = np.split(y @ np.asarray(mixer.out.kernel[...]) + np.asarray(mixer.out.bias[...]), 2, axis=1)
    return first / (1 + np.exp(-second))


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_convolution_of_its_authors(causal):
    mixer = S4D(FEATURES, states=STATES, causal=causal, rngs=nnx.Rngs(0))
    mixer.out.bias[...] = jnp.asarray(tokens(3, 2 * FEATURES))
    x = tokens(0, 2, LENGTH, FEATURES)
    out = nnx.jit(lambda mixer, x: mixer(x))(mixer, x)
    for got, one in zip(out, x):
        assert_same(got, layer(mixer, one.astype(np.float64), causal), 2e-5)  # float32, sums of 150 terms


@pytest.mark.quick
def test_initial_values_are_those_of_the_authors():
    mixer = S4D(512, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.exp(mixer.log_rate[...]), 0.5, rtol=1e-6)
    np.testing.assert_allclose(mixer.frequency[3], np.pi * np.arange(32), rtol=1e-6)
    step = np.exp(np.asarray(mixer.log_step[...]))
    assert 0.001 <= step.min() * 1.001 < 0.0012 and 0.085 < step.max() <= 0.1001
    assert np.median(step) == pytest.approx(0.01, rel=0.3)  # 512 draws, log-uniform over two decades
    power = np.square(mixer.readout_real[...]) + np.square(mixer.readout_imag[...])
    assert power.shape == (2, 512, 32) and power.mean() == pytest.approx(1, rel=0.03)  # a complex normal, 2^15 draws


@pytest.mark.quick
@pytest.mark.parametrize("states", [0, 7])
def test_states_are_pairs(states):
    with pytest.raises(ValueError, match=f"states is {states}: they are conjugate pairs: an even number, at least 2"):
        S4D(FEATURES, states=states, rngs=nnx.Rngs(0))


@pytest.mark.quick
def test_arrays_that_do_not_fit_are_refused():
    def call(rate, readout, **options):
        given = {"rate": rate, "readout": readout, "step": np.ones(3, np.float32), "skip": np.ones(3, np.float32)}
        arrays = {name: jax.ShapeDtypeStruct(np.shape(value), jnp.float32) for name, value in given.items()}

        def run(x, **arrays):
            return s4d(x, **arrays, **options)

        return jax.eval_shape(run, jax.ShapeDtypeStruct((1, 5, 3), jnp.float32), **arrays)

    call(np.ones((3, 2)), np.ones((1, 3, 2)), causal=True)
    with pytest.raises(ValueError, match=r"readout has shape \(1, 3, 2\): .* here \(2, 3, 2\)"):
        call(np.ones((3, 2)), np.ones((1, 3, 2)))
    with pytest.raises(ValueError, match=r"rate has shape \(4, 2\): .* here 3 features"):
        call(np.ones((4, 2)), np.ones((2, 4, 2)))
