"""Hamming hashing: the reflected Gray code, collision probabilities, and the stable sort by bucket."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.numerics.lsh import gray_rank, hamming_buckets, hash_directions, sort_by_bucket


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_neighbouring_ranks_differ_in_one_bit(count):
    """Over all codes: ranks are a permutation, and it is the inverse of the textbook code r ^ (r >> 1)."""
    codes = np.arange(2**count)
    bits = (codes[:, None] >> np.arange(count - 1, -1, -1)) & 1
    rank = np.asarray(gray_rank(jnp.asarray(bits, bool)))
    sequence = codes[np.argsort(rank)]
    assert sorted(rank) == list(codes)
    assert all(bin(a ^ b).count("1") == 1 for a, b in zip(sequence, np.roll(sequence, -1)))
    np.testing.assert_array_equal(sequence, codes ^ (codes >> 1))


def test_agreement_of_signs_measures_the_angle():
    """With one sign two vectors share the bucket with probability 1 − θ/π (Charikar 2002)."""
    angles = np.array([0.0, np.pi / 6, np.pi / 2, 3 * np.pi / 4, np.pi])
    x = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=-1)
    draws = 4000
    directions = hash_directions(jax.random.split(jax.random.key(0), draws), 3, 1)
    bucket = np.asarray(hamming_buckets(jnp.broadcast_to(x, (draws, *x.shape)), directions))
    agree = (bucket == bucket[:, :1]).mean(axis=0)
    np.testing.assert_allclose(agree, 1 - angles / np.pi, atol=4 * 0.5 / draws**0.5)  # four standard deviations


@pytest.mark.quick
def test_directions_are_gaussian_and_belong_to_the_key():
    keys = jax.random.split(jax.random.key(1), 3)
    directions = np.asarray(hash_directions(keys, 40, 12))
    assert directions.shape == (3, 40, 12)
    np.testing.assert_array_equal(hash_directions(keys[1:2], 40, 12)[0], directions[1])
    assert abs(directions.mean()) < 4 / directions.size**0.5
    assert abs(directions.var() - 1) < 4 * (2 / directions.size) ** 0.5  # four standard deviations


def test_buckets_are_signs_without_a_gradient():
    """The signs are those of the formula; scale and the other examples change nothing."""
    r = np.random.default_rng(0)
    x, directions = r.normal(size=(2, 3, 50, 8)).astype(np.float32), r.normal(size=(2, 8, 5)).astype(np.float32)
    bucket = np.asarray(hamming_buckets(x, directions))
    signs = np.einsum("bhld,bdp->bhlp", x, directions) > 0
    np.testing.assert_array_equal(bucket ^ (bucket >> 1), (signs << np.arange(4, -1, -1)).sum(-1))
    np.testing.assert_array_equal(hamming_buckets(7 * x[1:], directions[1:])[0], bucket[1])
    weighted = jax.grad(lambda x: (hamming_buckets(x, directions) * x.sum(-1)).sum())(x)
    np.testing.assert_array_equal(weighted, np.broadcast_to(bucket[..., None], x.shape))


@pytest.mark.quick
def test_sorting_is_stable_and_puts_the_invalid_last():
    r = np.random.default_rng(0)
    bucket, valid = r.integers(0, 4, (3, 40)), r.random((3, 40)) < 0.7
    valid[2] = False
    order = np.asarray(sort_by_bucket(jnp.asarray(bucket), jnp.asarray(valid), 4))
    expected = np.argsort(np.where(valid, bucket, 4), axis=-1, kind="stable")
    np.testing.assert_array_equal(order, expected)


@pytest.mark.quick
def test_more_than_32_bits_can_number_is_refused():
    with pytest.raises(ValueError, match="there are 65536 buckets for a length of 65536"):
        jax.eval_shape(lambda b, v: sort_by_bucket(b, v, 2**16), *(jnp.zeros(2**16, t) for t in (jnp.int32, bool)))
