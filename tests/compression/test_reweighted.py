"""Reweighted low rank against brute force, closed forms and its own bounds, with weights of rank one and above."""

from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx

from efficient_tx.compression import compress
from efficient_tx.compression.cost import Costs
from efficient_tx.compression.gradients import Gradients
from efficient_tx.compression.method import Setting
from efficient_tx.compression.model import Layer, dense, kernel_of, select
from efficient_tx.compression.reweighted import FLOOR, LEAST, Reweighted, nonnegative, rank_one, reweighted
from efficient_tx.compression.statistics import gather
from efficient_tx.config.methods import named_method
from efficient_tx.linear import HadamardQuotient, LowRank
from efficient_tx.linear.replacement import find
from tests.support.small import batches, loss, model

rng = np.random.default_rng(0)


def weighted_loss(weights, matrix):
    return np.sum((weights * matrix) ** 2)


def rows_of(weights, kernel, up):
    """The best D for U fixed: a weighted least-squares problem for each row."""
    pairs = zip(weights, kernel, strict=True)
    return np.stack([np.linalg.lstsq((w * up).T, w * row, rcond=None)[0] for w, row in pairs])


def alternating(weights, kernel, rank, starts=5, steps=60):
    """The least weighted error of a rank, by alternating weighted least squares from many starts."""
    draws, best = np.random.default_rng(1), np.inf
    for _ in range(starts):
        up = draws.normal(size=(rank, kernel.shape[1]))
        for _ in range(steps):
            down = rows_of(weights, kernel, up)
            up = rows_of(weights.T, kernel.T, down.T).T
        best = min(best, weighted_loss(weights, kernel - down @ up))
    return best


def cut(parts, rank):
    down, s, up = parts
    return down[:, :rank] @ up[:rank], np.sum(s[rank:] ** 2)


@pytest.mark.quick
def test_with_equal_weights_it_is_the_truncated_decomposition():
    kernel = rng.normal(size=(6, 5))
    u, s, v = np.linalg.svd(kernel)
    near, left = cut(reweighted(kernel, *rank_one(np.full((6, 5), 0.3))), 2)
    np.testing.assert_allclose(near, (u[:, :2] * s[:2]) @ v[:2], atol=1e-12)
    assert left == pytest.approx(0.3 * np.sum(s[2:] ** 2))


@pytest.mark.quick
def test_with_weights_of_rank_one_it_is_the_optimum():
    kernel = rng.normal(size=(5, 4))
    rows, columns = rng.uniform(0.1, 3, (5, 1)), rng.uniform(0.1, 3, (1, 4))
    weights = np.sqrt(rows * columns)
    for rank in (1, 2, 3):
        near, left = cut(reweighted(kernel, *rank_one(rows * columns)), rank)
        assert np.linalg.matrix_rank(near) == rank
        assert left == pytest.approx(weighted_loss(weights, kernel - near))
        assert left == pytest.approx(np.sum(np.linalg.svd(weights * kernel, compute_uv=False)[rank:] ** 2))
        assert left == pytest.approx(alternating(weights, kernel, rank), rel=1e-6)
        for _ in range(50):
            other = near + 0.1 * rng.normal(size=(5, rank)) @ rng.normal(size=(rank, 4))
            u, s, v = np.linalg.svd(other)
            other = (u[:, :rank] * s[:rank]) @ v[:rank]
            assert left <= weighted_loss(weights, kernel - other)


@pytest.mark.quick
def test_importances_of_rank_one_are_kept_and_others_have_their_sums():
    rows, columns = rng.uniform(0.1, 3, (5, 1)), rng.uniform(0.1, 3, (1, 4))
    np.testing.assert_allclose(np.prod(np.broadcast_arrays(*rank_one(rows * columns)), axis=0), rows * columns)
    importances = rng.uniform(size=(5, 4)) ** 8
    near = np.multiply(*rank_one(importances))
    for axis in (0, 1):
        np.testing.assert_allclose(near.sum(axis), importances.sum(axis))

    def divergence(other):
        return np.sum(importances * np.log(importances / other) - importances + other)

    for _ in range(50):
        other = near * np.exp(0.1 * rng.normal(size=(5, 1))) * np.exp(0.1 * rng.normal(size=(1, 4)))
        assert divergence(near) <= divergence(other)


