"""A function that is another one on every platform, of which a program holds, and traces, its own alone.

Which device a program is for is known only when it is lowered: the default backend may be a CPU while the program is
compiled for a TPU. So `jax.lax.platform_dependent` traces all alternatives of each call, and tracing a Pallas kernel
takes longer than what a CPU user runs. Here one alternative is traced for the shapes of the results, a CPU's, and
another one only if the program turns out to be for its platform.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

# The platforms, by jax's names, that an alternative may be for; "default" stands for every other one.
PLATFORMS = ("cpu", "cuda", "tpu")


_portable = ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Within it, a program is lowered for an accelerator with the alternative "default" in place of its own kernels.

    So it has XLA's operations alone, which later versions of jax read: Triton's code has no such promise.
    """
    before = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(before)


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The alternatives of a call as functions of its flat arrays.

    Attributes:
      alternatives: platform, or "default", to function.
      missing: what is said where the program's platform has none.
    """

    alternatives: Mapping[str, Callable]
    missing: str

    def name(self, platform: str) -> str:
        return platform if platform in self.alternatives else "default"

    def __getitem__(self, platform: str) -> Callable:
        name = self.name(platform)
        if name not in self.alternatives:
            raise NotImplementedError(self.missing)
        return self.alternatives[name]

    def of_each(self, rule: Callable) -> "Choice":
        """`rule(function, *arrays)` in place of each function."""
        alternatives = {name: partial(rule, function) for name, function in self.alternatives.items()}
        return Choice(alternatives, self.missing)

    def bind(self, arrays: list) -> list:
        # Not the default backend's: to ask for it starts it, and a run of several processes joins them before.
        shaping = next(name for name in ("cpu", "default", *self.alternatives) if name in self.alternatives)
        jaxpr = jax.jit(self.alternatives[shaping]).trace(*arrays).jaxpr
        return _by_platform.bind(*arrays, choice=self, shaping=shaping, jaxpr=jaxpr)


def by_platform(alternatives: Mapping[str, Callable], *args: Any, missing: str = "") -> Any:
    """`f(*args)` for the alternative `f` of the platform that the program is lowered for.

    The alternatives return the same structure, shapes and dtypes. Works under all of jax's transformations and ahead of
    time, for several platforms at once too. It is meant for use within the rules of a `custom_vjp`: its own
    derivative evaluates `f` again.

    Args:
      alternatives: by platform ("cpu", "cuda", "tpu"), and "default" for all others.
      *args: pytrees of arrays.
      missing: the message where no alternative is for the platform, with which lowering raises NotImplementedError.
    """
    arrays, structure = jax.tree.flatten(args)
    results = None

    def flat(function, *arrays):
        nonlocal results
        leaves, results = jax.tree.flatten(function(*jax.tree.unflatten(structure, arrays)))
        return leaves

    leaves = Choice(alternatives, missing).of_each(flat).bind(arrays)
    return jax.tree.unflatten(results, leaves)


_by_platform = Primitive("by_platform")
_by_platform.multiple_results = True


@_by_platform.def_impl
def _run(*arrays, **params):
    return jax.jit(partial(_by_platform.bind, **params))(*arrays)


@_by_platform.def_abstract_eval
def _shapes(*_, jaxpr: ClosedJaxpr, **__):
    return jaxpr.out_avals


def _mapped(arrays, axes, *, choice: Choice, **_):
    def mapped(function, *arrays):
        return jax.vmap(function, axes)(*arrays)

    results = choice.of_each(mapped).bind(arrays)
    return results, [0] * len(results)


batching.primitive_batchers[_by_platform] = _mapped


def _derivative(arrays, tangents, *, choice: Choice, **params):
    there = [not isinstance(tangent, ad.Zero) for tangent in tangents]
    results = _by_platform.bind(*arrays, choice=choice, **params)
    inexact = [jnp.issubdtype(result.dtype, jnp.inexact) for result in results]

    def derivative(function, *arrays_and_tangents):
        arrays, given = arrays_and_tangents[: len(there)], arrays_and_tangents[len(there) :]

        def of_given(*given):
            return list(compress(function(*replaced(arrays, there, given)), inexact))

        return jax.jvp(of_given, tuple(compress(arrays, there)), given)[1]

    found = choice.of_each(derivative).bind([*arrays, *compress(tangents, there)])
    return results, replaced([ad.Zero(jax.typeof(result).to_tangent_aval()) for result in results], inexact, found)


def _transposed(cotangents, *arrays, choice: Choice, **_):
    """The cotangents of those arrays in which the function is linear."""
    linear = [ad.is_undefined_primal(x) for x in arrays]
    given = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in compress(arrays, linear)]

    def transposed(function, known, cotangents):
        return jax.linear_transpose(lambda *given: function(*replaced(known, linear, given)), *given)(cotangents)

    known = [None if is_linear else x for x, is_linear in zip(arrays, linear)]
    alternatives = {name: partial(transposed, function) for name, function in choice.alternatives.items()}
    found = by_platform(alternatives, known, [ad.instantiate_zeros(x) for x in cotangents], missing=choice.missing)
    return replaced([None] * len(arrays), linear, found)


def replaced(values, where, by):
    """`values`, with those at which `where` is true replaced by the elements of `by`."""
    by = iter(by)
    return [next(by) if is_there else value for value, is_there in zip(values, where)]


ad.primitive_jvps[_by_platform] = _derivative
ad.primitive_transposes[_by_platform] = _transposed


def _lower(context, *arrays, platform: str, choice: Choice, shaping: str, jaxpr: ClosedJaxpr):
    if _portable.get() and platform != "cpu":
        platform = "default"
    function = choice[platform]
    traced = jaxpr_as_fun(jaxpr) if choice.name(platform) == shaping else function
    return mlir.lower_fun(traced, multiple_results=True)(context, *arrays)


mlir.register_lowering(_by_platform, partial(_lower, platform="default"))
for _platform in PLATFORMS:
    mlir.register_lowering(_by_platform, partial(_lower, platform=_platform), platform=_platform)
