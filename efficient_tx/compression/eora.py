"""EoRA: a low-rank layer beside a compressed one, which compensates its error on the layer's own inputs.

For the error ΔW = W − Ŵ of a layer with the second moment C = S Sᵀ of its inputs, D U minimises E ‖x (ΔW − D U)‖²: it
is the truncated singular value decomposition of Sᵀ ΔW, with S undone (Liu et al. 2024, arXiv 2410.21271).
"""

from collections.abc import Callable, Sequence
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
from efficient_tx.compression.model import Layer, bias_of, dense, kernel_of, put
from efficient_tx.compression.statistics import Inputs
from efficient_tx.linear import Dense, Form, LowRank, Sum
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

    All errors are those against the original model's inputs. A layer that stays dense has no low-rank part, as its own
    kernel can hold D U. If the first stage has cut inputs of it, the kernel becomes the best linear prediction from the
    others, up to a constant if there is a bias: nothing new after an interpolative method without biases, which is that
    prediction.

    Args:
      first: the method of the first stage.
      share: of the budget, for the low-rank parts, which get what the first stage leaves as well. Each may cost the
        same share of its layer's present cost. If all layers stay dense, the first stage has the whole budget.
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
        if all(form.form.structure is Dense for form in first.forms.values()):
            first = self.first.largest(share)
        return self.setting.largest(lambda amount: self.beside(first, amount), share)

    def beside(self, first: Plan, amount: float) -> Plan:
        """A plan of the first stage, and low-rank layers that each cost at most an amount of their layer's cost."""
        forms = {path: self.form(base, amount * self.setting.now(path)) for path, base in first.forms.items()}
        return Plan(forms, first.kept, first)

    def form(self, base: LayerForm, most: float) -> LayerForm:
        """The form with the largest low-rank part that costs at most so much; itself if none does, or dense."""
        if base.form.structure is Dense:
            return base
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
        rows = self.rows(plan)
        for path, form in plan.forms.items():
            progress(dotted(path))
            if path in rows:
                changes[path] = self.predict(before[path], path, rows[path])
            elif form.form.structure is Sum:
                changes[path] = self.compensate(before[path], path, form)
        return list(changes.values())

    def rows(self, plan: Plan) -> dict[Path, np.ndarray]:
        """The inputs that the first stage has left, of each layer of which it has cut some."""
        found = self.first.found.values() if isinstance(self.first, Cutting) else ()
        return {one.reading: expand(plan.kept[one.path], one.size) for one in found if one.path in plan.kept}

    def compensate(self, before: nnx.Module, path: Path, form: LayerForm) -> Change:
        """Puts the sum of the first stage's layer and its compensation at the path."""
        after, inputs, kernel = find(self.setting.model, path), self.setting.inputs[path], kernel_of(before)
        new, rank = form.blank(), dict(dict(form.form.options)["second"].options)["rank"]
        down, up, missed = compensation(kernel - kernel_of(after), inputs.moment, rank)
        nnx.update(new.first, nnx.state(without_bias(after)))
        nnx.update(new.second, nnx.state(low_rank(down, up, new.second)))
        if new.bias is not None:
            new.bias[...] = after.bias[...]
        put(self.setting.model, path, new)
        theory = "tail of Sᵀ ΔW", ratio(missed, energy(kernel, inputs.moment))
        return Change(path, form, layer_error(before, new, inputs), theory)

    def predict(self, before: nnx.Module, path: Path, rows: np.ndarray) -> Change:
        """Makes the layer at the path, of which only the inputs `rows` are left, the best linear prediction."""
        after, inputs, kernel = find(self.setting.model, path), self.setting.inputs[path], kernel_of(before)
        target, missed = prediction(kernel, inputs, rows, centred=after.bias is not None)
        new = dense(target, bias_of(after), after)
        if new.bias is not None:
            # Means are right: of the kernel as it is stored.
            old = bias_of(before)
            mean = inputs.mean @ kernel + (0 if old is None else old)
            new.bias[...] = jnp.asarray(mean - inputs.mean[rows] @ kernel_of(new), new.param_dtype)
        put(self.setting.model, path, new)
        theory = "error of linear prediction", ratio(missed, energy(kernel, inputs.moment))
        return Change(path, LayerForm.of(Dense, new), layer_error(before, new, inputs, rows=rows), theory)


def prediction(
    kernel: np.ndarray, inputs: Inputs, rows: np.ndarray, *, centred: bool
) -> tuple[np.ndarray, float]:  # fmt: skip
    """The best linear prediction of x W from the inputs `rows`.

    Args:
      kernel: W, `[in, out]`.
      centred: up to a constant.

    Returns:
      The kernel T `[rows, out]`, and E ‖x W − x̂ T‖², without the means if centred.
    """
    moment = inputs.moment - np.outer(inputs.mean, inputs.mean) if centred else inputs.moment
    target, off = regression(moment, rows) @ kernel, kernel.copy()
    off[rows] -= target
    return target, energy(off, moment)


def without_bias(layer: nnx.Module) -> nnx.Module:
    """The same layer without its bias."""
    graphdef, state = nnx.split(layer)
    bare = nnx.merge(graphdef, state)
    bare.bias = None
    return bare
