"""Form: a weight structure together with its options, as an object: "monarch(blocks=4)"."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args

import jax

from efficient_tx.checks import nearest
from efficient_tx.linear.structured import Weight

# Arguments of every structure, which are no options.
COMMON = ("in_features", "out_features", "use_bias", "dtype", "param_dtype", "rngs")
# Which numbers are an int or a float.
NUMBERS: dict[type, type] = {int: Integral, float: Real}


@dataclass(frozen=True, init=False, repr=False)
class Form:
    """A weight structure with options; hashable, and called like `nnx.Linear`.

    Args:
      structure: a class of `LINEAR`, or one of a user's own.
      **options: options of the structure, as in its constructor; those left out have their defaults.

    Raises:
      ValueError: an option that the structure does not have, or a value of another type. Values out of range are
        refused when a layer is made.
    """

    structure: type[Weight]
    options: tuple[tuple[str, Any], ...]

    def __init__(self, structure: type[Weight], **options: Any):
        object.__setattr__(self, "structure", structure)
        object.__setattr__(self, "options", tuple(sorted(options.items())))
        own = {name: p for name, p in inspect.signature(structure).parameters.items() if name not in COMMON}
        check_options(self.name, own, options)

    @property
    def name(self) -> str:
        """The key in `LINEAR` of a structure of this package; of another one "module:Class"."""
        home, own = self.structure.__module__, self.structure.__qualname__
        if home.startswith(f"{__package__}."):
            return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", own).lower()
        return f"{home}:{own}"

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options)
        return f"{self.name}({options})" if options else self.name

    __repr__ = __str__

    def __call__(self, in_features: int, out_features: int, **common: Any) -> Weight:
        """A layer of this form; `common` as in `nnx.Linear`. Raises ValueError for options that cannot be."""
        return self.structure(in_features, out_features, **common, **dict(self.options))

    def from_dense(self, kernel: jax.Array, bias: jax.Array | None = None, **common: Any) -> Weight:
        """The layer of this form that is nearest to a dense one; see `Weight.from_dense`."""
        return self.structure.from_dense(kernel, bias, **common, **dict(self.options))


def check_options(owner: str, own: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that is not among the `own` ones of `owner`, or a value of another type."""
    for name, value in options.items():
        if name not in own:
            choices = f"choose one of {', '.join(own)} (nearest: {nearest(name, own)!r})" if own else "it has none"
            raise ValueError(f"{owner} has no option {name!r}: {choices}")
        if not fits(value, own[name].annotation):
            wanted = " or ".join(kind.__name__ for kind in kinds(own[name].annotation) if kind is not NoneType)
            raise ValueError(f"{name} is {value!r}: it takes a value of type {wanted}")


def kinds(annotation: Any) -> tuple[Any, ...]:
    """The types in an annotation: those of a union, or the one."""
    return get_args(annotation) or (annotation,)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated type; True for one that is not annotated."""
    if not all(isinstance(kind, type) for kind in kinds(annotation)) or annotation is inspect.Parameter.empty:
        return True
    if isinstance(value, bool):
        return bool in kinds(annotation)
    return isinstance(value, tuple(NUMBERS.get(kind, kind) for kind in kinds(annotation)))
