"""Compress: a model within a budget, by one method: statistics, plan, fit."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from flax import nnx

from efficient_tx.checks import one_of
from efficient_tx.compression.budget import check_budget, within
from efficient_tx.compression.cost import UNITS, Costs
from efficient_tx.compression.gradients import Batch, Gradients, Loss
from efficient_tx.compression.method import Change, Method, Setting
from efficient_tx.compression.model import put, select
from efficient_tx.compression.statistics import gather
from efficient_tx.linear.replacement import Path, find


class Compressed(NamedTuple):
    """What a compression did.

    Attributes:
      changes: of all layers that the method touched.
      heads: path -> number of heads, of mixers that lost some.
      before, after: cost of these layers.
    """

    changes: list[Change]
    heads: dict[Path, int]
    before: float
    after: float


def compress(
    model: nnx.Module, method: Method, budget: float, *, where: str = "mlp|projections", unit: str = "bytes",
    batches: Sequence[Batch] = (), loss: Loss | None = None, progress: Callable[[str], None] = lambda what: None,
) -> Compressed:  # fmt: skip
    """Compresses a model in place.

    Args:
      model: with trained values, built with `remat=False`.
      method: one of `METHODS`, made with its options.
      budget: share of the cost of the layers that the method touches, which they may keep, in (0, 1].
      where: which layers: see `model.select`.
      unit: of the cost: bytes (as stored for inference), parameters, multiplications (for a token), or milliseconds
        (measured on this machine).
      batches: of calibration, see `statistics.gather`: for methods that need them, and for the errors of outputs.
      loss: (model, batch) -> the mean loss over the rows of a batch, a scalar; for methods that need gradients.
      progress: gets a line on each step.

    Raises:
      ValueError: a budget that is out of range or that the method cannot meet, a pattern that selects nothing, a layer
        that cannot be changed, no calibration data, or weights or inputs that are not finite. After this and any other
        error the model is as before.
    """
    check_budget(budget)
    one_of(UNITS, unit=unit)
    if "gradients" in method.needs and loss is None:
        raise ValueError(f"{method.name} needs gradients: give compress(..., loss=), the loss of the task")
    made = nnx.clone(model)  # with the same arrays
    layers = method.chosen(made, select(made, where))
    inputs, gradients = {}, None
    if "inputs" in method.needs or batches:
        triangles = method.triangles(made, layers)
        inputs = gather(
            made, layers, batches, triangles=triangles, progress=lambda done: progress(f"calibration batch {done}")
        )
    if "gradients" in method.needs:
        gradients = Gradients(made, layers, loss, batches, lambda done: progress(f"gradients of batch {done}"))
    progress("preparing")
    costs = Costs(unit)
    method.prepare(
        Setting(made, layers, inputs, costs, {layer.path: costs.of(layer.module) for layer in layers}, gradients)
    )
    plan, before, after = within(method, budget, unit)
    changes = method.apply(plan, progress)
    heads = {path: find(made, path).heads for path in plan.kept if hasattr(find(made, path), "heads")}
    for change in changes:
        put(model, change.path, find(made, change.path))
    for path, count in heads.items():
        find(model, path).heads = count
    return Compressed(changes, heads, before, after)
