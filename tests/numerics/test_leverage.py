"""Leverage scores against the SVD, their own variational definition, and a row-by-row loop, all in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.numerics.leverage import leverage_scores, online_ridge_scores

exact = jax.jit(leverage_scores, static_argnames="ridge")
online = jax.jit(online_ridge_scores, static_argnames=("ridge", "chunk"))


def by_svd(a, ridge=0.0):
    """diag(A (AᵀA + ridge)⁺ Aᵀ)."""
    u, s, _ = np.linalg.svd(a, full_matrices=False)
    kept = s > 1e-10 * s.max(initial=0)
    return np.square(u[:, kept]) @ (s[kept] ** 2 / (s[kept] ** 2 + ridge))


def by_loop(a, ridge):
    gram, scores = ridge * np.eye(a.shape[1]), []
    for row in np.asarray(a, np.float64):
        gram += np.outer(row, row)
        scores.append(row @ np.linalg.solve(gram, row))
    return np.array(scores)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def of_rank(seed, n, d, rank):
    return normal(seed, n, rank) @ normal(seed + 1, rank, d)


KINDS = {
    "full": lambda: normal(0, 60, 7),
    "rank 4 of 7": lambda: of_rank(0, 60, 7, 4),
    "fewer rows than columns": lambda: normal(0, 5, 7),
    "graded": lambda: normal(0, 60, 7) * np.geomspace(1, 1e-4, 7),
    "zero": lambda: np.zeros((60, 7)),
}


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_scores_are_those_of_the_svd_and_sum_to_the_rank(kind, ridge):
    a = KINDS[kind]()
    with jax.enable_x64(True):
        ours = np.asarray(exact(a, ridge=ridge))
    # The Gram matrix squares the condition number, 1e4 at most: 1e8 · 2e-16, some tens of them.
    np.testing.assert_allclose(ours, by_svd(a, ridge), rtol=0, atol=1e-6)
    assert (ours >= 0).all()
    assert (ours <= 1).all()
    if ridge == 0:
        assert ours.sum() == pytest.approx(np.linalg.matrix_rank(a), abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.slow
def test_float32_finds_the_rank_too(shift):
    """The rows share a direction of `shift` times their size; 1e-4 is float32 rounding over the smallest eigenvalue."""
    a = of_rank(0, 4096, 32, 20)
    a = (a + shift * a[:1]).astype(np.float32)
    ours = np.asarray(exact(a))
    assert ours.dtype == np.float32
    assert ours.sum() == pytest.approx(20, abs=1e-3)
    np.testing.assert_allclose(ours, np.square(np.linalg.svd(a.astype(np.float64))[0][:, :20]).sum(1), atol=1e-5)


@pytest.mark.quick
def test_the_score_is_the_largest_share_of_any_direction():
    """τ_i = max_x (a_iᵀx)² / ‖Ax‖²: no direction exceeds it, and (AᵀA)⁻¹ a_i attains it."""
    a = normal(0, 40, 6) * np.linspace(0.1, 3, 6)
    with jax.enable_x64(True):
        ours = np.asarray(exact(a))
    shares = np.square(a @ normal(1, 6, 5000))
    shares /= shares.sum(0)
    assert (shares - ours[:, None]).max() <= 1e-12
    best = np.square(a @ np.linalg.solve(a.T @ a, a.T))
    np.testing.assert_allclose(np.diag(best) / best.sum(0), ours, rtol=1e-10)


@pytest.mark.quick
def test_scores_are_invariant_to_a_change_of_basis_and_an_orthogonal_row_scores_one():
    a, basis = normal(0, 50, 6), normal(1, 6, 6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(exact(a @ basis), exact(a), rtol=0, atol=1e-10)
        alone = np.pad(a, ((0, 1), (0, 1)))
        alone[-1, -1] = 1e-3
        ours = np.asarray(exact(alone))
    assert ours[-1] == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(ours[:-1], by_svd(a), atol=1e-12)


@pytest.mark.parametrize(
    ("scores", "oracle"),
    [(exact, by_svd), (partial(online, ridge=0.5, chunk=16), partial(by_loop, ridge=0.5))],
    ids=["exact", "online"],
)
def test_masked_rows_score_zero_and_count_for_nothing(scores, oracle):
    a, mask = normal(0, 3, 50, 6), np.random.default_rng(1).random((3, 50)) < 0.6
    mask[2] = False
    hostile = np.where(mask[..., None], a, np.nan)
    with jax.enable_x64(True):
        ours = np.asarray(scores(hostile, mask=mask))
        assert (ours[~mask] == 0).all()
        for row in (0, 1):
            np.testing.assert_allclose(ours[row][mask[row]], oracle(a[row][mask[row]]), atol=1e-12)
        by_rows = jax.grad(lambda a: scores(a, mask=mask).sum())(hostile)
    assert (np.asarray(by_rows) == 0).all()  # scores select, nothing is trained through them


def test_bfloat16_rows_are_scored_in_float32():
    rows = jnp.asarray(normal(0, 40, 6), jnp.bfloat16)
    for scores in (exact, partial(online, ridge=0.5)):
        assert scores(rows).dtype == jnp.float32
        np.testing.assert_array_equal(scores(rows), scores(rows.astype(jnp.float32)))


STREAMS = {
    "random": lambda: normal(0, 150, 8),
    "ten points": lambda: normal(0, 10, 8)[np.random.default_rng(1).integers(0, 10, 150)],
    "one direction dominates": lambda: normal(0, 150, 8) + 10 * normal(1, 1, 8),
    "grows": lambda: normal(0, 150, 8) * np.geomspace(1e-2, 1e2, 150)[:, None],
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_online_scores_are_those_of_a_loop(kind, chunk):
    a = STREAMS[kind]()
    expected = by_loop(a, 0.5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(online(a, ridge=0.5, chunk=chunk), expected, rtol=1e-8)
    # ‖a‖² / ridge is up to 1e5: what float32 leaves of a pivot near 1 in a chunk of such rows.
    single = np.asarray(online(a.astype(np.float32), ridge=0.5, chunk=chunk))
    np.testing.assert_allclose(single, expected, rtol=0, atol=2e-2 if kind == "grows" else 1e-3)


@pytest.mark.quick
def test_online_scores_bound_the_scores_of_the_whole_and_have_a_bounded_sum():
    """And one pass over n rows finds at most d log(1 + ‖A‖² / (dλ)) / ε scores above ε (Cohen et al. 2016)."""
    for kind in STREAMS:
        a, ridge = STREAMS[kind](), 0.5
        with jax.enable_x64(True):
            ours, whole = (np.asarray(scores(a, ridge=ridge)) for scores in (online, exact))
        assert (ours >= whole - 1e-9).all()
        assert ours.sum() <= 8 * np.log1p(np.square(a).sum() / (8 * ridge))


def test_a_ridge_below_the_rounding_gives_no_nan():
    """Long copies of few points in float32: neither Cholesky factor may fail."""
    a = (1e3 * STREAMS["ten points"]()).astype(np.float32)
    ours = np.asarray(online(a, ridge=1e-6))
    assert np.isfinite(ours).all()
    assert (ours < 1.0001).all()
    whole = np.asarray(exact(a, ridge=1e-6))
    assert whole.sum() == pytest.approx(8, abs=1e-3)
