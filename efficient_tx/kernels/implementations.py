"""Choice of a kernel's implementation: the requested one, or the best one that supports the arguments."""

from collections.abc import Mapping
from types import ModuleType


def choose(op: str, implementations: Mapping[str, ModuleType], implementation: str | None, **request) -> str:
    """The requested name; None picks the first implementation whose `unsupported(**request)` gives no reason.

    Raises:
      ValueError: `op` has no implementation of that name, or it does not support the request; the message has the
        reason.
    """
    reasons = {name: module.unsupported(**request) for name, module in implementations.items()}
    if implementation is None:
        implementation = next((name for name, reason in reasons.items() if reason is None), next(iter(reasons)))
    if implementation not in reasons:
        raise ValueError(f"{op} has no implementation {implementation!r}: choose one of {', '.join(reasons)}")
    if reasons[implementation]:
        raise ValueError(f"{op} cannot use implementation {implementation!r}: {reasons[implementation]}")
    return implementation
