"""Method: how a compression chooses the forms of layers, and fits their values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.compression.cost import Costs
from efficient_tx.compression.gradients import Gradients
from efficient_tx.compression.layer_form import LayerForm
from efficient_tx.compression.model import Layer, bias_of, kernel_of, put
from efficient_tx.compression.statistics import Inputs
from efficient_tx.linear import Dense, LowRank
from efficient_tx.linear.replacement import Path

# Halvings of the interval of amounts: closer than one rank of 2**20.
HALVINGS = 20


@dataclass(frozen=True)
class Plan:
    """What a compression makes of a model, before values are fitted.

    Attributes:
      forms: the new forms of layers; the others stay as they are.
      kept: of an MLP the neurons, of a mixer the heads that stay, ascending; of those that are cut.
      first: of a compression in two stages, the plan of the first one.
    """

    forms: Mapping[Path, LayerForm]
    kept: Mapping[Path, np.ndarray] = field(default_factory=dict)
    first: "Plan | None" = None

    @property
    def exact(self) -> bool:
        """Whether nothing is lost: all layers are dense, and whole."""
        return not self.kept and all(form.form.structure is Dense for form in self.forms.values())


class Change(NamedTuple):
    """A layer that was replaced.

    Attributes:
      path: of the layer.
      form: its new form.
      error: ‖X W − X̂ Ŵ‖ / ‖X W‖ over the calibration inputs X of the layer, with X̂ what is left of them, and biases; or
        ‖W − Ŵ‖ / ‖W‖ if there are no calibration examples.
      theory: the name of a relative error that the method's own theory gives, and its value; None if it gives none.
    """

    path: Path
    form: LayerForm
    error: float
    theory: tuple[str, float] | None = None


class Setting(NamedTuple):
    """What a method works on.

    Attributes:
      model: with the values before compression; `apply` changes it.
      layers: the layers that may be changed.
      inputs: statistics of their inputs; empty without calibration examples.
      costs: of layers, in the unit of the budget.
      before: the cost of each of the layers as it is.
      gradients: of the loss for their weights; None for a method without gradients.
    """

    model: nnx.Module
    layers: Sequence[Layer]
    inputs: Mapping[Path, Inputs]
    costs: Costs
    before: Mapping[Path, float]
    gradients: Gradients | None = None

    def now(self, path: Path) -> float:
        """The cost of a layer as it is."""
        return self.before[path]

    def then(self, form: LayerForm) -> float:
        """The cost of a layer of this form."""
        return self.costs(form)

    def total(self, plan: Plan) -> tuple[float, float]:
        """The costs of the layers that a plan changes: as they are, and after."""
        return sum(map(self.now, plan.forms)), sum(map(self.then, plan.forms.values()))

    def fits(self, plan: Plan, share: float) -> bool:
        """Whether the layers that a plan changes cost at most a share of what they cost now."""
        before, after = self.total(plan)
        return after <= share * before

    def largest(self, plan: Callable[[float], Plan], share: float) -> Plan:
        """Of the plans of amounts in [0, 1] the largest one that fits a share of the cost; if none does, the smallest.

        Args:
          plan: amount -> a plan whose cost does not decrease with the amount.
          share: see `fits`.
        """
        best, whole = plan(0.0), plan(1.0)
        if not self.fits(best, share):
            return best
        if self.fits(whole, share):
            return whole
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            tried = plan(middle)
            if self.fits(tried, share):
                low, best = middle, tried
            else:
                high = middle
        return best


class Method:
    """A way of compressing a model. Options are the keyword arguments of the class.

    Attributes:
      paper: authors, year and arXiv id; empty for what is older than papers.
      computes: what the method minimises or keeps.
      needs: what it works on beside the weights: "inputs", statistics of the inputs of layers; "gradients" of the loss.
      name: what messages call it: as somebody typed it, else the name of its class.
    """

    name: str = ""
    paper: ClassVar[str] = ""
    computes: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.name = cls.__name__

    def chosen(self, model: nnx.Module, layers: Sequence[Layer]) -> list[Layer]:
        """Those of the selected layers that the method changes.

        Raises:
          ValueError: it cannot change them; one line.
        """
        return list(layers)

    def triangles(self, model: nnx.Module, layers: Sequence[Layer]) -> set[Path]:
        """Those of the layers that it changes whose inputs' QR factors it needs."""
        return set()

    def steps(self, batches: int, layers: int) -> int:
        """About how often the progress of a compression is reported."""
        return batches * len(self.needs | {"inputs"}) + layers

    def prepare(self, setting: Setting) -> None:
        """Computes what all plans share.

        Raises:
          ValueError: the method cannot change these layers; one line.
        """
        self.setting = setting

    def plan(self, amount: float) -> Plan:
        """The plan of an amount in [0, 1]. Its cost does not decrease with the amount; 1 changes as little as possible.

        A layer that a plan of some amount changes is changed, or at least named, in all plans.
        """
        raise NotImplementedError

    def largest(self, share: float) -> Plan:
        """The largest plan whose layers cost at most a share of what they cost now; if there is none, the smallest."""
        return self.setting.largest(self.plan, share)

    def apply(self, plan: Plan, progress: Callable[[str], None] = lambda name: None) -> list[Change]:
        """Changes the model in place; `progress` gets the name of each layer first."""
        raise NotImplementedError