@pytest.mark.quick
def test_importances_near_zero_are_lifted_and_do_not_blow_up():
    """A truncated decomposition of weights may be negative or zero, and W^{∘−1} infinite."""
    importances = rng.uniform(size=(6, 5))
    importances[2], importances[:, 3] = 0, 1e-300
    rows, columns = rank_one(importances)
    for part in (rows, columns):
        assert part.min() >= 0.99 * FLOOR * part.mean()  # of the mean before the lift
    near, _ = cut(reweighted(kernel := rng.normal(size=(6, 5)), rows, columns), 3)
    assert np.isfinite(near).all()
    np.testing.assert_allclose(cut(reweighted(kernel, rows, columns), 5)[0], kernel, atol=1e-9)
    for part in rank_one(np.zeros((3, 2))):
        np.testing.assert_array_equal(part, 1)  # no gradients: the plain decomposition


@pytest.mark.parametrize("weights", ["fisher", "activations"])
def test_it_beats_the_plain_decomposition_in_its_own_weights(weights):
    made, plain, before = model(), model(), model()
    options = {"where": "mlp", "batches": batches(), "loss": loss}
    done = compress(made, named_method(f"wlra(weights={weights!r}, gradients=6)"), 0.5, **options)
    compress(plain, named_method("svd"), 0.5, **options)
    layers = select(before, "mlp")
    if weights == "fisher":
        importances = Gradients(before, layers, loss, batches()).squares(6)
    else:
        inputs = gather(before, layers, batches())
        importances = {path: np.diag(inputs[path].moment)[:, None] for path in inputs}
    for change in done.changes:
        kernel, omega = kernel_of(find(before, change.path)), np.sqrt(np.multiply(*rank_one(importances[change.path])))
        ours, other = (weighted_loss(omega, kernel - kernel_of(find(one, change.path))) for one in (made, plain))
        assert ours < other
        # float32 factors.
        assert change.theory[1] == pytest.approx(np.sqrt(ours / weighted_loss(omega, kernel)), rel=1e-3)


# Weights of rank above one.


def fitted(kernel, importances, terms, rank):
    """The weight of the method's layer of so many terms and numerators, and the relative error that it says."""
    layer = Layer(("layer",), "", dense(kernel, None, nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))))
    gradients = SimpleNamespace(squares=lambda count: {layer.path: importances})
    method = Reweighted(weights_rank=terms, rank=rank)
    method.prepare(Setting(None, [layer], {}, Costs("bytes"), {layer.path: 4 * kernel.size}, gradients))
    new, (_, theory) = method.fit(layer, method.form(layer, 1.0))
    assert type(new) is (LowRank if terms == 1 else HadamardQuotient)
    return kernel_of(new), theory


@pytest.mark.quick
@pytest.mark.parametrize("importances", [np.full((6, 5), 0.3), np.zeros((6, 5))])
def test_with_equal_weights_a_quotient_is_the_truncated_decomposition(importances):
    kernel = rng.normal(size=(6, 5))
    u, s, v = np.linalg.svd(kernel, full_matrices=False)
    near, theory = fitted(kernel, importances, 2, 3)
    np.testing.assert_allclose(near, (u[:, :3] * s[:3]) @ v[:3], atol=1e-5)  # float32 factors
    assert theory == pytest.approx(np.sqrt(np.sum(s[3:] ** 2) / np.sum(s**2)), rel=1e-5)


@pytest.mark.quick
def test_with_importances_of_rank_one_a_quotient_is_the_low_rank_answer():
    """Whatever its number of terms."""
    kernel = rng.normal(size=(7, 6))
    importances = rng.uniform(0.3, 3, (7, 1)) * rng.uniform(0.3, 3, (1, 6))
    expected, error = fitted(kernel, importances, 1, 2)
    for terms in (2, 3):
        near, theory = fitted(kernel, importances, terms, 2)
        np.testing.assert_allclose(near, expected, atol=1e-5)  # float32 factors
        assert theory == pytest.approx(error, rel=1e-5)


