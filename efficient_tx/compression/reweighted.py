"""Reweighted low rank: the error of each entry of a weight counts by its importance.

Of min ‖Ω ∘ (W − Ŵ)‖ the solution with Ω ∘ Ŵ = (Ω ∘ W)_k, a truncated singular value decomposition, leaves no more than
any Ŵ of rank k (Woodruff and Yasuda 2024, arXiv 2406.02431). If Ω has rank one, Ŵ has rank k: it is the best of them.
If Ω has rank r, Ŵ = (Ω ∘ W)_(r k) ⊘ Ω leaves no more than any of rank k, and is stored as r + r k factors. At equal
bytes that is no promise against rank r + r k.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.checks import OptionError, at_least, one_of
from efficient_tx.compression.layer_form import LayerForm
from efficient_tx.compression.low_rank import Truncated, svd, tail
from efficient_tx.compression.method import Setting, low_rank
from efficient_tx.compression.model import Layer, kernel_of
from efficient_tx.linear import Dense, HadamardQuotient

# Importances below this share of their mean are lifted to it: weights are divided by their roots.
FLOOR = 1e-6
# The same for entries of the factors of Ω of higher rank: no entry of Ω is below LEAST² of the mean.
LEAST = 0.03
UPDATES = 200


class Reweighted(Truncated):
    """The low-rank weight that is best if the squared error of each entry is weighted by an importance of low rank.

    Args:
      weights: importances: "fisher", the mean squares of the loss's gradients, made rank one by `rank_one`, or
        "activations", the mean square of each input channel, the same for all outputs.
      weights_rank: rank of the weights Ω of the errors. Of 1, layers become `LowRank`; of more, which "activations" do
        not have, `HadamardQuotient`, of numerators Ω ∘ W and denominators Ω, the nonnegative factorisation of the roots
        of the importances.
      rank: of all layers, of the numerators; None follows from the budget.
      gradients: of "fisher", their number, each over a share of the calibration examples.
    """

    paper = "Woodruff and Yasuda 2024, arXiv 2406.02431"
    computes = "min ‖Ω ∘ (W − Ŵ)‖, Ω ∘ Ŵ of low rank"
    tail = "tail of Ω ∘ W's singular values"

    def __init__(self, *, weights: str = "fisher", weights_rank: int = 1, rank: int | None = None, gradients: int = 64):
        super().__init__(rank=rank)
        one_of(("fisher", "activations"), weights=weights)
        at_least(1, weights_rank=weights_rank, gradients=gradients)
        if weights == "activations" and weights_rank > 1:
            raise OptionError("weights_rank", weights_rank, "importances of activations have rank 1")
        self.weights, self.weights_rank, self.count = weights, weights_rank, gradients
        self.needs = frozenset({"gradients" if weights == "fisher" else "inputs"})

    def prepare(self, setting: Setting) -> None:
        self.roots = {}
        if self.weights == "fisher":
            self.importances = setting.gradients.squares(self.count)
        else:
            self.importances = {path: np.diag(inputs.moment)[:, None] for path, inputs in setting.inputs.items()}
        super().prepare(setting)

    def decompose(self, layer: Layer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kernel, importances = kernel_of(layer.module), self.importances[layer.path]
        if self.weights_rank == 1:
            return reweighted(kernel, *rank_one(importances))
        left, right = self.roots[layer.path] = nonnegative(np.sqrt(importances), self.weights_rank)
        u, s, v = svd(left @ right * kernel)
        return u * s, s, v

    def of_rank(self, layer: Layer, rank: int) -> LayerForm:
        if self.weights_rank == 1:
            return super().of_rank(layer, rank)
        return LayerForm.of(HadamardQuotient, layer.module, rank=rank, terms=self.weights_rank)

    def fit(self, layer: Layer, form: LayerForm) -> tuple[nnx.Module, tuple[str, float] | None]:
        if self.weights_rank == 1 or form.form.structure is Dense:
            return super().fit(layer, form)
        new, rank = form.blank(), dict(form.form.options)["rank"]
        (down, s, up), (left, right) = self.decomposed[layer.path], self.roots[layer.path]
        numerators = low_rank(down[:, :rank], up[:rank], layer.module)
        new.down[...], new.up[...] = numerators.down[...], numerators.up[...]
        new.left[...], new.right[...] = (jnp.asarray(part, new.param_dtype) for part in (left.T, right))
        new.bias = layer.module.bias
        return new, (self.tail, tail(s, rank))


def rank_one(importances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row factors `[in, 1]` and column factors `[1, out]`, positive, whose product stands for importances `[in, out]`.

    They are the row sums, and the column sums over the total: the importances themselves if these have rank one, else
    the nearest of rank one in I-divergence. Row sums alone are those of FWSVD (Hsu et al. 2022, arXiv 2207.00112).
    Factors below FLOOR of their mean are lifted to it; if all are zero, they are ones.
    """
    rows = importances.sum(1, keepdims=True)
    columns = importances.sum(0, keepdims=True) / max(rows.sum(), np.finfo(float).tiny)
    return lifted(rows), lifted(columns)


def lifted(factors: np.ndarray) -> np.ndarray:
    mean = factors.mean()
    return np.maximum(factors, FLOOR * mean) if mean > 0 else np.ones_like(factors)


def reweighted(kernel: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Down `[in, r]`, singular values and up `[r, out]` of Ω ∘ W, with Ω² = rows · columns undone in down and up."""
    u, s, v = svd(np.sqrt(rows) * kernel * np.sqrt(columns))
    return u * s / np.sqrt(rows), s, v / np.sqrt(columns)


def nonnegative(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors `[in, rank]` and `[rank, out]`, positive, whose product stands for a nonnegative matrix over its mean.

    Multiplicative updates lower the I-divergence (Lee and Seung 2001), from a fixed start whose first update gives the
    best of rank one. Each column of the first factor has the mean 1. Entries below LEAST of the mean of their column,
    or row, are lifted to it, so no product is below LEAST² of their mean. All are alike if the matrix is zero.
    """
    tiny = np.finfo(float).tiny
    mean = matrix.mean()
    matrix = matrix / mean if mean > 0 else np.ones_like(matrix)
    left = np.repeat(matrix.mean(1, keepdims=True), rank, axis=1)
    right = np.random.default_rng(0).uniform(0.5, 1.5, (rank, matrix.shape[1]))
    for _ in range(UPDATES):
        right *= left.T @ (matrix / np.maximum(left @ right, tiny)) / np.maximum(left.sum(0)[:, None], tiny)
        left *= (matrix / np.maximum(left @ right, tiny)) @ right.T / np.maximum(right.sum(1), tiny)
    sizes = np.maximum(left.mean(0), tiny)
    left, right = left / sizes, right * sizes[:, None]
    return np.maximum(left, LEAST), np.maximum(right, LEAST * right.mean(1, keepdims=True))
