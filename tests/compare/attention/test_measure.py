"""What is measured of a variant: the right function, the right error, and no call that takes too long."""

import inspect

import jax
import numpy as np
import pytest

from efficient_tx.attention import ATTENTION
from efficient_tx.compare.attention import inputs
from efficient_tx.compare.attention.measure import Settings, case, errors, may_be_too_slow, rungs
from tests.support.mixers import one_of_a_family

TINY = Settings((16, 32), budget=8, batch=2, heads=2, head_dim=4, rounds=1, error_length=32)


def test_what_may_be_slow_is_tried_on_shorter_inputs_first():
    assert [rungs(*pair) for pair in ((0, 256), (0, 1024), (1024, 4096), (256, 16384))] == [[], [256], [], [1024, 4096]]
    assert may_be_too_slow({"forward": {}, "forward_backward": {}}, 1024, 20)
    assert may_be_too_slow({"forward": {256: 0.1}, "forward_backward": {256: 0.4}}, 1024, 20)
    assert not may_be_too_slow({"forward": {256: 0.1}, "forward_backward": {256: 0.3}}, 1024, 20)


@one_of_a_family(list(ATTENTION))
def test_every_variant_can_be_measured(name):
    """Its function, or module, takes what inputs.py makes for it; the output has the shape of the values."""
    given = inputs.tokens("random", 2, 16, 2, 4)
    call, arrays, *others = case(name, given, TINY)
    out = jax.eval_shape(call, arrays, *others)
    assert out.shape == ((2, 16, 2, 4) if ATTENTION[name].projections else (2, 16, 8))
    if ATTENTION[name].exact:
        assert "mask" in inspect.signature(ATTENTION[name].exact).parameters


def test_the_error_is_that_of_the_outputs():
    """V-mean against dense softmax attention, both in NumPy; an exact variant has none."""
    name, found = errors("vmean", TINY)
    assert name == "softmax"
    assert list(found) == list(inputs.FAMILIES)
    for family, error in found.items():
        q, k, v = (np.asarray(x, np.float64) for x in inputs.tokens(family, 2, 32, 2, 4).values())
        weights = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / 2)
        exact = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
        expected = np.linalg.norm(v.mean(axis=1, keepdims=True) - exact) / np.linalg.norm(exact)
        assert error == pytest.approx(expected, rel=1e-4)
    assert errors("softmax", TINY) == ("softmax", dict.fromkeys(inputs.FAMILIES, 0.0))
    assert errors("fourier", TINY) == (None, {})
