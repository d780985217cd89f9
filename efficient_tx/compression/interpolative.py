"""Interpolative decomposition: neurons, or heads, whose activations are combinations of others are removed.

Activations Z `[tokens, n]` of the hidden layer are written as Z ≈ Z_J T with k of its columns J. Then the neurons J
stay, and T goes into the next layer: T W instead of W (Chee, Renz, Damle and De Sa 2021, arXiv 2108.00065). J and T
come from a QR decomposition with column pivoting, Z Π = Q R: J are the first k pivots, T = [I, R₁₁⁻¹ R₁₂] Πᵀ, and
‖Z − Z_J T‖ = ‖R₂₂‖. STAT (Flynn et al. 2024, arXiv 2406.00061) does the same for the heads of attention.
"""

from collections.abc import Sequence

import numpy as np
import scipy.linalg
from flax import nnx

from efficient_tx.compression.cutting import Cutting, expand, unit_costs
from efficient_tx.compression.method import Setting, ratio
from efficient_tx.compression.model import Layer, Neurons, Units, bias_of, kernel_of
from efficient_tx.linear.replacement import Path, find

# Share of an MLP's neurons that is left after each step of the greedy choice of sizes.
STEP = 0.95
# A diagonal entry of R below this share of the first one is rounding.
SMALLEST = 1e-10


