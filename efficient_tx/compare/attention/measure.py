"""Measurements of the attention variants: parameters, approximation error, time and memory."""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention import ATTENTION, Mixer
from efficient_tx.compare.attention import inputs
from efficient_tx.compare.timing import PASSES, Cell, compile_pass, exponent, in_turns, predict

# Draws over which the error of a sampling method is averaged.
DRAWS = 4
# Up to this length no shorter call is needed as a probe: even n³ operations take about a second.
HARMLESS = 256


@dataclass(frozen=True)
class Settings:
    """Settings of one comparison. `lengths` ascend, and `error_length` is one of them."""

    lengths: tuple[int, ...]
    budget: int = 128
    max_seconds: float = 20.0
    batch: int = 8
    heads: int = 2
    head_dim: int = 32
    rounds: int = 5
    error_length: int = 1024

    @property
    def features(self) -> int:
        return self.heads * self.head_dim


@dataclass
class Row:
    """All results of one variant.

    Attributes:
      timed: "function", or "module" for a mixer without a pure function.
      parameters: of the module at width heads · head_dim and the longest length.
      approximates: the name of its exact counterpart; its own name if it is one; None if it approximates nothing.
      errors: by input family, relative to the counterpart in Frobenius norm; empty without a counterpart.
      cells: by length and pass.
    """

    name: str
    paper: str
    computes: str
    cost: str
    causal: bool
    timed: str
    parameters: int
    approximates: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    cells: dict[int, dict[str, Cell]] = field(default_factory=dict)

    def seconds(self, name: str = "forward_backward") -> dict[int, float]:
        """Seconds of one pass, at the lengths where it was measured."""
        return {length: cell[name].seconds for length, cell in self.cells.items() if cell[name].seconds is not None}

    @property
    def exponent(self) -> float | None:
        """Exponent of the growth of forward and backward with the length."""
        return exponent(self.seconds())

    @property
    def subquadratic(self) -> bool:
        return not re.search("n[²³]", self.cost)


