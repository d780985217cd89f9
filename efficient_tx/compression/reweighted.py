"""Reweighted low rank: the error of each entry of a weight counts by its importance.

Of min ‖Ω ∘ (W − Ŵ)‖ the solution with Ω ∘ Ŵ = (Ω ∘ W)_k, a truncated singular value decomposition, leaves no more than
any Ŵ of rank k (Woodruff and Yasuda 2024, arXiv 2406.02431). If Ω has rank one, Ŵ has rank k: it is the best of them.
"""

import numpy as np

from efficient_tx.checks import at_least, one_of
from efficient_tx.compression.low_rank import Truncated, svd
from efficient_tx.compression.method import Setting
from efficient_tx.compression.model import Layer, kernel_of

# Importances below this share of their mean are lifted to it: weights are divided by their roots.
FLOOR = 1e-6


class Reweighted(Truncated):
    """The low-rank weight that is best if the squared error of each entry is weighted by an importance of rank one.

    Args:
      weights: importances: "fisher", the mean squares of the loss's gradients, made rank one by `rank_one`, or
        "activations", the mean square of each input channel, the same for all outputs.
      rank: of all layers; None follows from the budget.
      gradients: of "fisher", their number, each over a share of the calibration examples.
    """

    paper = "Woodruff and Yasuda 2024, arXiv 2406.02431"
    computes = "min ‖Ω ∘ (W − D U)‖, Ω of rank one"
    tail = "tail of Ω ∘ W's singular values"

    def __init__(self, *, weights: str = "fisher", rank: int | None = None, gradients: int = 64):
        super().__init__(rank=rank)
        one_of(("fisher", "activations"), weights=weights)
        at_least(1, gradients=gradients)
        self.weights, self.count = weights, gradients
        self.needs = frozenset({"gradients" if weights == "fisher" else "inputs"})

    def prepare(self, setting: Setting) -> None:
        if self.weights == "fisher":
            self.importances = setting.gradients.squares(self.count)
        else:
            self.importances = {path: np.diag(inputs.moment)[:, None] for path, inputs in setting.inputs.items()}
        super().prepare(setting)

    def decompose(self, layer: Layer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return reweighted(kernel_of(layer.module), *rank_one(self.importances[layer.path]))


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