def pivoted(triangle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R `[≤ n, n]` and the pivots `[n]` of a QR decomposition with column pivoting; the R of Z serves as Z itself."""
    r, pivots = scipy.linalg.qr(triangle, mode="r", pivoting=True, check_finite=False)
    return r, pivots


def interpolation(r: np.ndarray, pivots: np.ndarray, k: int) -> np.ndarray:
    """T `[k, n]` with Z ≈ Z[:, J] T for the first k pivots J, ascending; T[:, J] is the identity, exactly.

    Columns beyond the numerical rank of R₁₁ get zeros: they are combinations of the others already.
    """
    n = len(pivots)
    diagonal = np.abs(np.diag(r))[:k]
    rank = int(np.sum(diagonal > SMALLEST * diagonal[0])) if k and diagonal[0] > 0 else 0
    t = np.zeros((k, n))
    t[:, pivots[:k]] = np.eye(k)
    if rank:
        solved = scipy.linalg.solve_triangular(r[:rank, :rank], r[:rank, k:], check_finite=False)
        t[:rank, pivots[k:]] = solved
    return t[np.argsort(pivots[:k], kind="stable")]


def block_order(moment: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which blocks of channels are taken, the one with the largest residual first, and the residuals.

    Args:
      moment: Σ z zᵀ or E z zᵀ of all channels, `[count · size, count · size]`.
      size: channels of a block.

    Returns:
      The blocks `[count]`, and the squared norms of the residuals before each was taken, `[count]`.
    """
    count = len(moment) // size
    left = moment.copy()
    order, residuals = [], []
    for _ in range(count):
        norms = left.diagonal().reshape(count, size).sum(1)
        norms[order] = -np.inf
        block = int(np.argmax(norms))
        residuals.append(max(float(np.sum(left.diagonal())), 0.0))
        order.append(block)
        at = expand(np.array([block]), size)
        left -= left[:, at] @ pseudo_inverse(left[np.ix_(at, at)]) @ left[at]
        left = (left + left.T) / 2
    return np.array(order), np.array(residuals)


def pseudo_inverse(matrix: np.ndarray) -> np.ndarray:
    """Of a symmetric, positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    there = values > SMALLEST * max(values[-1], np.finfo(float).tiny)
    return (vectors[:, there] / values[there]) @ vectors[:, there].T


def regression(moment: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """T `[kept, n]` that minimises E ‖z − z_J T‖²; T[:, J] is the identity."""
    t = pseudo_inverse(moment[np.ix_(kept, kept)]) @ moment[kept]
    t[:, kept] = np.eye(len(kept))
    return t


class Interpolative(Cutting):
    """Neurons of MLPs by interpolative decomposition, with sizes chosen greedily.

    Each step removes a twentieth of the neurons of the MLP whose next residual |R_kk / R_00| is smallest for the
    multiplications that it saves. The bias of the layer that reads them stays: T is fitted to activations with their
    means, and reproduces these as the rest.
    """

    paper = "Chee et al. 2021, arXiv 2108.00065"
    computes = "Z ≈ Z_J T by pivoted QR"

    def __init__(self):
        super().__init__(heads=False)

    def triangles(self, model: nnx.Module, layers: Sequence[Layer]) -> set[Path]:
        return {one.reading for one in self.units(model, layers) if isinstance(one, Neurons)}

    def prepare(self, setting: Setting) -> None:
        self.factors: dict[Path, tuple[np.ndarray, np.ndarray]] = {}
        self.blocks: dict[Path, tuple[np.ndarray, np.ndarray]] = {}
        super().prepare(setting)

    def order(self, setting: Setting, found: Sequence[Units]) -> list[tuple[Path, np.ndarray]]:
        queues = {}
        for one in found:
            inputs = setting.inputs[one.reading]
            if isinstance(one, Neurons):
                r, pivots = pivoted(inputs.triangle)
                self.factors[one.path] = r, pivots
                sizes, order = neuron_steps(one.count), pivots
                losses = self.losses(r, sizes)
            else:
                order, residuals = block_order(inputs.moment, one.size)
                self.blocks[one.path] = order, residuals
                sizes = list(range(one.count - 1, 0, -1))
                losses = increases([ratio(residuals[size], residuals[0]) for size in sizes])
            cost, before, steps = unit_costs(setting, one), one.count, []
            for size, loss in zip(sizes, losses):
                steps.append((loss / (cost * (before - size)), one.path, order[size:before]))
                before = size
            queues[one.path] = steps
        removals = []
        while any(queues.values()):
            path = min((path for path, steps in queues.items() if steps), key=lambda path: queues[path][0][0])
            _, owner, indices = queues[path].pop(0)
            removals.append((owner, indices))
        return removals

    def losses(self, r: np.ndarray, sizes: Sequence[int]) -> list[float]:
        """What each step to so many neurons costs, from the R of the pivoted QR: |R_kk / R_00|."""
        diagonal = np.abs(np.diag(r))
        return [float(diagonal[size] / (diagonal[0] or 1.0)) if size < len(diagonal) else 0.0 for size in sizes]

    def correct(self, one: Units, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        layer = find(self.setting.model, one.reading)
        if isinstance(one, Neurons):
            t = interpolation(*self.factors[one.path], len(kept))
        else:
            t = regression(self.setting.inputs[one.reading].moment, expand(kept, one.size))
        return t @ kernel_of(layer), bias_of(layer)

    def theory(self, one: Units, kept: np.ndarray) -> tuple[str, float]:
        if isinstance(one, Neurons):
            return "‖R₂₂‖ / ‖R‖", residual(self.factors[one.path][0], len(kept))
        _, residuals = self.blocks[one.path]
        return "residual of the heads", ratio(residuals[len(kept)], residuals[0])


def residual(r: np.ndarray, k: int) -> float:
    """‖Z − Z_J T‖ / ‖Z‖ for the first k pivots J of a pivoted QR decomposition, ‖R₂₂‖ / ‖R‖."""
    return ratio(float(np.sum(r[k:, k:] ** 2)), float(np.sum(r**2)))


def increases(errors: Sequence[float]) -> list[float]:
    """What each step adds to the squared error, the first one to 0."""
    return np.diff(np.square([0.0, *errors])).tolist()


def neuron_steps(count: int) -> list[int]:
    """Sizes after each step."""
    sizes, size = [], count
    while size > 1:
        size = max(1, min(size - 1, int(STEP * size)))
        sizes.append(size)
    return sizes


class Stat(Interpolative):
    """Neurons and heads by interpolative decomposition: STAT.

    Heads are taken greedily, the one with the largest residual norm first; the others' outputs are written as linear
    combinations of theirs, which go into the output projection. The steps of all MLPs and mixers are one order, by what
    each adds to the squared error ‖Z − Z_J T‖² / ‖Z‖² for the multiplications that it saves: a head is one long step.
    """

    paper = "Flynn et al. 2024, arXiv 2406.00061"
    computes = "Z ≈ Z_J T of neurons and of heads"

    def __init__(self):
        Cutting.__init__(self, heads=True)

    def losses(self, r: np.ndarray, sizes: Sequence[int]) -> list[float]:
        """As of heads."""
        return increases([residual(r, size) for size in sizes])
