"""Tokens times numbers of their channels."""

import jax
import numpy as np
import pytest

from efficient_tx.tokens.flat import scaled


@pytest.mark.parametrize("shape", [(5,), (3, 1), (1, 7, 3, 1), (1, 7, 3, 5)])
def test_it_is_the_product_and_its_gradient_sums_no_array_with_a_leading_axis_of_one(shape):
    r = np.random.default_rng(0)
    x, weight, cotangent = (r.normal(size=size).astype(np.float32) for size in ((1, 7, 3, 5), shape, (1, 7, 3, 5)))
    np.testing.assert_array_equal(scaled(x, weight), x * weight)

    def gradient(weight):
        return jax.vjp(lambda weight: scaled(x, weight), weight)[1](cotangent)[0]

    axes = tuple(range(4 - len(shape))) + tuple(n for n, size in enumerate(shape, 4 - len(shape)) if size == 1)
    expected = (x * cotangent).sum(axes).reshape(shape)
    np.testing.assert_allclose(gradient(weight), expected, rtol=1e-5)  # float32 sums of at most 21 terms
    sums = [e.invars[0].aval for e in jax.make_jaxpr(gradient)(weight).eqns if e.primitive.name == "reduce_sum"]
    over_tokens = [x for x in sums if 7 in x.shape]
    assert len(over_tokens) == (shape != (1, 7, 3, 5))
    assert all(x.shape[0] == 7 for x in over_tokens)
