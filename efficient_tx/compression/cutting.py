"""Cutting: a method that removes neurons of MLPs and heads of mixers, and corrects the layer that reads them."""

from collections.abc import Callable, Sequence

import numpy as np
from flax import nnx

from efficient_tx.compression.layer_form import LayerForm
from efficient_tx.compression.method import Change, Method, Plan, Setting, layer_error
from efficient_tx.compression.model import Heads, Layer, Units, bias_of, dense, kernel_of, put, units
from efficient_tx.linear import Dense
from efficient_tx.linear.replacement import Path, dotted, find


class Cutting(Method):
    """A class writes `order`, in which units go, and `correct`, what becomes of the layer that reads the others.

    Args:
      heads: whether heads of mixers are cut as well as neurons of MLPs.
    """

    needs = frozenset({"inputs"})
    adds_bias = False

    def __init__(self, *, heads: bool = True):
        self.heads = heads

    def units(self, model: nnx.Module, layers: Sequence[Layer]) -> list[Units]:
        """What can be cut, of which all layers are among `layers`.

        Raises:
          ValueError: nothing can.
        """
        found = units(model, layers, heads=self.heads)
        if not found:
            what = "neurons and heads" if self.heads else "neurons"
            raise ValueError(f"{self.name} cuts {what}: the selected layers hold no whole MLP or mixer")
        return found

    def chosen(self, model: nnx.Module, layers: Sequence[Layer]) -> list[Layer]:
        touched = {path for one in self.units(model, layers) for path in (*one.making, one.reading)}
        return [layer for layer in layers if layer.path in touched]

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.found = {one.path: one for one in self.units(setting.model, setting.layers)}
        self.removals = self.order(setting, list(self.found.values()))

    def order(self, setting: Setting, found: Sequence[Units]) -> list[tuple[Path, np.ndarray]]:
        """The steps in which units are removed, the first one first: (path of MLP or mixer, indices of its units).

        At least one unit of each must stay.
        """
        raise NotImplementedError

    def correct(self, one: Units, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The new kernel `[kept · size, out]` and bias of the layer that reads the units that are kept."""
        raise NotImplementedError

    def plan(self, amount: float) -> Plan:
        steps = round((1 - amount) * len(self.removals))
        gone: dict[Path, list[np.ndarray]] = {path: [] for path in self.found}
        for path, indices in self.removals[:steps]:
            gone[path].append(indices)
        forms, kept = {}, {}
        for path, one in self.found.items():
            left = np.setdiff1d(np.arange(one.count), np.concatenate([[], *gone[path]]).astype(int))
            if len(left) < one.count:
                kept[path] = left
            width = len(left) * one.size
            for making in one.making:
                forms[making] = LayerForm.of(Dense, find(self.setting.model, making))._replace(out_features=width)
            reading = LayerForm.of(Dense, find(self.setting.model, one.reading))
            bias = reading.use_bias or (self.adds_bias and path in kept)
            forms[one.reading] = reading._replace(in_features=width, use_bias=bias)
        return Plan(forms, kept)

    def apply(self, plan: Plan, progress: Callable[[str], None] = lambda name: None) -> list[Change]:
        changes = []
        model = self.setting.model
        for path, one in self.found.items():
            progress(dotted(path))
            if path in plan.kept:
                changes += self.cut(one, plan.kept[path])
            else:
                changes += [Change(layer, plan.forms[layer], 0.0) for layer in (*one.making, one.reading)]
        for path, left in plan.kept.items():
            if isinstance(self.found[path], Heads):
                find(model, path).heads = len(left)
        return changes

    def cut(self, one: Units, kept: np.ndarray) -> list[Change]:
        """Cuts one MLP or mixer in place."""
        model, columns = self.setting.model, expand(kept, one.size)
        changes = []
        for path in one.making:
            layer = find(model, path)
            bias = bias_of(layer)
            new = dense(kernel_of(layer)[:, columns], None if bias is None else bias[columns], layer)
            put(model, path, new)
            changes.append(Change(path, LayerForm.of(Dense, new), 0.0))
        layer = find(model, one.reading)
        new = dense(*self.correct(one, kept), layer)
        put(model, one.reading, new)
        error = layer_error(layer, new, self.setting.inputs[one.reading], rows=columns)
        return [*changes, Change(one.reading, LayerForm.of(Dense, new), error, self.theory(one, kept))]

    def theory(self, one: Units, kept: np.ndarray) -> tuple[str, float] | None:
        """What theory says of the error in what the units make: name and relative value; None: nothing."""
        return None


def expand(kept: np.ndarray, size: int) -> np.ndarray:
    """The channels of units, of `size` channels each."""
    return (kept[:, None] * size + np.arange(size)).ravel()


def unit_costs(setting: Setting, one: Units) -> float:
    """The multiplications of a token that one unit takes, in all layers around it."""
    layers = [find(setting.model, path) for path in (*one.making, one.reading)]
    return sum(layer.in_features * layer.out_features for layer in layers) / one.count
