"""What a class of modules takes: the arguments of its constructor and of its bases', in one signature.

nnx's metaclass hides the arguments of a module from `help()` and notebooks, and a constructor that passes `**others`
on to its base hides the base's.
"""

import inspect
from collections.abc import Iterable
from inspect import Parameter, Signature


def constructor(cls: type, options: Iterable[Parameter] = ()) -> Signature:
    """The arguments of `cls(...)`: those of its `__init__`, and where that takes `**others`, of the next base's too.

    Args:
      cls: any class.
      options: keyword arguments that the constructor takes besides; they come first.
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
