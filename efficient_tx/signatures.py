"""One signature for the constructor of a class: its own arguments and those of its base classes.

nnx's metaclass hides a module's arguments from `help()` and notebooks. A constructor that passes `**others` to its base
class hides the arguments of that class.
"""

import inspect
from collections.abc import Iterable
from inspect import Parameter, Signature


def constructor(cls: type, options: Iterable[Parameter] = ()) -> Signature:
    """The arguments of `cls(...)`: those of its `__init__` and, if it takes `**others`, those of the next base class.

    Args:
      cls: any class.
      options: further keyword arguments of the constructor; they come first.
    """
    found: dict[str, Parameter] = {option.name: option for option in options}
    for base in cls.__mro__:
        if base is object or "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL):
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return Signature(sorted(found.values(), key=lambda parameter: parameter.kind))
