"""What an operation says about itself: the calls at whose sizes it is used, which are compiled and run.

A file `kernels/<operation>/cases.py` has

    AXES    name of an axis -> its values, numbers and strings: the sizes, dtypes and options that it is used with; the
            number of tokens is the first
    SMALL   other values of some of these axes, with which interpreters run it and a device checks it
    case    function of one value of every axis, passed by name, that returns a `Case`, or None where they do not fit

CI compiles a selection of AXES with every pair of values, `verify --all` one with every triple, so that lengths
cost little and long lists of options cost much. Example:

    AXES = {"tokens": (1024, 65536), "features": (1024, 4096), "dtype": ("bfloat16", "float32")}
    SMALL = {"tokens": (1, 200), "features": (64,)}

    def case(tokens, features, dtype):
        square = shape(dtype, 4, features // 4, features // 4)
        return Case(monarch, (shape(dtype, tokens, features), square, square))
"""

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Most bytes of temporaries, as a multiple of those of arguments, outputs and what is saved for the backward pass.
MOST_TEMPORARIES = 1.25

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
Values = dict[str, int | str]

# Operations with a file of cases.
OPERATIONS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/cases.py")))


def shape(dtype: str, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


def normal(r: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    return r.normal(size=sizes)


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
      function: called with the arrays, and with the keywords `implementation` and `interpret` of every operation.
      arrays: shapes and dtypes; the arrays of a floating dtype are differentiated.
      draws: of what distribution the arrays are that are not standard normal, by their number.
      without: implementations that have a reason against this call: there the fallback is compiled.
      traffic: the least bytes between main and on-chip memory for the bytes of the latter, where reading and writing
        every array once is not the least.
      temporaries: most bytes of them around a kernel, as `MOST_TEMPORARIES`.
    """

    function: Callable[..., Any]
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    draws: Mapping[int, Draw] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    traffic: Callable[[int], float] | None = None
    temporaries: float = MOST_TEMPORARIES

    def forward(self, **keywords: Any) -> Callable[..., Any]:
        """The function of a tuple of arrays that returns the outputs."""
        return lambda arrays: self.function(*arrays, **keywords)

    def gradient(self, **keywords: Any) -> Callable[..., Any]:
        """The function of arrays and cotangents of the outputs that returns outputs and cotangents of the arrays."""

        def run(arrays, cotangents):
            outputs, pull = self.vjp(arrays, keywords)
            return outputs, pull(cotangents)[0]

        return run

    def vjp(self, arrays: tuple, keywords: Mapping[str, Any]) -> tuple[Any, Callable]:
        floats = {n: x for n, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.inexact)}
        return jax.vjp(lambda some: self.function(*(some.get(n, x) for n, x in enumerate(arrays)), **keywords), floats)

    def outputs(self) -> Any:
        """Shapes and dtypes of the outputs."""
        return jax.eval_shape(self.function, *self.arrays)

    def saved_bytes(self) -> int:
        """Bytes kept for the backward pass beside the arrays: outputs and statistics."""
        kept = jax.eval_shape(lambda arrays: self.vjp(arrays, {})[1], self.arrays)
        return max(0, nbytes(kept) - nbytes(self.arrays))

    def drawn(self, seed: int) -> tuple[np.ndarray, ...]:
        """Arrays of the call; differentiated ones are float64, of values that their own dtype has."""
        r = np.random.default_rng(seed)
        arrays = [self.draws.get(n, normal)(r, x.shape).astype(x.dtype) for n, x in enumerate(self.arrays)]
        return tuple(x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in arrays)

    def filled(self, seed: int, normal: Callable[[int, jax.ShapeDtypeStruct], jax.Array]) -> tuple[jax.Array, ...]:
        """Arrays of the call, as drawn where `draws` says how, else `normal(number, shape and dtype)`."""
        r = np.random.default_rng(seed)
        return tuple(
            jnp.asarray(self.draws[n](r, x.shape), x.dtype) if n in self.draws else normal(n, x)
            for n, x in enumerate(self.arrays)
        )


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def cases_of(operation: str) -> Any:
    """The module of an operation's cases."""
    return importlib.import_module(f"efficient_tx.kernels.{operation}.cases")


def production(operation: str) -> Iterator[Values]:
    """All combinations of values of an operation's axes that fit."""
    return combinations(operation, cases_of(operation).AXES)


def small(operation: str) -> Iterator[Values]:
    """Those with its small sizes."""
    module = cases_of(operation)
    return combinations(operation, module.AXES | module.SMALL)


def short(operation: str) -> Iterator[Values]:
    """Those of few tokens, which otherwise have the sizes that it is used with; of most tokens first."""
    module = cases_of(operation)
    tokens = next(iter(module.AXES))
    return combinations(operation, module.AXES | {tokens: sorted(module.SMALL[tokens], reverse=True)})


def combinations(operation: str, axes: Mapping[str, tuple]) -> Iterator[Values]:
    for row in itertools.product(*axes.values()):
        values = dict(zip(axes, row))
        if cases_of(operation).case(**values) is not None:
            yield values


def label(operation: str, values: Values) -> str:
    """The name of a case in tables and tests: "monarch 1024 4096 bfloat16"."""
    return " ".join((operation, *map(str, values.values())))
