"""Frozen dataclasses as pytrees: fields that hold arrays are leaves, all others are static."""

import dataclasses
import inspect
from typing import Any

import jax


class ArrayFields:
    """A base of frozen dataclasses; a subclass is registered as a pytree when it is defined.

    Arrays, and objects of this kind, are children; the other fields are static: compared and hashed, so that another
    value is another program. Which are which is seen from the values, and remembered by what jax makes of an object.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_pytree_with_keys(cls, cls._flatten_with_keys, cls._unflatten, cls._flatten)

    def check(self) -> None:
        """Raises TypeError, one line, for what jax could not trace: fields that are no fields, or cannot be hashed."""
        kind = type(self).__name__
        own = [name for base in type(self).__mro__ for name in _own_annotations(base)]
        own += [name for name in vars(self) if name != "_children"]
        known = {field.name for field in dataclasses.fields(self)}
        if missing := [name for name in own if name not in known]:
            wanted = f"decorate {kind} with @dataclasses.dataclass(frozen=True)"
            raise TypeError(f"{kind}.{missing[0]} is no field: {wanted}")
        for name, value in self._split()[1]:
            try:
                hash(value)
            except TypeError:
                wanted = "a field is an array, or can be hashed as a number, text or tuple can"
                raise TypeError(f"{kind}.{name} is a {type(value).__name__}: {wanted}") from None
        for value in (getattr(self, name) for name in self._split()[0]):
            if isinstance(value, ArrayFields):
                value.check()

    def _split(self):
        """The names of the children, and name and value of the static fields."""
        names = [field.name for field in dataclasses.fields(self)]
        children = self.__dict__.get("_children")
        if children is None:
            children = tuple(name for name in names if _is_child(getattr(self, name)))
        return children, tuple((name, getattr(self, name)) for name in names if name not in children)

    def _flatten(self):
        children, static = self._split()
        return tuple(getattr(self, name) for name in children), (children, static)

    def _flatten_with_keys(self):
        values, known = self._flatten()
        return tuple(zip(map(jax.tree_util.GetAttrKey, known[0]), values)), known

    @classmethod
    def _unflatten(cls, known, values):
        children, static = known
        self = object.__new__(cls)
        for name, value in ("_children", children), *static, *zip(children, values):
            object.__setattr__(self, name, value)
        return self


def _is_child(value: Any) -> bool:
    return isinstance(value, ArrayFields) or (hasattr(value, "shape") and hasattr(value, "dtype"))


def _own_annotations(base: type) -> list[str]:
    if not issubclass(base, ArrayFields):
        return []
    return [name for name, kind in inspect.get_annotations(base).items() if "ClassVar" not in str(kind)]
