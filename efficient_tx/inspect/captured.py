"""What passes through a model on a batch: the arguments of its mixers' functions, and its hidden states."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.attention import Mixer
from efficient_tx.compression.model import in_order
from efficient_tx.compression.statistics import real
from efficient_tx.compression.watch import watch
from efficient_tx.linear.replacement import Path, dotted, find
from efficient_tx.models.transformer import Block
from efficient_tx.task import model_inputs


class Call(NamedTuple):
    """One call of the `function` of a mixer.

    Attributes:
      name: dotted path of the mixer.
      variant: its class.
      arrays: queries, keys, values and others by the name of the argument, `[batch, length, heads, dim]` as the
        function gets them, after rotation and convolution; with `mask`, bool `[batch, length]`, if there is one.
      options: the other arguments.
    """

    name: str
    variant: type[Mixer]
    arrays: dict[str, jax.Array]
    options: dict[str, Any]

    @property
    def real(self) -> jax.Array:
        """Which tokens are real, bool `[batch, length]`."""
        mask, tokens = self.arrays.get("mask"), self.arrays.get("q", next(iter(self.arrays.values())))
        return jnp.ones(tokens.shape[:2], bool) if mask is None else mask


class Inside(NamedTuple):
    """What passed through a model.

    Attributes:
      calls: of the mixers that call their `function`.
      others: the paths of the mixers that do not, as a recurrent one that calls its kernel itself.
      states: the real tokens after each block, `[tokens, features]` by its path.
    """

    calls: list[Call]
    others: list[str]
    states: dict[str, np.ndarray]


def capture(model: nnx.Module, batch: Mapping[str, Any]) -> Inside:
    """The model on a batch at evaluation, in one compiled pass; the model is not changed."""
    graphdef, params = nnx.split(model)
    mixers = paths_of(model, Mixer)
    blocks = paths_of(model, Block)
    # Filled while the pass is traced.
    static: list[tuple[Path, dict[str, Any]]] = []
    passed: list[Path] = []

    @jax.jit
    def run(params, batch):
        watched = nnx.merge(graphdef, params)
        arrays: list[dict[str, jax.Array]] = []
        states: list[tuple[jax.Array, jax.Array]] = []

        def called(path: Path, given: Mapping[str, Any]) -> None:
            arrays.append({name: value for name, value in given.items() if isinstance(value, jax.Array)})
            static.append((path, {name: value for name, value in given.items() if name not in arrays[-1]}))

        def left(path: Path, x: jax.Array, *given: Any, **named: Any) -> None:
            rows = x.reshape(-1, x.shape[-1])
            states.append((rows, real(len(rows), batch, False)))
            passed.append(path)

        for path in mixers:
            watch_function(find(watched, path), functools.partial(called, path))
        for path in blocks:
            watch(find(watched, path), functools.partial(left, path))
        watched(**model_inputs(batch), key=None)
        return arrays, states

    arrays, states = run(params, dict(batch))
    calls = [
        Call(dotted(path), type(find(model, path)), given, options) for (path, options), given in zip(static, arrays)
    ]
    rows = {dotted(path): np.asarray(x)[np.asarray(kept)] for path, (x, kept) in zip(passed, states)}
    others = [dotted(path) for path in mixers if path not in {path for path, _ in static}]
    return Inside(calls, others, rows)


def paths_of(model: nnx.Module, kind: type[nnx.Module]) -> list[Path]:
    """The paths of all modules of a kind, in the order of the model."""
    return sorted((path for path, node in nnx.iter_modules(model) if isinstance(node, kind)), key=in_order)


def watch_function(mixer: Mixer, seen: Callable[[Mapping[str, Any]], None]) -> None:
    """Makes a mixer call `seen` with the arguments of its function first; one without a function stays as it is."""
    kind = type(mixer)
    original = kind.function
    if original is None:
        return

    @functools.wraps(original)
    def watched(*tokens, **given):
        seen({**dict(zip(kind.projections, tokens)), **given})
        return original(*tokens, **given)

    mixer.__class__ = type(kind.__name__, (kind,), {"function": staticmethod(watched), "__module__": kind.__module__})
