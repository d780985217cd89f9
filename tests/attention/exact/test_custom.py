"""custom: a score and a mask as a mixer's options; the arrays of the score as its parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import Custom, custom
from efficient_tx.kernels.flash_attention import Score, documents, padding, prefix, window
from efficient_tx.kernels.flash_attention.score import Alibi

LENGTH, HEADS, DIM = 9, 2, 4


@dataclasses.dataclass(frozen=True)
class Counted(Score):
    """Of integers, which nothing trains."""

    counts: Any = None


def arrays(seed):
    return np.random.default_rng(seed).normal(size=(3, 2, LENGTH, HEADS, DIM))


def formula(q, k, v, *, slopes, allowed):
    """softmax of s − slope · |i − j| over the keys that `allowed` `[batch, queries, keys]` names, one by one."""
    out = np.zeros_like(v)
    for b, i, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(allowed[b, i])
        weights = np.exp(k[b, seen, h] @ q[b, i, h] / DIM**0.5 - slopes[h] * np.abs(i - seen))
        out[b, i, h] = weights @ v[b, seen, h] / max(weights.sum(), 1e-300)
    return out


def test_the_function_takes_key_masks_and_masks():
    q, k, v = arrays(0)
    real = np.arange(LENGTH) < np.array([[LENGTH], [5]])
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    near = (abs(i - j) < 3) | (j < 2)
    slopes = np.array([0.5, 0.1])
    with jax.enable_x64(True):
        for mask, causal, allowed in (
            (real, False, real[:, None] & (i == i)),
            (real[:, None, None], True, real[:, None] & (j <= i)),
            ((window(3) | prefix(2)) & padding(real), False, near & real[:, None]),
            (window(3) | prefix(2), True, near & (j <= i)),
        ):
            out = custom(q, k, v, mask=mask, causal=causal, score=Alibi(slopes))
            expected = formula(q, k, v, slopes=slopes, allowed=np.broadcast_to(allowed, (2, LENGTH, LENGTH)))
            np.testing.assert_allclose(out, expected, atol=1e-12)  # sums of nine terms of order 1 in float64


def test_the_arrays_of_a_score_are_trained():
    """One slope a head, in float32; the gradient is that of the function."""
    mixer = Custom(HEADS * DIM, heads=HEADS, score="alibi", mask=window(4), rngs=nnx.Rngs(0))
    assert mixer.score.slopes.shape == (HEADS,) and mixer.score.slopes.dtype == jnp.float32
    np.testing.assert_allclose(mixer.score.slopes[...], [2**-4, 2**-8])  # the paper's for two heads
    x = np.random.default_rng(1).normal(size=(2, LENGTH, HEADS * DIM)).astype(np.float32)

    def by_hand(slopes):
        q, k, v = (layer(x).reshape(2, LENGTH, HEADS, DIM) for layer in (mixer.q, mixer.k, mixer.v))
        out = custom(q, k, v, mask=window(4), score=Alibi(slopes))
        return (mixer.out(out.reshape(x.shape)) ** 2).sum()

    expected = jax.grad(by_hand)(mixer.score.slopes[...])
    found = nnx.grad(lambda mixer: (mixer(x) ** 2).sum())(mixer)["score"]["slopes"][...]
    assert np.abs(expected).min() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # float32


@pytest.mark.slow
def test_positions_count_real_tokens():
    """A window of 1 sees the token itself: with padding between them too, and the prefix is the first real token."""
    mixer = Custom(8, heads=2, mask=window(1) | prefix(1), rngs=nnx.Rngs(0))
    x = np.random.default_rng(2).normal(size=(1, 5, 8)).astype(np.float32)
    mask = np.array([[False, True, False, True, True]])
    np.testing.assert_allclose(mixer(x, mask=mask)[mask], mixer(x[:, [1, 3, 4]])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "alibj"}, "score is 'alibj': choose one of softmax, .*alibi"),
        ({"score": Alibi(np.ones(3))}, r"score is 'Alibi.slopes': its shape is \(3,\): pass one number or \[heads"),
        (
            {"score": Counted(np.ones(2, np.int32))},
            "score is 'Counted.counts': it has dtype int32, and parameters are floating: hold a tuple",
        ),
        ({"mask": np.ones((2, 5), bool)}, "mask is 'ndarray': pass a Mask, as window"),
        ({"mask": documents(np.ones((1, 5), int))}, "mask is 'Documents': it holds arrays of tokens"),
    ],
)
def test_what_is_no_score_or_mask_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        Custom(8, heads=2, **options, rngs=nnx.Rngs(0))
