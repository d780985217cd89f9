"""Masks: which dtypes mean "real token", in every function of tokens that takes a mask."""

import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import efficient_tx.tokens
from efficient_tx.tokens.depthwise import depthwise, depthwise_grid
from efficient_tx.tokens.grid import lay_out, take_up
from efficient_tx.tokens.mask import bool_mask, compact, joined, key_mask, key_mask_or_pairs, spread, token_ranks
from efficient_tx.tokens.rotary import rotate
from efficient_tx.tokens.segments import grid_means, segment_means
from efficient_tx.tokens.short_conv import short_conv

pytestmark = pytest.mark.quick

REAL = np.array([[1, 1, 1, 0]])
X = np.ones((1, 4, 1, 2), np.float32)

# Every function of tokens with a mask.
FUNCTIONS = {
    bool_mask: bool_mask,
    key_mask: lambda mask: key_mask(mask, 1, 4),
    key_mask_or_pairs: lambda mask: key_mask_or_pairs(mask, X, X),
    token_ranks: lambda mask: token_ranks(mask, 1, 4),
    compact: lambda mask: compact(X, mask),
    joined: lambda mask: joined(mask, None, (1, 4)),
    spread: lambda mask: spread(X, mask),
    segment_means: lambda mask: segment_means(X, mask, 2),
    grid_means: lambda mask: grid_means(X, mask, 2),
    lay_out: lambda mask: lay_out(X, mask),
    take_up: lambda mask: take_up(X.reshape(1, 2, 2, 2), mask, 4),
    rotate: lambda mask: rotate(X, mask),
    short_conv: lambda mask: short_conv(X[:, :, 0], jnp.ones((3, 2)), mask),
    depthwise: lambda mask: depthwise(X, jnp.ones((3, 1)), mask),
    depthwise_grid: lambda mask: depthwise_grid(X, jnp.ones((3, 3, 1)), mask),
}


every = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def test_the_list_is_whole():
    modules = [f"efficient_tx.tokens.{module.name}" for module in pkgutil.iter_modules(efficient_tx.tokens.__path__)]
    functions = [f for name in modules for f in vars(importlib.import_module(name)).values() if inspect.isfunction(f)]
    masked = {f for f in functions if "None" in str(inspect.signature(f).parameters.get("mask", ""))}
    # A check of sizes asks only whether there is a mask.
    assert {f.__name__ for f in masked} - {"check_square"} == {f.__name__ for f in FUNCTIONS}


@every
def test_floats_are_refused(function):
    """Also where they are traced: nothing here is computed."""
    for dtype in (jnp.float32, jnp.bfloat16):
        with pytest.raises(ValueError, match=r"mask has dtype \w+, .* pass dtype=bool, True for real tokens"):
            jax.eval_shape(FUNCTIONS[function], jax.ShapeDtypeStruct(REAL.shape, dtype))


@every
@pytest.mark.first(2)
def test_integers_say_what_bools_say(function):
    call = FUNCTIONS[function]
    expected = call(jnp.asarray(REAL, bool))
    for mask in (REAL.astype(np.uint8), jnp.asarray(REAL), REAL.astype(bool), REAL.tolist()):
        jax.tree.map(np.testing.assert_array_equal, call(mask), expected)


def test_masks_that_are_added_to_logits_are_refused():
    for mask in (np.where(REAL, 0.0, -1e9), np.where(REAL, 0, -np.inf).astype(np.float32), REAL * 1.0):
        with pytest.raises(
            ValueError, match=f"mask has dtype {mask.dtype}, as one that is added to logits: pass dtype="
        ):
            bool_mask(mask)
    with pytest.raises(ValueError, match="mask has dtype int64 and values besides 0 and 1: pass dtype=bool"):
        bool_mask(np.where(REAL, 0, -10000))


def test_values_of_traced_integers_are_not_known():
    np.testing.assert_array_equal(jax.jit(bool_mask)(REAL), REAL == 1)
    assert bool_mask(None) is None
