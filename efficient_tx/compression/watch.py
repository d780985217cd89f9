"""Watch: makes a module of a model tell what it is called with and what it returns."""

from collections.abc import Callable
from typing import Any

from flax import nnx


def watch(module: nnx.Module, seen: Callable[..., Any]) -> None:
    """Makes a module call seen(out, *arguments, **named) after each of its calls.

    By a class of its own, so that copies of the module do so too: `nnx.merge` makes them from graph definitions.
    """
    kind = type(module)

    class Watched(kind):
        def __call__(self, *arguments, **named):
            out = kind.__call__(self, *arguments, **named)
            seen(out, *arguments, **named)
            return out

    module.__class__ = Watched