def compare(names: list[str], settings: Settings, progress: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Measures the variants `names`; `progress` gets a line on each step."""
    rows = [describe(name, settings) for name in names]
    for count, row in enumerate(rows, 1):
        progress(f"error of {row.name}, {count} of {len(rows)}")
        row.approximates, row.errors = errors(row.name, settings)
    known = {name: {a_pass: {} for a_pass in PASSES} for name in names}
    for shorter, length in itertools.pairwise((0, *settings.lengths)):
        for rung in rungs(shorter, length):
            unsure = [row for row in rows if may_be_too_slow(known[row.name], length, settings.max_seconds)]
            measure(unsure, rung, known, settings, progress)
        cells = measure(rows, length, known, settings, progress)
        for row in rows:
            row.cells[length] = cells[row.name]
    return rows


def rungs(shorter: int, length: int) -> list[int]:
    """Lengths between two requested ones. Calls there predict the time at the longer one."""
    ladder = itertools.takewhile(lambda rung: rung < length, (HARMLESS * 4**i for i in itertools.count()))
    return [rung for rung in ladder if rung > shorter]


def may_be_too_slow(known: Mapping[str, Mapping[int, float]], length: int, max_seconds: float) -> bool:
    """Whether a call at `length` would exceed the limit if the time grew as steeply as possible from known times."""
    worst = [predict(dict(sorted(seconds.items())[-1:]), length) for seconds in known.values()]
    return any(seconds is None or seconds > max_seconds for seconds in worst)


def measure(
    rows: list[Row], length: int, known: dict[str, dict[str, dict[int, float]]], settings: Settings,
    progress: Callable[[str], None],
) -> dict[str, dict[str, Cell]]:  # fmt: skip
    """The cells of one length, all variants in turns.

    `known` has the seconds by variant, pass and length. Those at shorter lengths give predictions; new ones are added.
    """
    runs, memory, predicted = {}, {}, {}
    given = inputs.tokens("random", settings.batch, length, settings.heads, settings.head_dim)
    for count, row in enumerate(rows, 1):
        progress(f"length {length}: compiling {row.name}, {count} of {len(rows)}")
        for a_pass in PASSES:
            cell = row.name, a_pass
            predicted[cell] = predict(known[row.name][a_pass], length)
            if predicted[cell] is None or predicted[cell] <= settings.max_seconds:
                runs[cell], memory[cell] = compile_pass(a_pass, *case(row.name, given, settings))
    progress(f"length {length}: measuring")
    say = lambda line: progress(f"length {length}: measuring, {line}")  # noqa: E731
    seconds = in_turns(runs, settings.rounds, settings.max_seconds, say)
    cells = {row.name: {} for row in rows}
    for cell, prediction in predicted.items():
        variant, a_pass = cell
        cells[variant][a_pass] = Cell(seconds.get(cell), prediction, memory.get(cell))
        if cell in seconds:
            known[variant][a_pass][length] = seconds[cell]
    return cells


def case(name: str, given: dict[str, jax.Array], settings: Settings) -> tuple[Callable, Any, jax.Array, jax.Array]:
    """The call to time, `call(arrays, mask, key)`, and its arguments. All tokens are real; samplers draw as in a step.

    The call is the pure function. A mixer without one is called as a module, on tokens of width heads · head_dim.
    """
    variant = ATTENTION[name]
    batch, length = given["q"].shape[:2]
    mask, keys = jnp.ones((batch, length), bool), jax.random.split(jax.random.key(0), batch)
    if variant.projections:
        arrays, options = inputs.arguments(variant, given, settings.budget)
        return function_call(variant, options), arrays, mask, keys
    graphdef, parameters = nnx.split(module(variant, length, settings))
    arrays = {"parameters": parameters, "x": given["q"].reshape(batch, length, -1)}

    def call(arrays, mask, keys):
        key = keys if variant.draws else None
        return nnx.merge(graphdef, arrays["parameters"])(arrays["x"], mask=mask, key=key)

    return call, arrays, mask, keys


def function_call(variant: type[Mixer], options: Mapping[str, Any]) -> Callable:
    """(arrays, mask, keys) -> the variant's function of them; only samplers get the keys."""
    function, draws = variant.function, variant.draws
    return lambda arrays, mask, keys: function(**arrays, **options, mask=mask, key=keys if draws else None)


def module(variant: type[Mixer], max_len: int, settings: Settings) -> Mixer:
    """The mixer of a variant."""
    return variant(
        settings.features, heads=settings.heads, head_dim=settings.head_dim, max_len=max_len, rngs=nnx.Rngs(0),
        **variant.within(settings.budget),
    )  # fmt: skip


def describe(name: str, settings: Settings) -> Row:
    """The row of a variant before any measurement."""
    variant = ATTENTION[name]
    shapes = nnx.eval_shape(lambda: module(variant, settings.lengths[-1], settings))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
    return Row(
        name, variant.paper, variant.computes, variant.cost, variant.can_be_causal,
        "function" if variant.projections else "module", parameters,
    )  # fmt: skip


def counterpart(variant: type[Mixer]) -> Callable | None:
    """The exact function that a variant is compared with; its own function if others are compared with that."""
    is_one = variant.function in [other.exact for other in ATTENTION.values() if other.exact]
    return variant.function if is_one else variant.exact


def errors(name: str, settings: Settings) -> tuple[str | None, dict[str, float]]:
    """The name of a variant's counterpart, and ‖out − exact‖ / ‖exact‖ by family of inputs, means over the draws."""
    variant = ATTENTION[name]
    exact = counterpart(variant)
    if exact is None or not variant.projections:
        return None, {}
    found, approximation = {}, None
    for family in inputs.FAMILIES:
        given = inputs.tokens(family, settings.batch, settings.error_length, settings.heads, settings.head_dim)
        arrays, options = inputs.arguments(variant, given, settings.budget)
        static = tuple(inputs.shared(exact, options).items())
        approximation = approximation or jax.jit(function_call(variant, options))
        mask = jnp.ones(given["q"].shape[:2], bool)
        expected = exact_program(exact, static)(inputs.shared(exact, arrays), mask)
        draws = [
            approximation(arrays, mask, jax.random.split(jax.random.key(draw), settings.batch))
            for draw in range(DRAWS if variant.draws else 1)
        ]
        norm = jnp.linalg.norm
        found[family] = float(sum(norm(out - expected) for out in draws) / norm(expected) / len(draws))
    names = {other.function: key for key, other in ATTENTION.items()}
    return names.get(exact, exact.__name__), found


@cache
def exact_program(exact: Callable, options: tuple[tuple[str, Any], ...]) -> Callable:
    """(arrays, mask) -> an exact function of them, compiled once for all variants that are compared with it."""
    return jax.jit(lambda arrays, mask: exact(**arrays, **dict(options), mask=mask))
