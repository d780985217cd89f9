"""Estimates of what low rank leaves, against singular values and what the method svd does."""

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_tx.compression.estimate import estimate, residual
from efficient_tx.compression.model import kernel_of
from efficient_tx.linear.replacement import find
from tests.support.small import compressed, model


def matrix(spectrum, n=96, m=160):
    draws = np.random.default_rng(0)
    u, v = (np.linalg.qr(draws.normal(size=(size, len(spectrum))))[0] for size in (n, m))
    return np.float32((u * spectrum) @ v.T)


@pytest.mark.parametrize("rank", [8, 30, 48, 94])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_a_residual_is_near_that_of_the_singular_values_and_below_it(rank, power):
    spectrum = np.arange(1.0, 97) ** -power
    truth = np.linalg.norm(spectrum[rank:]) / np.linalg.norm(spectrum)
    found = residual(matrix(spectrum), rank)
    # One draw; the flat spectrum is the worst one, and beyond half of the side it is worse.
    assert truth / (2 if rank <= 48 else 3) < found < truth
    assert found == residual(matrix(spectrum), rank)


def test_a_matrix_of_the_rank_leaves_nothing_and_one_of_zeros_neither():
    spectrum = np.zeros(96)
    spectrum[:8] = 1
    assert residual(matrix(spectrum), 8) < 1e-5  # float32
    assert residual(np.zeros((5, 7), np.float32), 2) == 0


@pytest.mark.parametrize("budget", [1, 0.8, 0.4])
def test_ranks_and_costs_are_those_of_svd_and_the_model_stays(budget):
    made = model()
    state = jax.tree.map(np.asarray, nnx.state(made))
    found = estimate(made, budget, where="mlp")
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(nnx.state(made)), strict=True):
        np.testing.assert_array_equal(one, two)
    _, done = compressed("svd", budget=budget, where="mlp")
    assert (found.before, found.after) == (done.before, done.after)
    assert [layer.path for layer in found.layers] == [change.path for change in done.changes]
    for layer, change in zip(found.layers, done.changes):
        assert layer.rank == dict(change.form.form.options).get("rank")
        if budget == 1:
            assert (layer.rank, layer.left, change.error) == (None, 0, 0)
            continue
        s = np.linalg.svd(kernel_of(find(made, layer.path)), compute_uv=False)
        truth = np.linalg.norm(s[layer.rank :]) / np.linalg.norm(s)
        assert 0.7 * truth < layer.left < 1.1 * truth  # one draw, of a sketch that is larger than the weight


@pytest.mark.quick
def test_weights_that_are_no_numbers_have_no_estimate():
    made = model()
    made.encoder.blocks[1].mlp.up.kernel[...] *= np.nan
    with pytest.raises(ValueError, match=r"^encoder\.blocks\.1\.mlp\.up has weights that are not finite"):
        estimate(made, 0.5)
    assert np.isnan(residual(np.full((5, 7), np.nan, np.float32), 2))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("budget", "where", "line"),
    [
        (0.0, "mlp", "budget is 0.0: it must be above 0"),
        (1e-4, "mlp", "budget is 0.0001: svd cannot meet it"),
        (0.5, "mpl", "where='mpl' selects no linear layer"),
    ],
)
def test_what_cannot_be_is_one_line(budget, where, line):
    with pytest.raises(ValueError) as error:
        estimate(model(), budget, where=where)
    assert str(error.value).startswith(line)
