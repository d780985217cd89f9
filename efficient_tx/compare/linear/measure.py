"""Measurements of the weight structures: size, time beside a dense layer, error of projecting a trained weight."""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.compare.timing import PASSES, Cell, compile_pass, in_turns
from efficient_tx.linear import LINEAR

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of one comparison. A structure may store `share` of a dense layer's bytes when errors are compared."""

    features: tuple[int, ...]
    tokens: int = 8192
    rounds: int = 5
    share: float = 0.5


@dataclass
class Row:
    """A structure without a bias, either timed at one width or projected at the size of the dense weight.

    Attributes:
      options: those that are not its defaults.
      packed: whether this is the `pack()` of the trained layer, for inference only.
      parameters: number of trained scalars; 0 for a packed layer.
      multiplies: multiplications for one token.
      stored: bytes of the layer's arrays.
      cells: by pass, if it was timed.
      error: ‖W − Ŵ‖ / ‖W‖ in Frobenius norm, for the dense weight W; None if it was timed.
    """

    structure: str
    options: Options
    packed: bool
    in_features: int
    out_features: int
    parameters: int
    multiplies: int
    stored: int
    cells: dict[str, Cell] = field(default_factory=dict)
    error: float | None = None

    @property
    def name(self) -> str:
        """ "monarch, blocks 4" """
        options = [f"{key} {value}" for key, value in self.options.items()]
        return ", ".join([self.structure, *options, *(["packed"] if self.packed else [])])

    def seconds(self, name: str = "forward_backward") -> float | None:
        return self.cells[name].seconds if name in self.cells else None


def layer(structure: str, n: int, m: int, options: Options) -> nnx.Module:
    return LINEAR[structure](n, m, use_bias=False, rngs=nnx.Rngs(0), **options)


def describe(structure: str, n: int, m: int, options: Options, *, packed: bool = False) -> Row:
    """The row of a structure before any measurement."""
    trained = nnx.eval_shape(lambda: layer(structure, n, m, options))
    kept = nnx.eval_shape(lambda: layer(structure, n, m, options).pack()) if packed else trained
    parameters = 0 if packed else trained.parameters
    return Row(structure, options, packed, n, m, parameters, trained.multiplies, kept.bytes_stored)


def inference(structure: str, n: int, m: int, options: Options) -> Row:
    """The row of a structure as it is stored for inference: packed, if it can be."""
    return describe(structure, n, m, options, packed=hasattr(LINEAR[structure], "pack"))


def compare(
    structures: Sequence[str], settings: Settings, progress: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Times the structures, and dense, at every width; `progress` gets a line on each step."""
    rows = []
    for width in settings.features:
        at_width = [
            describe(structure, width, width, options)
            for structure in LINEAR
            if structure in structures or structure == "dense"
            for options in LINEAR[structure].timed_with(width)
        ]
        for row in at_width:
            rows.append(row)
            if hasattr(LINEAR[row.structure], "pack"):
                rows.append(describe(row.structure, width, width, row.options, packed=True))
        measure([row for row in rows if row.in_features == width], settings, progress)
    return rows


def measure(rows: Sequence[Row], settings: Settings, progress: Callable[[str], None]) -> None:
    """Times rows of one width, all in turns, and fills in their cells."""
    runs, memory = {}, {}
    x = jax.random.normal(jax.random.key(0), (settings.tokens, rows[0].in_features))
    for i, row in enumerate(rows):
        progress(f"{row.in_features} features: compiling {row.name}")
        for name in PASSES[:1] if row.packed else PASSES:
            runs[i, name], memory[i, name] = compile_pass(name, *case(row, x))
    progress(f"{rows[0].in_features} features: measuring")
    for (i, name), seconds in in_turns(runs, settings.rounds, math.inf).items():
        rows[i].cells[name] = Cell(seconds, temporary_bytes=memory[i, name])


def case(row: Row, x: jax.Array) -> tuple[Callable, Any]:
    """The call to time, `call(arrays)`, and its arrays: parameters and tokens, which both get gradients."""
    made = layer(row.structure, row.in_features, row.out_features, row.options)
    graphdef, state = nnx.split(made.pack() if row.packed else made)
    return lambda arrays: nnx.merge(graphdef, arrays["state"])(arrays["x"]), {"state": state, "x": x}


def project(
    structures: Sequence[str], kernel: jax.Array, share: float, progress: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """The error of each structure as an approximation of a dense weight `[in, out]` within `share` of its bytes.

    Each structure has the largest size that fits, or its smallest size if none fits.
    """
    n, m = kernel.shape
    rows = []
    for structure in structures:
        if structure == "dense":
            continue
        progress(f"projecting onto {structure}")
        row = inference(structure, n, m, equal_bytes(structure, n, m, share))
        near = LINEAR[structure].from_dense(kernel, **row.options).to_dense()
        row.error = float(jnp.linalg.norm(kernel - near) / jnp.linalg.norm(kernel))
        rows.append(row)
    return rows


def equal_bytes(structure: str, n: int, m: int, share: float) -> Options:
    """The options of the largest n × m weight within `share` of a dense one's bytes, or of the smallest weight."""
    sized_by = LINEAR[structure].sized_by(n, m)
    if sized_by is None:
        return {}
    option, sizes = sized_by
    budget = share * inference("dense", n, m, {}).stored
    fitting = bisect.bisect_right(sizes, budget, key=lambda value: inference(structure, n, m, {option: value}).stored)
    return {option: sizes[max(0, fitting - 1)]}
