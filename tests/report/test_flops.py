"""Operations of a training step, against counts by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.attention import ATTENTION
from efficient_tx.kernels import flash_attention
from efficient_tx.numerics.flops import Uncounted, products
from efficient_tx.report.flops import of_steps, used
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
    assert of_steps(config_of("vmean"))[0].operations == expected
    assert of_steps(config_of("vmean", batch_size=32))[0].operations == expected / 2


def test_a_run_that_becomes_dense_pays_for_dense_steps_from_then_on():
    settings = {"linear.mlp.name": "monarch", "steps": 100}
    ((_, structured),) = of_steps(config_of("softmax", **settings))
    ((_, dense),) = of_steps(config_of("softmax", steps=100))
    stages = of_steps(config_of("softmax", densify_at=10, **settings))
    assert stages == [(0, structured), (10, dense)] and structured != dense
    expected = [0, 4 * structured, 10 * structured, 10 * structured + 90 * dense]
    assert used(stages, np.array([0.0, 4.0, 10.0, 100.0])).tolist() == expected


def test_of_branches_the_most_expensive_one_counts():
    """Also where each has kernels for other platforms, as attention at one of several lengths."""
    attend = lambda x: flash_attention(x, x, x).sum()  # noqa: E731
    branches = [lambda x: attend(x[:, :32]), attend]
    either = count(lambda x: jax.lax.switch(x[0, 0, 0, 0].astype(int), branches, x), (1, 64, 2, 16))
    assert either == count(attend, (1, 64, 2, 16)) == 2 * 2 * 64 * 64 * 16


@pytest.mark.parametrize("length", [16, 1100])
def test_exact_attention_has_all_pairs_whatever_its_blocks(length):
    """1,100 tokens are three blocks of keys, which are passed over where they are padding."""
    features, mlp, batch = 8, 16, 64
    weights = 4 * features**2 + 2 * features * mlp
    head = features * mlp + mlp * 10
    expected = 3 * 2 * batch * (length * weights + 2 * length**2 * features + head)
    assert of_steps(config_of("softmax", **{"task.max_len": length}))[0].operations == expected


@pytest.mark.quick
def test_solves_and_fourier_transforms_are_counted():
    """n³/3 operations of Cholesky, n² m of a triangle, 4 n² (m − n/3) of Q and R, 9 n³ of eigenvectors."""
    assert 2 * count(jnp.linalg.cholesky, (5, 9, 9)) == pytest.approx(5 * 9**3 / 3)
    solve = partial(jax.scipy.linalg.solve_triangular, lower=True)
    assert 2 * count(solve, (9, 9), (9, 4)) == pytest.approx(9 * 9 * 4)
    assert 2 * count(jnp.linalg.qr, (12, 9)) == pytest.approx(4 * 81 * (12 - 3))
    assert 2 * count(jnp.linalg.eigh, (9, 9)) == pytest.approx(9 * 9**3)
    assert 2 * count(lambda x: jnp.fft.fft(x.astype(complex)), (3, 16)) == pytest.approx(3 * 5 * 16 * 4)
    assert 2 * count(jnp.fft.rfft, (3, 16)) == pytest.approx(3 * 5 * 16 * 4 / 2)
    with pytest.raises(Uncounted):
        count(jnp.linalg.svd, (3, 3))


@pytest.mark.parametrize("name", ATTENTION)
def test_every_mixer_is_counted_at_a_length_of_several_blocks(name):
    assert of_steps(config_of(name, **{"task.max_len": 1100, "batch_size": 1}))[0].operations > 0
