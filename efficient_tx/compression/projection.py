"""Projection: every layer becomes the nearest weight of one structure, at its own share of the budget."""

import bisect

from flax import nnx

from efficient_tx.compression.layer_form import LayerForm
from efficient_tx.compression.method import ByLayer
from efficient_tx.compression.model import Layer
from efficient_tx.linear import Form
from efficient_tx.linear.replacement import dense_weight
from efficient_tx.linear.structured import Weight


class Projection(ByLayer):
    """The nearest weight of a structure in Frobenius norm, layer by layer: `from_dense` of the structure.

    Args:
      structure: of the new layers.
      **options: of the structure, for all layers. The option that sets its size is chosen by the budget unless given.

    Raises:
      ValueError: an option that the structure does not have, or a value of another type.
    """

    computes = "min ‖W − Ŵ‖ over one structure"

    def __init__(self, structure: type[Weight], **options):
        self.structure, self.options = structure, dict(Form(structure, **options).options)
        self.paper = structure.paper
        self.name = str(Form(structure, **options))

    def form(self, layer: Layer, amount: float) -> LayerForm:
        module = layer.module
        sized = self.structure.sized_by(module.in_features, module.out_features)
        fixed = any(self.options.get(name) == value for name, value in self.structure.of_one_size.items())
        if sized is None or sized[0] in self.options or fixed:
            return LayerForm.of(self.structure, module, **self.options)
        option, values = sized

        def of(value):
            return LayerForm.of(self.structure, module, **self.options, **{option: value})

        limit = amount * self.setting.now(layer.path)
        fitting = bisect.bisect_right(values, limit, key=lambda value: self.setting.then(of(value)))
        return of(values[max(0, fitting - 1)])

    def fit(self, layer: Layer, form: LayerForm) -> tuple[nnx.Module, None]:
        new = form.blank()
        new.project(dense_weight(layer.module))
        if layer.module.bias is not None:
            new.bias[...] = layer.module.bias[...]
        return new, None
