"""Low rank: truncated singular value decompositions of weights, plain, whitened by the inputs, with ranks by threshold.

The best rank-r approximation in Frobenius norm is the truncated decomposition, and its squared error the sum of the
other squared singular values (Eckart and Young 1936).
"""

import numpy as np
import scipy.linalg
from flax import nnx

from efficient_tx.checks import at_least
from efficient_tx.compression.layer_form import LayerForm
from efficient_tx.compression.method import ByLayer, Setting, largest_rank, low_rank, ratio
from efficient_tx.compression.model import Layer, bias_of, dense, kernel_of
from efficient_tx.compression.statistics import Inputs
from efficient_tx.linear import Dense, LowRank

# Directions of the inputs with less than this share of the largest variance are left out of an inverse.
NEGLIGIBLE = 1e-12


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, s, V with matrix = U diag(s) V, by LAPACK's divide and conquer."""
    return scipy.linalg.svd(matrix, full_matrices=False, check_finite=False)


def whitening(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S and its pseudo-inverse, both `[in, in]`, with S Sᵀ = E x xᵀ.

    S = Q Λ^½ for the eigenvectors Q and eigenvalues Λ. Directions without inputs have zeros in both.
    """
    values, vectors = np.linalg.eigh(moment)
    there = values > NEGLIGIBLE * max(values[-1], 0)
    roots = np.sqrt(np.where(there, values, 0))
    inverse = np.divide(1, roots, out=np.zeros_like(roots), where=there)
    return vectors * roots, inverse[:, None] * vectors.T


def tail(singular: np.ndarray, rank: int) -> float:
    """The relative error of the truncation, √(Σ_{i > rank} s_i² / Σ s_i²)."""
    return ratio(float(np.sum(singular[rank:] ** 2)), float(np.sum(singular**2)))


class Truncated(ByLayer):
    """The truncated singular value decomposition of each layer, at its share of the budget.

    A layer that may cost as much as a dense one is dense, and loses nothing. The option `rank` fixes the rank instead.
    """

    paper = "Eckart and Young 1936"
    computes = "min ‖W − D U‖"
    tail = "tail of W"

    def __init__(self, *, rank: int | None = None):
        at_least(1, rank=rank)
        self.rank = rank

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.decomposed = {layer.path: self.decompose(layer) for layer in setting.layers}

    def decompose(self, layer: Layer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Down `[in, r]`, singular values `[r]` and up `[r, out]` of all ranks: W ≈ down[:, :r] · up[:r]."""
        u, s, v = svd(kernel_of(layer.module))
        return u * s, s, v

    def form(self, layer: Layer, amount: float) -> LayerForm:
        limit, dense = amount * self.setting.now(layer.path), LayerForm.of(Dense, layer.module)
        if self.rank is None and self.setting.then(dense) <= limit:
            return dense
        rank = self.rank or largest_rank(self.setting, layer, limit, self.of_rank)
        return self.of_rank(layer, min(rank, layer.module.in_features, layer.module.out_features))

    def of_rank(self, layer: Layer, rank: int) -> LayerForm:
        """The form of a layer of this rank."""
        return LayerForm.of(LowRank, layer.module, rank=rank)

    def fit(self, layer: Layer, form: LayerForm) -> tuple[nnx.Module, tuple[str, float] | None]:
        if form.form.structure is Dense:
            return dense(kernel_of(layer.module), bias_of(layer.module), layer.module), (self.tail, 0.0)
        rank = dict(form.form.options)["rank"]
        down, s, up = self.decomposed[layer.path]
        return low_rank(down[:, :rank], up[:rank], layer.module), (self.tail, tail(s, rank))


class Whitened(Truncated):
    """The rank that is best for the layer's own inputs, min ‖X (W − D U)‖, from the decomposition of Sᵀ W.

    S Sᵀ is the second moment of the inputs. Wang et al. whiten the weight itself, with a Cholesky factor as S; the S of
    eigenvectors, which needs no inputs in all directions, is that of EoRA (Liu et al. 2024, arXiv 2410.21271).
    """

    paper = "Wang et al. 2024, arXiv 2403.07378"
    computes = "min ‖X (W − D U)‖"
    tail = "tail of Sᵀ W"
    needs = frozenset({"inputs"})

    def decompose(self, layer: Layer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return whitened(kernel_of(layer.module), self.setting.inputs[layer.path])


def whitened(kernel: np.ndarray, inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Down, s and up of the decomposition of Sᵀ W, with the whitening undone in `down` `[in, r]`."""
    factor, inverse = whitening(inputs.moment)
    u, s, v = svd(factor.T @ kernel)
    return inverse.T @ (u * s), s, v


class Welore(Truncated):
    """Low rank with ranks from one threshold for all layers.

    The singular values of each layer are scaled to [0, 1] by their smallest and largest; those below the threshold are
    dropped, so that layers with few large ones get a low rank. A layer whose rank would not save anything stays dense.
    The threshold follows from the budget.
    """

    paper = "Jaiswal et al. 2024, arXiv 2407.11239"
    computes = "ranks by one threshold on normalised singular values"

    def __init__(self):
        super().__init__()

    def form(self, layer: Layer, amount: float) -> LayerForm:
        rank = welore_rank(self.decomposed[layer.path][1], 1 - amount)
        form = LayerForm.of(LowRank, layer.module, rank=max(1, rank))
        saves = self.setting.then(form) < self.setting.now(layer.path)
        return form if saves else LayerForm.of(Dense, layer.module)


def welore_rank(singular: np.ndarray, threshold: float) -> int:
    """The number of singular values (descending) that are, scaled to [0, 1], at least the threshold."""
    spread = singular[0] - singular[-1]
    scaled = (singular - singular[-1]) / spread if spread > 0 else np.ones_like(singular)
    return int(np.sum(scaled >= threshold))
