"""Options: the keyword arguments of a variant's pure function, declared only there."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

import jax

Function = TypeVar("Function", bound=Callable[..., jax.Array])

# Keyword arguments of a function that are no options: a mixer passes them at each call or has them as its own.
GIVEN = frozenset({"mask", "key", "causal", "max_len"})


def options(function: Callable | None) -> dict[str, inspect.Parameter]:
    """The options of a variant's function by name: its keyword-only arguments with defaults that are no arrays."""
    if function is None:
        return {}
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
        and parameter.default is not parameter.empty
        and name not in GIVEN
        and jax.Array not in (parameter.annotation, *get_args(parameter.annotation))
    }


def checked_by(check: Callable[..., None]) -> Callable[[Function], Function]:
    """Checks the options of a variant's function with `check`: before each call and when a mixer is constructed.

    The arguments of `check` are those keyword arguments of the function that it needs, `causal` included. It raises
    ValueError for a value that cannot work.
    """
    looked_at = inspect.signature(check).parameters

    def decorate(function: Function) -> Function:
        defaults = {name: p.default for name, p in inspect.signature(function).parameters.items() if name in looked_at}

        @functools.wraps(function)
        def checked(*args: jax.Array, **kwargs: Any) -> jax.Array:
            check_options(checked, kwargs)
            return function(*args, **kwargs)

        checked.check, checked.defaults = check, defaults
        return checked

    return decorate


def check_options(function: Callable | None, given: Mapping[str, Any]) -> None:
    """Raises ValueError for the first option in `given` that the function's check refuses."""
    if hasattr(function, "check"):
        function.check(**{name: given.get(name, default) for name, default in function.defaults.items()})
