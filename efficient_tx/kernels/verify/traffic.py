"""The bytes that a TPU kernel moves between main and on-chip memory, by its grid and block specs.

A grid's steps run one after another, the last axis fastest, and a block is copied where its index is not that of the
step before: outputs as often as inputs. So the account needs the indices of all steps, which may depend on lists of
blocks that the program computes: it is run on the host, with zeros for what kernels return.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST_STEPS = 1 << 22


@dataclass(frozen=True)
class Traffic:
    """Attributes:
    kernel: name of its call.
    moved: bytes copied.
    once: bytes of all inputs and outputs.
    """

    kernel: str
    moved: int
    once: int

    def ratio(self, least: float = 0.0) -> float:
        """To the lower bound: every number once, or `least` where that is more."""
        return self.moved / max(self.once, least)


def traffic(function: Callable, *arguments: Any, of: Callable[..., Traffic]) -> list[Traffic]:
    """The account of every Pallas call in a function of arrays.

    Args:
      function: of the arguments.
      of: the account of one call.

    Raises:
      ValueError: a grid has more than four million steps.
    """
    found: list[Traffic] = []

    def note(equation, operands):
        found.append(of(equation, operands))
        return [jnp.zeros(x.aval.shape, x.aval.dtype) for x in equation.outvars]

    evaluate(jax.make_jaxpr(function)(*arguments), jax.tree.leaves(arguments), {"pallas_call": note})
    return found


def evaluate(program: Any, arguments: Sequence, instead: Mapping[str, Callable[[Any, list], list]]) -> list:
    """The outputs of a closed jaxpr, with functions of an equation and its operands `instead` of some primitives."""
    jaxpr = program.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*program.consts, *arguments)))

    def value(atom):
        return atom.val if hasattr(atom, "val") else values[atom]

    for equation in jaxpr.eqns:
        operands, primitive = [value(atom) for atom in equation.invars], equation.primitive
        if primitive.name in instead:
            results = instead[primitive.name](equation, operands)
        elif inner := called(equation):
            results = evaluate(inner, operands, instead)
        else:
            results = primitive.bind(*operands, **equation.params)
            results = results if primitive.multiple_results else [results]
        values |= zip(equation.outvars, results)
    return [value(atom) for atom in jaxpr.outvars]


def called(equation: Any) -> Any:
    """The program of an equation that is no more than a call of it."""
    if equation.primitive.name in ("jit", "pjit", "remat2", "checkpoint"):
        return equation.params["jaxpr"]
    return equation.params.get("call_jaxpr")


def account(equation: Any, operands: list) -> Traffic:
    mapping = equation.params["grid_mapping"]
    grid = tuple(map(int, mapping.grid))
    if math.prod(grid) > MOST_STEPS:
        raise ValueError(f"a grid of {' × '.join(map(str, grid))} steps is too large for an account")
    steps = [axis.ravel() for axis in np.indices(grid, np.int32)]
    lists = operands[: mapping.num_index_operands]
    moved = once = 0
    for block in mapping.block_mappings:
        array = block.array_aval
        size = math.prod(length(x) for x in block.block_shape) * array.dtype.itemsize
        moved += size * copies(block.index_map_jaxpr, steps, lists)
        once += array.size * array.dtype.itemsize
    return Traffic(equation.params["name"] or "kernel", moved, once)


def length(size: Any) -> int:
    """Of a block's axis: a number, an object of Pallas that has one, or 1 where the axis is left out."""
    return size if isinstance(size, int) else getattr(size, "block_size", 1)


def copies(index_map: Any, steps: list[np.ndarray], lists: list) -> int:
    """How often the index of a block changes along the steps, the first copy included."""
    if not steps:
        return 1

    def entry(equation, operands):
        source, *numbers = operands
        place = jax.tree.leaves(jax.tree.unflatten(equation.params["tree"], numbers))
        return [jnp.asarray(source)[tuple(place)]]

    index = jax.vmap(lambda *step: tuple(evaluate(index_map, (*step, *lists), {"get": entry})))(*steps)
    index = np.stack([np.broadcast_to(x, steps[0].shape) for x in index])
    return 1 + int((index[:, 1:] != index[:, :-1]).any(0).sum())
