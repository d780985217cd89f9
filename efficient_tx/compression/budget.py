"""Budget: the largest plan of a method whose layers cost at most a share of what they cost now."""

from efficient_tx.checks import OptionError
from efficient_tx.compression.method import Method, Plan

# Halvings of the interval of amounts: closer than one rank of 2**20.
HALVINGS = 20


def within(method: Method, budget: float, unit: str) -> tuple[Plan, float, float]:
    """The plan with the largest amount within the budget, and the costs of its layers before and after.

    Args:
      method: prepared.
      budget: share of the present cost of the layers that are touched, in (0, 1].
      unit: of the costs, for the message.

    Raises:
      OptionError: the method cannot meet the budget.
    """
    setting = method.setting

    def cost(amount: float) -> tuple[Plan, float, float]:
        plan = method.plan(amount)
        return plan, *setting.total(plan)

    least = cost(0.0)
    if least[2] > budget * least[1]:
        smallest = f"its smallest layers take {least[2] / least[1]:.3f} of the present {unit}"
        raise OptionError("budget", budget, f"{type(method).__name__} cannot meet it: {smallest}")
    low, high = 0.0, 1.0
    best = least
    whole = cost(1.0)
    if whole[2] <= budget * whole[1]:
        return whole
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = cost(middle)
        if tried[2] <= budget * tried[1]:
            low, best = middle, tried
        else:
            high = middle
    return best


def check_budget(budget: float) -> None:
    """Raises OptionError unless the budget is in (0, 1]."""
    if not 0 < budget <= 1:
        raise OptionError("budget", budget, "it must be above 0 and at most 1, the share of the cost that may stay")
