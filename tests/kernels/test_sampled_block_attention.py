"""sampled_block_attention, "reference" and "xla", against loops over the chosen keys; gradients, errors."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels import sampled_block_attention
from efficient_tx.kernels.sampled_block_attention.cases import case
from efficient_tx.kernels.sampled_block_attention.options import Choice, Sizes
from efficient_tx.kernels.verify import accuracy
from tests.support.samples import attention_inputs

BOTH = ("reference", "xla")


def formula(q, k, v, choice, sizes):
    """One query at a time: output and log-sum-exp."""
    out, lse = np.zeros((*q.shape[:2], v.shape[-1])), np.full(q.shape[:2], -np.inf)
    for s, i in np.ndindex(*q.shape[:2]):
        row, keys = choice.q_place[s, i], []
        if row >= choice.q_order.shape[1]:
            continue
        block, group = choice.block[s, row], choice.group[s, row // sizes.tile]
        for place, key in enumerate(choice.k_order[s]):
            if place // sizes.block == block and key < k.shape[1]:
                keys.append((key, 0))
        for place, offset in zip(choice.sample[s, group], choice.offset[s, group]):
            if place // sizes.block != block and np.isfinite(offset):
                keys.append((choice.k_order[s, place], offset))
        if keys:
            logits = np.array([q[s, i] @ k[s, j] + offset for j, offset in keys])
            lse[s, i] = np.logaddexp.reduce(logits)
            out[s, i] = np.exp(logits - lse[s, i]) @ v[s, [j for j, _ in keys]]
    return out, lse


def drawn(r, queries, keys, sizes, samples):
    """Any choice for two sequences: rows in any order, some empty, one query in none; samples in and out of a block.

    Of two groups, one sees the blocks of even and the other those of odd number.
    """
    q_rows, k_rows = -(-queries // sizes.tile) * sizes.tile + sizes.tile, -(-keys // sizes.block) * sizes.block
    orders, places = [], []
    for n, rows in ((queries, q_rows), (keys, k_rows)):
        order = np.full((2, rows), n)
        for one in order:
            one[r.permutation(rows)[:n]] = r.permutation(n)
        place = np.full((2, n), rows)
        for s, row in np.argwhere(order < n):
            place[s, order[s, row]] = row
        orders, places = [*orders, order], [*places, place]
    left_out = orders[0][0, places[0][0, 0]]
    orders[0][0, places[0][0, left_out]], places[0][0, left_out] = queries, q_rows
    blocks = k_rows // sizes.block
    group = r.integers(0, min(blocks, 2), (2, q_rows // sizes.tile))
    of_row = group.repeat(sizes.tile, axis=1)
    block = of_row + 2 * r.integers(0, (blocks - of_row + 1) // 2)
    block[orders[0] == queries] = -1
    real = [np.flatnonzero(order < keys) for order in orders[1]]
    sample = np.stack([r.choice(rows, (2, samples)) for rows in real])
    offset = np.where(r.random(sample.shape) < 0.3, -np.inf, r.normal(size=sample.shape))
    ints = (*(x for pair in zip(orders, places) for x in pair), block, group, sample)
    return Choice(*(x.astype(np.int32) for x in ints), offset)


@pytest.mark.parametrize(
    ("queries", "keys", "sizes"),
    [(11, 17, Sizes(4, 3)), (9, 6, Sizes(3, 8))],
)
@pytest.mark.first(1)
def test_equals_the_sum_over_the_chosen_keys_and_both_have_one_gradient(queries, keys, sizes):
    """In float64, of the output and of the log-sum-exp."""
    r = np.random.default_rng(queries)
    q, k, v = (x[:, :, 0] for x in attention_inputs(0, queries, keys, heads=1, groups=1))
    choice = drawn(r, queries, keys, sizes, 5)
    expected, expected_lse = formula(q, k, v, choice, sizes)
    there = np.isfinite(expected_lse)
    assert 0 < there.mean() < 1
    w, w_lse = r.normal(size=expected.shape), np.where(there, r.normal(size=there.shape), 0)

    def loss(arrays, implementation):
        out, lse = sampled_block_attention(*arrays, choice, sizes=sizes, implementation=implementation)
        return jnp.vdot(out, w) + jnp.vdot(jnp.where(there, lse, 0), w_lse), (out, lse)

    with jax.enable_x64(True):
        run = jax.jit(lambda x: [jax.value_and_grad(loss, has_aux=True)(x, i) for i in BOTH])
        ((_, plain), by_plain), ((_, tiled), by_tiled) = run((q, k, v))
    for out, lse in (plain, tiled):
        np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-12)  # float64 rounding
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(by_tiled, by_plain):
        assert np.abs(theirs).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def test_row_sums_are_unbiased_over_all_samples():
    """All 20 samples of three of six keys as one batch: the mean of the sums is the row sum of softmax attention.

    The own block is counted once, whether it is sampled or not.
    """
    q, k, v = (np.broadcast_to(x[:1, :, 0], (20, *x.shape[1::2])) for x in attention_inputs(0, 3, 6, heads=1, groups=1))
    samples = np.array(list(combinations(range(6), 3)))
    one = {
        "q_order": [2, 0, 1, 3], "q_place": [1, 2, 0], "k_order": range(6), "k_place": range(6),
        "block": [2, 0, 0, -1], "group": [0, 0],
    }  # fmt: skip
    choice = {name: np.tile(np.array(x, np.int32), (20, 1)) for name, x in one.items()}
    choice = Choice(**choice, sample=samples[:, None].astype(np.int32), offset=np.full((20, 1, 3), np.log(6 / 3)))
    with jax.enable_x64(True):
        attend = jax.jit(
            lambda q: [sampled_block_attention(q, k, v, choice, sizes=Sizes(2, 2), implementation=i)[1] for i in BOTH]
        )
        for lse in attend(q / 8**0.5):
            np.testing.assert_allclose(np.exp(lse).mean(0), np.exp(q[0] @ k[0].T / 8**0.5).sum(1), rtol=1e-12)
            assert np.exp(lse).std(0).min() > 0.1


@pytest.mark.parametrize(("length", "pieces"), [(75, 1), (96, 3)])
@pytest.mark.first(1)
def test_cases_that_are_verified_have_queries_with_and_without_keys(length, pieces):
    one = case(length=length, sequences=2, dim=16, sizes="16/32", samples=20, pieces=pieces)
    (out, lse), _ = accuracy.exact(one, 0)
    seen = np.isfinite(lse).mean(1)  # nine in ten of the first sequence, none of the last, which has no keys
    assert 0.75 < seen[0] < 1 and seen[1] == 0
    assert np.abs(out[0]).max() > 0.1 and not out[1].any()
    found = accuracy.errors(one, 0, implementation="xla")
    assert max(found.values()) < accuracy.most(one)


def test_a_case_has_whole_pieces_of_more_keys_than_are_sampled():
    sizes = {"sequences": 2, "dim": 64, "sizes": "128/256"}
    assert case(length=4096, samples=256, pieces=4, **sizes)
    assert case(length=1024, samples=256, pieces=4, **sizes) is None
    assert case(length=1000, samples=64, pieces=4, **sizes) is None


@pytest.mark.slow
def test_forward_mode_and_what_cannot_be():
    q, k, v = (x[:, :, 0] for x in attention_inputs(0, 9, 6, heads=1, groups=1))
    sizes = Sizes(3, 8)
    choice = drawn(np.random.default_rng(9), 9, 6, sizes, 5)

    def total(implementation, *arrays):
        return sampled_block_attention(*arrays, choice, sizes=sizes, implementation=implementation)[0].sum()

    arrays, ones = (q, k, v), tuple(map(np.ones_like, (q, k, v)))
    with jax.enable_x64(True):
        slope = jax.jit(lambda x, t: jax.jvp(lambda *x: total("reference", *x), x, t)[1])(arrays, ones)
        by = jax.jit(jax.grad(lambda x: total("reference", *x)))(arrays)
        assert float(slope) == pytest.approx(sum(float(x.sum()) for x in by), rel=1e-10)
        with pytest.raises(NotImplementedError, match="sampled_block_attention"):
            jax.jvp(lambda *x: total("xla", *x), arrays, ones)
    with pytest.raises(ValueError, match="interpret=True is for Pallas kernels"):
        sampled_block_attention(*arrays, choice, sizes=sizes, interpret=True)
