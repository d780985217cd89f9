"""Which implementation of a kernel runs: the one asked for, or the first that can."""

from collections.abc import Mapping
from types import ModuleType


def choose(op: str, implementations: Mapping[str, ModuleType], implementation: str | None, **request) -> str:
    """The name asked for; None picks the first whose `unsupported(**request)` gives no reason against the request.

    Raises:
      ValueError: `op` has none of that name, or it cannot do what is requested, with its reason.
    """
    reasons = {name: module.unsupported(**request) for name, module in implementations.items()}
    if implementation is None:
        implementation = next((name for name, reason in reasons.items() if reason is None), next(iter(reasons)))
    if implementation not in reasons:
        raise ValueError(f"{op} has no implementation {implementation!r}: choose one of {', '.join(reasons)}")
    if reasons[implementation]:
        raise ValueError(f"{op} cannot use implementation {implementation!r}: {reasons[implementation]}")
    return implementation
