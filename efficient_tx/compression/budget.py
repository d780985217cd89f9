"""Budget: the largest plan of a method whose layers cost at most a share of what they cost now."""

from flax import nnx

from efficient_tx.checks import OptionError
from efficient_tx.compression.cost import Costs
from efficient_tx.compression.method import Method, Plan
from efficient_tx.compression.model import select


def within(method: Method, budget: float, unit: str) -> tuple[Plan, float, float]:
    """The largest plan within the budget, and the costs of its layers before and after.

    Args:
      method: prepared.
      budget: share of the present cost of the layers that are touched, in (0, 1].
      unit: of the costs, for the message.

    Raises:
      OptionError: the method cannot meet the budget.
    """
    plan = method.largest(budget)
    before, after = method.setting.total(plan)
    if after > budget * before:
        smallest = f"its smallest layers take {after / before:.3f} of the present {unit}"
        raise OptionError("budget", budget, f"{method.name} cannot meet it: {smallest}")
    return plan, before, after


def of_touched(method: Method, model: nnx.Module, budget: float, where: str, unit: str = "bytes") -> float:
    """The budget of the layers that a method changes, from one of all selected layers: the others count as they are.

    Args:
      method: need not be prepared.
      model, where, unit: as of `compress`.
      budget: share of the present cost of all layers that `where` selects, in (0, 1].

    Raises:
      OptionError: the others alone cost as much as the budget, or more.
      ValueError: as `compress`.
    """
    layers, costs = select(model, where), Costs(unit)
    cost = {layer.path: costs.of(layer.module) for layer in layers}
    whole, touched = sum(cost.values()), sum(cost[layer.path] for layer in method.chosen(model, layers))
    left = budget * whole - (whole - touched)
    if left <= 0:
        others = f"the layers that it leaves as they are take {1 - touched / whole:.3f} of the present {unit}"
        raise OptionError("budget", budget, f"{method.name} cannot meet it: {others}")
    return budget if touched == whole else left / touched


def check_budget(budget: float) -> None:
    """Raises OptionError unless the budget is in (0, 1]."""
    if not 0 < budget <= 1:
        raise OptionError("budget", budget, "it must be above 0 and at most 1, the share of the cost that may stay")
