"""EoRA: a low-rank layer beside a compressed one, which compensates its error on the layer's own inputs.

For the error ΔW = W − Ŵ of a layer with the second moment C = S Sᵀ of its inputs, D U minimises E ‖x (ΔW − D U)‖²: it
is the truncated singular value decomposition of Sᵀ ΔW, with S undone (Liu et al. 2024, arXiv 2410.21271).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.checks import OptionError
from efficient_tx.compression.cutting import Cutting, expand
from efficient_tx.compression.interpolative import regression
from efficient_tx.compression.layer_form import LayerForm
from efficient_tx.compression.low_rank import svd, whitening
from efficient_tx.compression.method import Change, Method, Plan, Setting, energy, layer_error, low_rank, ratio
from efficient_tx.compression.model import Layer, Units, bias_of, kernel_of, put
from efficient_tx.compression.statistics import Inputs
from efficient_tx.linear import Form, LowRank, Sum
from efficient_tx.linear.replacement import Path, dotted, find


def compensation(error: np.ndarray, moment: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """D `[in, rank]` and U `[rank, out]` that minimise E ‖x (error − D U)‖², and that minimum.

    Directions without inputs have no part in D.
    """
    factor, inverse = whitening(moment)
    u, s, v = svd(factor.T @ error)
    return inverse.T @ (u[:, :rank] * s[:rank]), v[:rank], float(np.sum(s[rank:] ** 2))


class Eora(Method):
    """Another method, and beside each of its layers a low-rank one for the error that it leaves on the inputs.

    All errors are those against the original model's inputs. If the first stage has cut inputs of a layer, D U
    compensates what the best linear prediction from the other inputs would still gain: nothing after an interpolative
    method without biases, which is that prediction. The theory counts what the prediction misses as well.

    Args:
      first: the method of the first stage.
      share: of the budget, for the low-rank parts, which get what the first stage leaves as well. Each may cost the
        same share of its layer's present cost.
    """

    paper = "Liu et al. 2024, arXiv 2410.21271"
    computes = "then + D U, min ‖X (W − Ŵ − D U)‖"
    needs = frozenset({"inputs"})

    def __init__(self, first: Method, *, share: float = 0.2):
        if not 0 < share < 1:
            raise OptionError("share", share, "it must be above 0 and below 1")
        self.first, self.share = first, share
        self.needs = first.needs | type(self).needs

    def chosen(self, model: nnx.Module, layers: Sequence[Layer]) -> list[Layer]:
        return self.first.chosen(model, layers)

    def triangles(self, model: nnx.Module, layers: Sequence[Layer]) -> set[Path]:
        return self.first.triangles(model, layers)

    def steps(self, batches: int, layers: int) -> int:
        return self.first.steps(batches, layers) + layers

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.first.prepare(setting)

    def largest(self, share: float) -> Plan:
        whole = self.first.plan(1.0)
        if whole.exact and self.setting.fits(whole, share):
            return replace(whole, first=whole)
        first = self.first.largest((1 - self.share) * share)
        return self.setting.largest(lambda amount: self.beside(first, amount), share)

    def beside(self, first: Plan, amount: float) -> Plan:
        """A plan of the first stage, and low-rank layers that each cost at most an amount of their layer's cost."""
        # A layer of which outputs were cut computes the others exactly.
        exact = {path for one in self.cut_units() for path in one.making}
        forms = {
            path: base if path in exact else self.form(base, amount * self.setting.now(path))
            for path, base in first.forms.items()
        }
        return Plan(forms, first.kept, first)

    def cut_units(self) -> Collection[Units]:
        """The neurons and heads that the first stage can cut."""
        return self.first.found.values() if isinstance(self.first, Cutting) else ()

    def form(self, base: LayerForm, most: float) -> LayerForm:
        """The form with the largest low-rank part that costs at most so much; itself if there is none."""
        if base.form.structure is Sum:
            raise ValueError(f"{base.form} is a sum already: eora follows a method whose layers are none")
        low, high = 0, min(base.in_features, base.out_features)
        while low < high:
            middle = (low + high + 1) // 2
            part = base._replace(form=Form(LowRank, rank=middle), use_bias=False)
            low, high = (middle, high) if self.setting.then(part) <= most else (low, middle - 1)
        if not low:
            return base
        return base._replace(form=Form(Sum, first=base.form, second=Form(LowRank, rank=low)))

    def apply(self, plan: Plan, progress: Callable[[str], None] = lambda name: None) -> list[Change]:
        before = {path: find(self.setting.model, path) for path in plan.forms}
        changes = {change.path: change for change in self.first.apply(plan.first, progress)}
        for path, form in plan.forms.items():
            if form.form.structure is Sum:
                progress(dotted(path))
                changes[path] = self.compensate(before[path], path, form, self.rows(plan, path))
        return list(changes.values())

    def rows(self, plan: Plan, path: Path) -> np.ndarray | None:
        """The inputs of a layer that the first stage has left; None: all."""
        reading = {one.reading: one for one in self.cut_units() if one.path in plan.kept}
        return expand(plan.kept[reading[path].path], reading[path].size) if path in reading else None

    def compensate(self, before: nnx.Module, path: Path, form: LayerForm, rows: np.ndarray | None) -> Change:
        """Puts the sum of the first stage's layer and its compensation at the path."""
        after, inputs = find(self.setting.model, path), self.setting.inputs[path]
        new = form.blank()
        target, moment, lost = aim(kernel_of(before), inputs, rows, centred=new.bias is not None)
        rank = dict(dict(form.form.options)["second"].options)["rank"]
        down, up, missed = compensation(target - kernel_of(after), moment, rank)
        nnx.update(new.first, nnx.state(without_bias(after)))
        nnx.update(new.second, nnx.state(low_rank(down, up, new.second)))
        if new.bias is not None:
            new.bias[...] = after.bias[...]
            if rows is not None:
                # The bias makes the mean right, which D U has moved.
                old = bias_of(before)
                mean = inputs.mean @ kernel_of(before) + (0 if old is None else old)
                new.bias[...] = jnp.asarray(mean - inputs.mean[rows] @ kernel_of(new), new.param_dtype)
        put(self.setting.model, path, new)
        error = layer_error(before, new, inputs, rows=rows)
        theory = ratio(lost + missed, energy(kernel_of(before), inputs.moment))
        return Change(path, form, error, ("tail of Sᵀ ΔW", theory))


def aim(
    kernel: np.ndarray, inputs: Inputs, rows: np.ndarray | None, *, centred: bool
) -> tuple[np.ndarray, np.ndarray, float]:  # fmt: skip
    """What a layer x W should compute of the inputs `rows` that are left, their second moment, and what this misses.

    If inputs are gone (None: none are), it is the best linear prediction of x W from the others.

    Args:
      kernel: W, `[in, out]`.
      centred: whether a bias makes the means right after a cut, so that the prediction is one up to a constant.

    Returns:
      The kernel T `[rows, out]`; the moment `[rows, rows]`, of the centred inputs if these count; and E ‖x W − x̂ T‖².
    """
    if rows is None:
        return kernel, inputs.moment, 0.0
    moment = inputs.moment - np.outer(inputs.mean, inputs.mean) if centred else inputs.moment
    target, off = regression(moment, rows) @ kernel, kernel.copy()
    off[rows] -= target
    return target, moment[np.ix_(rows, rows)], energy(off, moment)


def without_bias(layer: nnx.Module) -> nnx.Module:
    """The same layer without its bias."""
    graphdef, state = nnx.split(layer)
    bare = nnx.merge(graphdef, state)
    bare.bias = None
    return bare
