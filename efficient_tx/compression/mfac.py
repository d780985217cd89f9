"""M-FAC: weights are removed by what the loss pays for them, and the others move to make up for them.

In the quadratic model of the loss with the damped Fisher matrix H of the gradients, removing weight q costs
w_q² / (2 [H⁻¹]_qq), if the others move by −w_q [H⁻¹]_·q / [H⁻¹]_qq (Hassibi and Stork 1992).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.checks import above_zero, at_least, one_of
from efficient_tx.compression.layer_form import LayerForm
from efficient_tx.compression.method import Change, Method, Plan, Setting, layer_error
from efficient_tx.compression.model import Layer, put
from efficient_tx.linear import Dense, Sparse
from efficient_tx.numerics.inverse_fisher import inverse_fisher

# Bytes of gradients, in float64, of the blocks that are worked on at once.
CHUNK = 2**25


class Mfac(Method):
    """Sparse weights by the optimal brain surgeon, with inverse Fisher matrices by M-FAC.

    Weights go in steps that each keep the same share; each begins with new gradients. Several weights of a step are
    removed as if each were the only one, and then set to zero, as published. Of pattern "top" the layers' densities
    follow from the scores of all layers together before the first step; a layer whose density would save nothing stays
    dense, and whole.

    Args:
      pattern: "top", any entries, or "2:4", two of each four along the input axis, in two steps.
      gradients: their number m, each over a share of the calibration examples. Memory m floats for each weight of the
        largest layer, at least a GiB.
      block: weights of one output, and the next, in a block of the Fisher matrix; None is a layer as one block.
      damping: λ, added to the Fisher matrix's diagonal.
      recomputations: steps of "top".
    """

    paper = "Frantar, Kurtic and Alistarh 2021, arXiv 2107.03356"
    computes = "w² / 2 [H⁻¹]_qq smallest, H of gradients"
    needs = frozenset({"gradients"})

    def __init__(
        self, *, pattern: str = "top", gradients: int = 64, block: int | None = 128, damping: float = 1e-5,
        recomputations: int = 16,
    ):  # fmt: skip
        one_of(("top", "2:4"), pattern=pattern)
        at_least(1, gradients=gradients, block=block, recomputations=recomputations)
        above_zero(damping=damping)
        self.pattern, self.gradients, self.block, self.damping = pattern, gradients, block, damping
        self.recomputations = recomputations if pattern == "top" else 2

    def steps(self, batches: int, layers: int) -> int:
        return batches * (1 + self.recomputations + (self.pattern == "top")) + layers

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        if self.pattern == "2:4":
            return
        self.sorted = {}
        for path, stack in setting.gradients.stacks(self.gradients):
            kernel = np.asarray(setting.gradients.kernels[path], np.float64)
            self.sorted[path] = np.sort(surgeon(kernel, stack, self.damping, self.block).scores, axis=None)
        self.all = np.sort(np.concatenate(list(self.sorted.values())))

    def plan(self, amount: float) -> Plan:
        if self.pattern == "2:4":
            forms = {layer.path: LayerForm.of(Sparse, layer.module, pattern="2:4") for layer in self.setting.layers}
            return Plan(forms)
        gone = round((1 - amount) * len(self.all))
        threshold = self.all[gone] if gone < len(self.all) else np.inf
        forms = {}
        for layer in self.setting.layers:
            scores = self.sorted[layer.path]
            kept = max(1, len(scores) - int(np.searchsorted(scores, threshold)))
            sparse = LayerForm.of(Sparse, layer.module, density=kept / len(scores))
            dense = LayerForm.of(Dense, layer.module)
            forms[layer.path] = sparse if self.setting.then(sparse) < self.setting.then(dense) else dense
        return Plan(forms)

    def apply(self, plan: Plan, progress: Callable[[str], None] = lambda name: None) -> list[Change]:
        gradients = self.setting.gradients
        dense = gradients.kernels
        alive = {path: np.ones(kernel.shape, bool) for path, kernel in dense.items()}
        try:
            for step in range(1, self.recomputations + 1):
                new = {}
                for path, stack in gradients.stacks(self.gradients):
                    kernel = np.asarray(gradients.kernels[path], np.float64)
                    stack *= alive[path]
                    now = surgeon(kernel, stack, self.damping, self.block)
                    scores = np.where(alive[path], now.scores, -1)
                    kept = self.kept(plan.forms[path], scores, step)
                    new[path] = now.without(alive[path] & ~kept) * kept
                    alive[path] = kept
                gradients.kernels = {path: jnp.asarray(kernel, jnp.float32) for path, kernel in new.items()}
            pruned = gradients.kernels
        finally:
            gradients.kernels = dense
        layers = self.setting.layers
        return [self.change(layer, plan.forms[layer.path], pruned[layer.path], progress) for layer in layers]

    def kept(self, form: LayerForm, scores: np.ndarray, step: int) -> np.ndarray:
        """Which weights a step keeps, bool `[in, out]`; scores below 0 are those of weights that are gone."""
        if self.pattern == "2:4":
            return best_of_four(scores, 4 - step)
        density = dict(form.form.options).get("density", 1.0)
        count = max(1, round(scores.size * density ** (step / self.recomputations)))
        kept = np.zeros(scores.size, bool)
        kept[np.argsort(-scores, axis=None, kind="stable")[:count]] = True
        return kept.reshape(scores.shape)

    def change(self, layer: Layer, form: LayerForm, kernel: jax.Array, progress: Callable[[str], None]) -> Change:
        progress(layer.name)
        new = form.blank()
        values = new.kernel if form.form.structure is Dense else new.sparse
        values[...] = kernel.astype(new.param_dtype)
        new.bias = layer.module.bias
        put(self.setting.model, layer.path, new)
        return Change(layer.path, form, layer_error(layer.module, new, self.setting.inputs.get(layer.path)))


class Surgeon(NamedTuple):
    """The quadratic model of the loss around a weight `[in, out]`.

    Attributes:
      kernel: the weight, float64.
      diagonal: of H⁻¹, float64 `[in, out]`.
      times: H⁻¹ times an array `[in, out]`.
    """

    kernel: np.ndarray
    diagonal: np.ndarray
    times: Callable[[np.ndarray], np.ndarray]

    @property
    def scores(self) -> np.ndarray:
        """What the loss pays for each weight that goes alone, `[in, out]`."""
        return self.kernel**2 / (2 * self.diagonal)

    def without(self, gone: np.ndarray) -> np.ndarray:
        """The weight after the others have moved for those that are `gone`, bool `[in, out]`, each as if alone."""
        return self.kernel + self.times(np.where(gone, -self.kernel / self.diagonal, 0))


def surgeon(kernel: np.ndarray, stack: np.ndarray, damping: float, block: int | None) -> Surgeon:
    """The quadratic model of a weight `[in, out]`, float64, from m gradients `[m, in, out]`.

    The Fisher matrix has blocks of weights that follow each other along the input axis, one output after another.
    """
    count, rows, columns = stack.shape
    block = min(block or kernel.size, kernel.size)
    at_once = max(1, CHUNK // (8 * block * max(count, 1)))

    def in_blocks(array: np.ndarray) -> np.ndarray:
        """`[..., in, out]` -> `[..., blocks, block]`, with zeros at the end."""
        flat = array.swapaxes(-1, -2).reshape(*array.shape[:-2], -1)
        whole = np.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, -kernel.size % block)])
        return whole.reshape(*flat.shape[:-1], -1, block)

    gradients = in_blocks(stack)

    def mapped(compute: Callable[..., jax.Array], *arrays: np.ndarray) -> np.ndarray:
        """An array `[in, out]`, computed from the gradients, and the blocks of other arrays, of some blocks at once."""
        blocked = [in_blocks(array) for array in arrays]
        found = []
        for start in range(0, gradients.shape[1], at_once):
            some = slice(start, start + at_once)
            parts = (gradients[:, some].swapaxes(0, 1), *(array[some] for array in blocked))
            found.append(on_cpu(compute, damping, *parts))
        return np.concatenate(found).ravel()[: kernel.size].reshape(columns, rows).T

    return Surgeon(kernel, mapped(diagonal), lambda x: mapped(times, x))


def on_cpu(compute: Callable[..., jax.Array], damping: float, *arrays: np.ndarray) -> np.ndarray:
    """A function of arrays in float64."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(compute(damping, *(jnp.asarray(array, jnp.float64) for array in arrays)))


@jax.jit
def diagonal(damping: float, gradients: jax.Array) -> jax.Array:
    return inverse_fisher(gradients, damping).diagonal


@jax.jit
def times(damping: float, gradients: jax.Array, x: jax.Array) -> jax.Array:
    return inverse_fisher(gradients, damping).times(x)


def best_of_four(scores: np.ndarray, count: int) -> np.ndarray:
    """True at the `count` largest of each four scores along the first axis of `[in, out]`; ties go to the first."""
    rows, columns = scores.shape
    groups = np.pad(scores, [(0, -rows % 4), (0, 0)], constant_values=-np.inf).reshape(-1, 4, columns)
    places = np.argsort(np.argsort(-groups, axis=1, kind="stable"), axis=1, kind="stable")
    return (places < count).reshape(-1, columns)[:rows]
