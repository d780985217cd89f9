"""The bytes that a GPU kernel loads from and stores to main memory, by its own loads and stores.

A Triton kernel computes the addresses that it reads and how often its loops turn, from its place in the grid and from
lists of blocks. So the kernel's program is followed with these integers for all places of the grid at once, and without
the numbers: a load counts its bytes, also where a mask leaves out some, and an atomic addition counts twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.kernels.verify.traffic import Traffic, evaluate, length

LOADS = ("get", "masked_load")
STORES = ("swap", "masked_swap")
ADDITIONS = ("addupdate", "atomic_rmw")
# An integer whose value is not followed.
UNKNOWN = None


@dataclass(frozen=True)
class Array:
    """An array in main memory as a kernel sees it.

    Attributes:
      values: of integers, otherwise None.
      start: first element of the block along each axis, for each place of the grid.
      kept: axes that the block keeps.
    """

    values: np.ndarray | None
    start: Sequence[np.ndarray] = ()
    kept: Sequence[int] = ()


@dataclass
class Followed:
    """A kernel at all places of its grid.

    Attributes:
      places: the indices of each place, an array for each axis of the grid.
      moved: bytes so far.
    """

    places: Sequence[np.ndarray]
    moved: int = field(default=0)

    def run(self, jaxpr: Any, arguments: Sequence[Any], active: np.ndarray) -> list[Any]:
        """The values of the outputs, of the places that are `active`; integers are `[places]` or one for all."""
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))

        def value(atom):
            return np.asarray(atom.val) if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.eqns:
            operands = [value(atom) for atom in equation.invars]
            results = self.step(equation, operands, active)
            values |= zip(equation.outvars, results, strict=True)
        return [value(atom) for atom in jaxpr.outvars]

    def step(self, equation: Any, operands: list[Any], active: np.ndarray) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        if name in LOADS:
            (out,) = equation.outvars
            self.count(out.aval, active)
            return [loaded(operands, params) if not out.aval.shape else UNKNOWN]
        if name in STORES:
            self.count(equation.outvars[0].aval, active)
            return [UNKNOWN]
        if name in ADDITIONS:
            stored = next(x.aval for x in equation.invars[1:] if hasattr(x.aval, "shape"))
            self.count(equation.outvars[0].aval if equation.outvars else stored, active, times=2)
            return [UNKNOWN] * len(equation.outvars)
        if name == "program_id":
            return [self.places[params["axis"]]]
        if name == "while":
            return self.loop(params, operands, active)
        if name == "scan":
            return self.scan(equation, operands, active)
        if name == "cond":
            return self.branch(params["branches"], operands, active)
        for inner in ("jaxpr", "call_jaxpr"):
            if hasattr(params.get(inner), "jaxpr"):
                return self.run(params[inner].jaxpr, [*params[inner].consts, *operands], active)
        return computed(equation, operands)

    def count(self, aval: Any, active: np.ndarray, times: int = 1) -> None:
        self.moved += times * int(active.sum()) * math.prod(aval.shape) * aval.dtype.itemsize

    def loop(self, params: dict[str, Any], operands: list[Any], active: np.ndarray) -> list[Any]:
        """A loop as often as each place wants it.

        Raises:
          ValueError: that depends on numbers.
        """
        tests, bodies = params["cond_nconsts"], params["body_nconsts"]
        of_test, of_body, carry = operands[:tests], operands[tests : tests + bodies], operands[tests + bodies :]
        while True:
            (goes_on,) = self.run(params["cond_jaxpr"].jaxpr, [*of_test, *carry], active)
            if goes_on is UNKNOWN:
                raise ValueError("a loop turns as often as numbers say")
            active = active & goes_on
            if not active.any():
                return carry
            after = self.run(params["body_jaxpr"].jaxpr, [*of_body, *carry], active)
            carry = [chosen(active, new, old) for new, old in zip(after, carry, strict=True)]

    def scan(self, equation: Any, operands: list[Any], active: np.ndarray) -> list[Any]:
        """A loop of a fixed number of turns, as `fori_loop` makes it.

        Raises:
          ValueError: it runs along arrays.
        """
        body, carried = equation.params["jaxpr"].jaxpr, len(equation.outvars)
        inner, outer = ([x.aval.shape for x in some if hasattr(x.aval, "shape")] for some in
                        ((*body.invars, *body.outvars), (*equation.invars, *equation.outvars)))  # fmt: skip
        if inner != outer:
            raise ValueError("a loop runs along arrays")
        consts, carry = operands[: len(operands) - carried], operands[len(operands) - carried :]
        for _ in range(equation.params["length"]):
            carry = self.run(body, [*consts, *carry], active)
        return carry

    def branch(self, branches: Sequence[Any], operands: list[Any], active: np.ndarray) -> list[Any]:
        """The branch of each place; where numbers choose, the one that moves most."""
        index, *arguments = operands
        if index is UNKNOWN:
            before, costs = self.moved, []
            for branch in branches:
                self.moved = 0
                results = self.run(branch.jaxpr, [*branch.consts, *arguments], active)
                costs.append(self.moved)
            self.moved = before + max(costs)
            return [UNKNOWN] * len(results)
        merged = None
        for number, branch in enumerate(branches):
            here = active & (index == number)
            results = self.run(branch.jaxpr, [*branch.consts, *arguments], here)
            merged = results if merged is None else [chosen(here, new, old) for new, old in zip(results, merged)]
        return merged


def loaded(operands: list[Any], params: dict[str, Any]) -> Any:
    """An integer of a list, at each place of the grid; UNKNOWN of other arrays."""
    source = operands[0]
    if source.values is None:
        return UNKNOWN
    if "tree" in params:
        transforms = jax.tree.unflatten(params["tree"], operands[1:])
    else:
        transforms = jax.tree.unflatten(params["args_tree"], operands)[1]
    within = [x for transform in transforms for x in transform.indices]
    if len(within) != len(source.kept) or any(x is UNKNOWN for x in within):
        return UNKNOWN
    at = list(source.start)
    for axis, offset in zip(source.kept, within):
        at[axis] = at[axis] + offset
    return source.values[tuple(np.clip(x, 0, size - 1) for x, size in zip(at, source.values.shape))]


def chosen(where: np.ndarray, new: Any, old: Any) -> Any:
    if isinstance(new, Array):
        return new
    return UNKNOWN if new is UNKNOWN or old is UNKNOWN else np.where(where, new, old)


def computed(equation: Any, operands: list[Any]) -> list[Any]:
    """The results of an operation on single integers; UNKNOWN of all others."""
    single = all(not out.aval.shape and jnp.issubdtype(out.aval.dtype, np.integer) | (out.aval.dtype == bool)
                 for out in equation.outvars)  # fmt: skip
    if not single or any(x is UNKNOWN or isinstance(x, Array) for x in operands):
        return [UNKNOWN] * len(equation.outvars)
    kept = [x.aval.dtype for x in equation.invars]
    arrays = np.broadcast_arrays(*(np.asarray(x).astype(dtype) for x, dtype in zip(operands, kept)))
    call = lambda *a: equation.primitive.bind(*a, **equation.params)  # noqa: E731
    results = call(*arrays) if not arrays or not arrays[0].ndim else jax.vmap(call)(*arrays)
    return list(map(np.asarray, results if equation.primitive.multiple_results else [results]))


def account(equation: Any, operands: list) -> Traffic:
    """The account of a Pallas call for a GPU whose operands are known."""
    mapping = equation.params["grid_mapping"]
    places = [axis.ravel() for axis in np.indices(tuple(map(int, mapping.grid)), np.int32)]
    jaxpr, once, arrays = equation.params["jaxpr"], 0, []
    given = [*operands, *[None] * (len(mapping.block_mappings) - len(operands))]
    for block, values in zip(mapping.block_mappings, given, strict=True):
        array = block.array_aval
        once += array.size * array.dtype.itemsize
        integers = values is not None and jnp.issubdtype(array.dtype, np.integer)
        start = [
            np.broadcast_to(np.asarray(x) * length(size), places[0].shape)
            for x, size in zip(jax.vmap(lambda *i, m=block.index_map_jaxpr: tuple(evaluate(m, i, {})))(*places),
                               block.block_shape)
        ]  # fmt: skip
        kept = [axis for axis, size in enumerate(block.block_shape) if not squeezed(size)]
        arrays.append(Array(np.asarray(values) if integers else None, start, kept))
    followed = Followed(places)
    followed.run(jaxpr, arrays, np.ones(places[0].shape, bool))
    return Traffic(equation.params["name"] or "kernel", followed.moved, once)


def squeezed(size: Any) -> bool:
    """Whether a block leaves out an axis."""
    return size is None or type(size).__name__ == "Squeezed"
