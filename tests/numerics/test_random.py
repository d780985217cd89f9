"""Randomness of one example at a time: keys, dropout, sampling among real tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.numerics.random import dropout, evaluation_keys, example_keys, fold, sample_tokens


@pytest.mark.quick
def test_keys_are_given_or_folded_per_row():
    key = jax.random.key(3)
    folded = jax.random.key_data(example_keys(key, 4))
    assert len(np.unique(folded, axis=0)) == 4
    np.testing.assert_array_equal(folded[2], jax.random.key_data(jax.random.fold_in(key, 2)))
    own = jax.random.split(key, 4)
    np.testing.assert_array_equal(jax.random.key_data(example_keys(own, 4)), jax.random.key_data(own))
    assert example_keys(None, 4) is None
    assert fold(None, 1) is None
    assert len(np.unique(jax.random.key_data(evaluation_keys(4)), axis=0)) == 1


@pytest.mark.quick
def test_keys_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\).*\(4,\)"):
        example_keys(jax.random.split(jax.random.key(0), 3), 4)
    with pytest.raises(ValueError, match="not raw uint32"):
        example_keys(jnp.zeros(2, jnp.uint32), 4)


@pytest.mark.quick
def test_dropout_keeps_the_mean_and_drops_its_share():
    keys = jax.random.split(jax.random.key(0), 2)
    out = np.asarray(dropout(jnp.ones((2, 1000, 100)), 0.3, keys))
    kept = out != 0
    # 200,000 draws: the standard deviation of a share of 0.3 is 0.001.
    assert 1 - kept.mean() == pytest.approx(0.3, abs=0.005)
    assert out.mean() == pytest.approx(1.0, abs=0.007)
    assert len(np.unique(out)) == 2
    assert not np.array_equal(out[0], out[1])


@pytest.mark.slow
def test_dropout_draws_do_not_depend_on_the_length_or_the_batch():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jnp.ones((3, 40, 5))
    out = dropout(x, 0.5, keys)
    np.testing.assert_array_equal(dropout(x[:, :13], 0.5, keys), out[:, :13])
    np.testing.assert_array_equal(dropout(x[1:2], 0.5, keys[1:2])[0], out[1])
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, keys) is x


def test_samples_are_uniform_without_replacement_among_real_tokens():
    mask = np.array([1, 0, 1, 1, 0, 1, 1], bool)
    keys = jax.random.split(jax.random.key(0), 4000)
    positions, valid = jax.jit(sample_tokens, static_argnums=2)(keys, jnp.tile(mask, (4000, 1)), 2)
    assert valid.all()
    assert mask[positions].all()
    assert (positions[:, 0] != positions[:, 1]).all()
    counts = np.bincount(np.asarray(positions).ravel(), minlength=7)[mask]
    np.testing.assert_allclose(counts / 8000, 0.2, atol=0.02)  # standard deviation 0.0045


def test_a_sample_belongs_to_the_ranks_of_the_real_tokens():
    keys = jax.random.split(jax.random.key(0), 1)
    side_by_side = np.arange(9)[None] < 5
    scattered = np.zeros((1, 20), bool)
    places = np.array([2, 3, 7, 11, 19])
    scattered[0, places] = True
    ranks, _ = sample_tokens(keys, jnp.asarray(side_by_side), 3)
    positions, _ = sample_tokens(keys, jnp.asarray(scattered), 3)
    np.testing.assert_array_equal(positions[0], places[np.asarray(ranks[0])])


def test_too_few_real_tokens_are_marked():
    mask = jnp.array([[True, False, True], [False] * 3])
    positions, valid = sample_tokens(evaluation_keys(2), mask, 5)
    assert positions.shape == (2, 3)
    np.testing.assert_array_equal(valid, [[True, True, False], [False] * 3])
