"""Operations of a training step, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from efficient_tx.report.flops import of_step
from efficient_tx.training.flops import Uncounted, products
from tests.support.workdirs import config_of


def count(function, *shapes):
    return products(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr)


@pytest.mark.quick
def test_products_are_counted_as_often_as_they_run():
    assert count(lambda a, b: a @ b + 1, (2, 3), (3, 5)) == 2 * 3 * 5
    assert count(jnp.vectorize(lambda a, b: a @ b, signature="(i,j),(j,k)->(i,k)"), (7, 2, 3), (7, 3, 5)) == 7 * 30
    assert count(lambda a: jax.lax.scan(lambda x, _: (x @ a, None), a, length=4)[0], (3, 3)) == 4 * 27
    assert count(jax.jit(lambda a: jax.grad(lambda w: jnp.sum((a @ w) @ w))(a)), (3, 3)) == 2 * 27 + 3 * 27
    with pytest.raises(Uncounted):
        count(lambda a: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ a, a), (3, 3))


def test_a_model_of_dense_layers_has_the_operations_of_its_weights():
    """Forward each weight meets each token once, backward twice; the mean of the values has no matrix product."""
    length, features, mlp, classes, batch = 16, 8, 16, 10, 64
    for_each_token = 2 * features * features + 2 * features * mlp  # values and output; up and down
    head = features * mlp + mlp * classes
    expected = 3 * 2 * batch * (length * for_each_token + head)
    assert of_step(config_of("vmean")) == expected
    assert of_step(config_of("vmean", batch_size=32)) == expected / 2
    assert of_step(config_of("softmax")) > expected + 3 * 2 * batch * 2 * length**2 * features
