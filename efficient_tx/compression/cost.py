"""Cost: what a linear layer takes, in bytes, parameters, multiplications of a token, or measured milliseconds."""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.compression.layer_form import LayerForm
from efficient_tx.linear import Sum, replacement
from efficient_tx.linear.structured import Weight

# Tokens of a timed call: 32 sequences of 128.
TOKENS = 4096
ROUNDS = 7


def stored(layer: nnx.Module) -> int:
    """Bytes of a layer as it is stored for inference, with its bias: packed, if it or a part of it can be."""
    if isinstance(layer, Sum):
        bias = 0 if layer.bias is None else layer.out_features * jnp.dtype(layer.param_dtype).itemsize
        return stored(layer.first) + stored(layer.second) + bias
    if isinstance(layer, Weight):
        return (layer.pack() if hasattr(layer, "pack") else layer).bytes_stored
    return Weight.bytes_stored.fget(layer)


def parameters(layer: nnx.Module) -> int:
    """Number of trained parameters of a layer, with its bias."""
    return layer.parameters if isinstance(layer, Weight) else Weight.parameters.fget(layer)


def multiplications(layer: nnx.Module) -> int:
    """Multiplications of a layer for one token."""
    return layer.multiplies if isinstance(layer, Weight) else layer.in_features * layer.out_features


# Unit -> cost of an abstract or concrete layer.
COUNTED: dict[str, Callable[[nnx.Module], int]] = {
    "bytes": stored,
    "parameters": parameters,
    "multiplications": multiplications,
}
UNITS = (*COUNTED, "milliseconds")


class Costs:
    """Costs of layers in one unit, each found out once.

    Args:
      unit: one of UNITS. Milliseconds are those of the layer's forward pass for `TOKENS` tokens on this machine: the
        median of several calls. Layers of one form share them: two measurements of one program differ.
    """

    def __init__(self, unit: str):
        self.unit = unit
        self._measured: dict[str, float] = {}

    def of(self, layer: nnx.Module) -> float:
        """The cost of a layer."""
        if self.unit != "milliseconds":
            return COUNTED[self.unit](layer)
        return self._timed(program(layer), lambda: layer)

    def __call__(self, form: LayerForm) -> float:
        """The cost of a layer of this form."""
        if self.unit != "milliseconds":
            return counted(form, self.unit)
        return self._timed(program_of(form), form.make)

    def _timed(self, key: str, make: Callable[[], nnx.Module]) -> float:
        if key not in self._measured:
            self._measured[key] = milliseconds(make())
        return self._measured[key]


def program(layer: nnx.Module) -> str:
    """What the time of an abstract or concrete layer depends on: its form and dtypes."""
    return repr((replacement.form(layer), layer.dtype, layer.param_dtype))


@functools.cache
def program_of(form: LayerForm) -> str:
    """The `program` of a layer of this form."""
    return program(nnx.eval_shape(form.make))


@functools.cache
def counted(form: LayerForm, unit: str) -> int:
    """The cost of a layer of this form in a unit of COUNTED."""
    return nnx.eval_shape(lambda: Counted(form.make(), COUNTED[unit])).cost


class Counted(nnx.Module):
    """Carries the cost of a layer out of `nnx.eval_shape`."""

    def __init__(self, layer: nnx.Module, count: Callable[[nnx.Module], int]):
        self.cost = count(layer)


def milliseconds(layer: nnx.Module) -> float:
    """Median time of the layer's forward pass for TOKENS tokens, in milliseconds."""
    graphdef, state = nnx.split(layer)
    call = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    x = jax.random.normal(jax.random.key(0), (TOKENS, layer.in_features), jnp.float32)
    jax.block_until_ready(call(state, x))
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(call(state, x))
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)
