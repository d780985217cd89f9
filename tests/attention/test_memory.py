"""No token mixer builds an array with two axes of the length: read from what is traced, nothing is compiled."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION
from tests.support.mixers import FEATURES, make, one_of_a_family


def shapes_in(jaxpr):
    """The shapes of all values of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def check(name, *, causal):
    """Forward and backward, exact variants included: no value has two axes of the length, or as many elements."""
    length = 1536  # longer than any block
    graphdef, params = nnx.split(nnx.eval_shape(partial(make, ATTENTION[name], max_len=length, causal=causal)))
    loss = jax.grad(lambda params, x, mask: nnx.merge(graphdef, params)(x, mask=mask).sum())
    x, mask = jnp.zeros((1, length, FEATURES)), jnp.ones((1, length), bool)
    shapes = list(shapes_in(jax.make_jaxpr(loss)(params, x, mask).jaxpr))
    assert len(shapes) > 10
    assert not [shape for shape in shapes if sum(size >= length for size in shape) > 1]
    assert max(map(math.prod, shapes)) < length**2 // 2


@one_of_a_family(list(ATTENTION))
def test_no_array_is_quadratic_in_the_length(name):
    check(name, causal=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ATTENTION if ATTENTION[name].can_be_causal])
def test_nor_in_the_causal_form(name):
    check(name, causal=True)


@pytest.mark.quick
def test_the_search_for_quadratic_arrays_finds_them():
    found = shapes_in(jax.make_jaxpr(jax.jit(lambda x: (x @ x.T).sum()))(jnp.zeros((64, 3))).jaxpr)
    assert (64, 64) in list(found)