@pytest.mark.quick
def test_a_quotient_leaves_the_tail_and_no_more_than_the_best_of_its_rank():
    """With Ω of rank r, r k numerators are at least as good as the best weight of rank k, found by brute force."""
    kernel = rng.normal(size=(8, 7))
    omega = rng.uniform(0.2, 2, (8, 2)) @ rng.uniform(0.2, 2, (2, 7))
    left, right = nonnegative(omega, 2)
    weights = left @ right  # within a per cent of omega, over its mean
    np.testing.assert_allclose(weights, omega / omega.mean(), rtol=0.05)
    for k in (1, 2, 3):
        near, theory = fitted(kernel, omega**2, 2, 2 * k)
        ours, singular = weighted_loss(weights, kernel - near), np.linalg.svd(weights * kernel, compute_uv=False)
        assert ours == pytest.approx(np.sum(singular[2 * k :] ** 2), rel=1e-4)
        assert theory == pytest.approx(np.sqrt(ours / weighted_loss(weights, kernel)), rel=1e-4)
        assert ours <= alternating(weights, kernel, k)
        assert np.linalg.matrix_rank(near, tol=1e-3) > 2 * k  # a quotient has a rank of its own


def divergence(matrix, near):
    return np.sum(matrix * np.log(np.maximum(matrix, 1e-300) / near) - matrix + near)


@pytest.mark.quick
def test_factors_of_the_weights_are_positive_and_near_in_divergence():
    matrix = rng.uniform(size=(9, 8)) ** 4
    matrix[3], matrix[:, 2], matrix[5, 5] = 0, 0, 40
    scaled, left = matrix / matrix.mean(), np.inf
    for rank in (1, 2, 4):
        factors = nonnegative(matrix, rank)
        near = np.matmul(*factors)
        assert near.min() >= LEAST**2 * (1 - 1e-9) and 1 - 1e-9 < near.mean() < 1.05
        assert all((factor > 0).all() for factor in factors)
        assert divergence(scaled, near) < left
        left = divergence(scaled, near)
        np.testing.assert_allclose(np.matmul(*nonnegative(1e-20 * matrix, rank)), near, rtol=1e-6)
    # Of rank one the best is that of the sums, here without the lift.
    matrix = rng.uniform(0.5, 1, size=(9, 8))
    near = np.matmul(*nonnegative(matrix, 1)) * matrix.mean()
    np.testing.assert_allclose(near, np.outer(matrix.sum(1), matrix.sum(0)) / matrix.sum(), rtol=1e-6)


def test_the_budget_counts_both_parts_and_the_error_is_that_of_the_layer():
    made, plain, before = model(), model(), model()
    options = {"where": "mlp", "batches": batches(), "loss": loss}
    done = compress(made, named_method("wlra(weights_rank=2, gradients=6)"), 0.5, **options)
    compress(plain, named_method("svd"), 0.5, **options)
    sizes = []
    for change in done.changes:
        layer, old = find(made, change.path), find(before, change.path)
        assert type(layer) is HadamardQuotient and layer.terms == 2
        n, m = old.in_features, old.out_features
        size, whole = 4 * ((n + m) * (layer.rank + 2) + m), 4 * (n * m + m)
        assert layer.bytes_stored == size
        sizes.append((size, whole, 4 * (n + m)))
        np.testing.assert_array_equal(layer.bias[...], old.bias[...])
        # The weights of the layer's own factors.
        omega = np.asarray(layer.left[...].T @ layer.right[...], float)
        ours, other = (
            weighted_loss(omega, kernel_of(old) - kernel_of(find(one, change.path))) for one in (made, plain)
        )
        assert ours < other
        assert change.theory[1] == pytest.approx(np.sqrt(ours / weighted_loss(omega, kernel_of(old))), rel=1e-3)
    after, whole, step = map(sum, zip(*sizes))
    assert done.after == after <= whole / 2 < after + step  # one more numerator of each would be too many


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("wlra(weights='activations', weights_rank=2)", "weights_rank is 2: importances of activations have rank 1"),
        ("wlra(weights_rank=0)", "weights_rank is 0: it must be at least 1"),
    ],
)
def test_what_cannot_be_is_one_line(text, line):
    with pytest.raises(ValueError, match=line):
        named_method(text)