class ByLayer(Method):
    """A method that fits each layer for itself: a class writes `form` and `fit`."""

    def plan(self, amount: float) -> Plan:
        return Plan({layer.path: self.form(layer, amount) for layer in self.setting.layers})

    def form(self, layer: Layer, amount: float) -> LayerForm:
        """The form of a layer at an amount of its present cost."""
        raise NotImplementedError

    def fit(self, layer: Layer, form: LayerForm) -> tuple[nnx.Module, tuple[str, float] | None]:
        """The layer of this form, and as `Change.theory`."""
        raise NotImplementedError

    def apply(self, plan: Plan, progress: Callable[[str], None] = lambda name: None) -> list[Change]:
        changes = []
        for layer in self.setting.layers:
            progress(layer.name)
            try:
                new, theory = self.fit(layer, plan.forms[layer.path])
            except ValueError as error:
                raise ValueError(f"{layer.name}: {error}") from None
            error = layer_error(layer.module, new, self.setting.inputs.get(layer.path))
            put(self.setting.model, layer.path, new)
            changes.append(Change(layer.path, plan.forms[layer.path], error, theory))
        return changes


def layer_error(
    before: nnx.Module, after: nnx.Module, inputs: Inputs | None, rows: np.ndarray | None = None
) -> float:  # fmt: skip
    """How far a layer's outputs are from those of the layer before, relative to these without the bias.

    √(E ‖x W + b − x̂ Ŵ − b̂‖² / E ‖x W‖²) over its calibration inputs x, of which x̂ are the `rows` that are left (None:
    all). Without inputs: ‖W − Ŵ‖ / ‖W‖. 0 for 0 / 0.
    """
    whole, new = kernel_of(before), kernel_of(after)
    off = whole.copy()
    off[slice(None) if rows is None else rows] -= new
    if inputs is None:
        return ratio(float(np.sum(off**2)), float(np.sum(whole**2)))
    old_bias, new_bias = (np.zeros(1) if (bias := bias_of(layer)) is None else bias for layer in (before, after))
    shift = old_bias - new_bias
    error = energy(off, inputs.moment) + 2 * float(np.sum(shift * (inputs.mean @ off)))
    error += float(np.sum(np.broadcast_to(shift, off.shape[1:]) ** 2))
    return ratio(error, energy(whole, inputs.moment))


def energy(matrix: np.ndarray, moment: np.ndarray) -> float:
    """E ‖x M‖² for inputs x with the second moment E x xᵀ."""
    return float(np.sum(matrix * (moment @ matrix)))


def ratio(error: float, norm: float) -> float:
    """√(error / norm), 0 for 0 / 0; rounding below zero counts as zero, and what is not a number stays so."""
    return 0.0 if norm <= 0 else float(np.sqrt(max(error, 0) / norm))


def low_rank(down: np.ndarray, up: np.ndarray, layer: nnx.Module) -> LowRank:
    """The layer x · down · up, `[in, rank]` and `[rank, out]`, with the bias of another one."""
    new = LayerForm.of(LowRank, layer, rank=down.shape[1]).blank()
    # Both factors get the same norm in each direction.
    sizes = np.sqrt(np.linalg.norm(down, axis=0) / np.maximum(np.linalg.norm(up, axis=1), np.finfo(float).tiny))
    sizes = np.where(np.isfinite(sizes) & (sizes > 0), sizes, 1)
    new.down[...] = jnp.asarray((down / sizes).T, new.param_dtype)
    new.up[...] = jnp.asarray(up * sizes[:, None], new.param_dtype)
    new.bias = layer.bias
    return new


def largest_rank(setting: Setting, layer: Layer, limit: float, of: Callable[[Layer, int], LayerForm]) -> int:
    """The largest rank within a cost, at least 1, of the forms that `of` gives for a layer and a rank."""
    low, high = 1, min(layer.module.in_features, layer.module.out_features)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if setting.then(of(layer, middle)) <= limit else (low, middle - 1)
    return low
