"""Token mixers of any class, small, as compiled programs, and the promises about padding that each has to keep."""

from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION

FEATURES, HEADS, SHORT, LONG = 16, 2, 24, 40
LENGTHS = (24, 11, 0)  # real tokens of the three examples: full, padded, nothing but padding
BUDGET = 8  # below SHORT, so that the methods approximate


def make(cls, *, features=FEATURES, **options):
    """A mixer of the class `cls`, of the smallest sizes at which a method is one."""
    return cls(features, **{"heads": HEADS, "max_len": LONG, "rngs": nnx.Rngs(0)} | cls.within(BUDGET) | options)


@cache
def program(cls, **options):
    """The mixer's parameters, and its compiled forward pass (params, x, mask, key) -> out."""
    graphdef, params = nnx.split(make(cls, **options))
    return params, jax.jit(lambda params, x, mask, key: nnx.merge(graphdef, params)(x, mask=mask, key=key))


@cache
def derivatives(cls, **options):
    """The mixer's parameters, and (params, x, mask, w) -> out, gradients by params and by x of Σ out · w, compiled."""
    params, forward = program(cls, **options)

    def run(params, x, mask, w):
        out, pull = jax.vjp(lambda params, x: forward(params, x, mask, None), params, x)
        return out, *pull(w)

    return params, jax.jit(run)


def tokens(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def right_padded(lengths, length):
    return np.arange(length) < np.asarray(lengths)[:, None]


def assert_same(ours, theirs, tolerance=1e-5):
    """Equal up to rounding, of float32 unless said otherwise: sums over other paddings may be grouped otherwise."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max(initial=1.0))


def longer(x, seed):
    """`x` `[3, SHORT, features]` and other tokens behind it, up to LONG; NaN without a seed."""
    rest = (len(x), LONG - SHORT, x.shape[2])
    return np.concatenate([x, np.full(rest, np.nan, x.dtype) if seed is None else tokens(seed, *rest)], axis=1)


def scattered(x):
    """The real tokens of `x` in their order anywhere among LONG, large ones between them; and the mask."""
    among, mask = 50 * tokens(1, len(x), LONG, x.shape[2]), np.zeros((len(x), LONG), bool)
    for b, n in enumerate(LENGTHS):
        places = np.sort(np.random.default_rng(b).choice(LONG, n, replace=False))
        among[b, places], mask[b, places] = x[b, :n], True
    return among, mask


def check_padding(cls, **options):
    """Asserts that an output depends on the real tokens of its own example alone, wherever they stand."""
    params, forward = program(cls, **options)
    x, mask = tokens(0, 3, SHORT, FEATURES), right_padded(LENGTHS, SHORT)
    out = np.asarray(forward(params, x, mask, None))
    assert np.isfinite(out).all()
    assert (out[~mask] == 0).all()
    assert np.abs(out[mask]).max() > 1e-3

    for other in (100 * tokens(1, *x.shape), np.nan):
        other_contents = np.where(mask[..., None], x, other).astype(np.float32)
        assert_same(np.asarray(forward(params, other_contents, mask, None))[mask], out[mask])

    other_examples = np.stack([x[1], 10 * tokens(3, SHORT, FEATURES), x[0]])
    swapped = np.asarray(forward(params, other_examples, mask[[1, 0, 0]], None))
    assert_same(swapped[0], out[1])
    assert_same(swapped[2], out[0])

    further = np.asarray(forward(params, longer(x, 2), right_padded(LENGTHS, LONG), None))
    assert_same(further[:, :SHORT][mask], out[mask])
    among, places = scattered(x)
    assert_same(np.asarray(forward(params, among, places, None))[places], out[mask])


def firsts(names):
    """The first of the names in each family."""
    return {ATTENTION[name].family: name for name in reversed(names)}.values()


# Of those that draw nothing, and so compute each example by itself, one of each family.
SHARED = [name for name, cls in ATTENTION.items() if cls.draws or name in firsts(ATTENTION)]


def one_of_a_family(names):
    """Parametrises over the names, of which all but the first of each family are slow."""
    first = firsts(names)
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[] if name in first else pytest.mark.slow) for name in names]
    )
