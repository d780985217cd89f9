"""A model's layers: which of them a compression changes, and how they are exchanged and cut."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.attention import Mixer, MultiHead
from efficient_tx.compression.layer_form import LayerForm
from efficient_tx.linear import Dense, Form
from efficient_tx.linear.replacement import Path, dense_weight, dotted, find, is_linear
from efficient_tx.models.transformer import Mlp


class Layer(NamedTuple):
    """A linear layer of a model.

    Attributes:
      path: its place, as in `nnx.iter_graph`.
      place: "mlp", "projections" (of a mixer), or "" elsewhere.
      module: the layer.
    """

    path: Path
    place: str
    module: nnx.Module

    @property
    def name(self) -> str:
        return dotted(self.path)


def linear_layers(model: nnx.Module) -> list[Layer]:
    """All linear layers of a model, in the order of their paths; parts of a layer are no layers of their own."""
    linear = {path: node for path, node in nnx.iter_modules(model) if is_linear(node)}
    whole = [path for path in linear if not any(path[:size] in linear for size in range(len(path)))]

    def place(path: Path) -> str:
        owners = [find(model, path[:size]) for size in range(len(path))]
        inside = {"mlp": Mlp, "projections": Mixer}
        return next((name for name, kind in inside.items() if any(isinstance(one, kind) for one in owners)), "")

    return [Layer(path, place(path), linear[path]) for path in sorted(whole, key=in_order)]


def in_order(path: Path) -> tuple[tuple[bool, int, str], ...]:
    """A key that sorts paths; numbers by their size."""
    return tuple((isinstance(part, str), 0 if isinstance(part, str) else part, str(part)) for part in path)


def select(model: nnx.Module, where: str) -> list[Layer]:
    """The linear layers that a pattern selects.

    Args:
      where: a regular expression that occurs in the dotted path of a layer or is the name of its place, such as
        "mlp|projections" or "blocks.[0-3].mlp".

    Raises:
      ValueError: it is no regular expression, it selects nothing, or a layer shares its weights with another one or
        has some that are not finite.
    """
    try:
        pattern = re.compile(where)
    except re.error as error:
        raise ValueError(f"where={where!r} is no regular expression: {error}") from None
    layers = linear_layers(model)
    chosen = [one for one in layers if pattern.fullmatch(one.place) or pattern.search(one.name)]
    if not chosen:
        known = ", ".join(one.name for one in layers[:6])
        raise ValueError(f"where={where!r} selects no linear layer: use mlp, projections or a part of {known}, ...")
    shared = [path for paths in nnx.find_duplicates(model) for path in paths]
    for one in chosen:
        # The layer itself, a parameter in it, or a module around it.
        if any(all(a == b for a, b in zip(path, one.path)) for path in shared):
            raise ValueError(f"{one.name} shares its weights with another layer: select others")
        if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(one.module))):
            raise ValueError(f"{one.name} has weights that are not finite: the model is damaged")
    return chosen


class Neurons(NamedTuple):
    """The hidden neurons of an MLP: the layers that make them, features -> neurons, and the one that reads them."""

    path: Path
    making: tuple[Path, ...]
    reading: Path
    count: int
    size: int = 1


class Heads(NamedTuple):
    """The heads of a mixer: its projections, features -> heads · size, and the layer that reads their outputs."""

    path: Path
    making: tuple[Path, ...]
    reading: Path
    count: int
    size: int


Units = Neurons | Heads


def units(model: nnx.Module, layers: Sequence[Layer], *, heads: bool = True) -> list[Units]:
    """The neurons, and heads, that can be cut from a model, of which all layers are among `layers`.

    Raises:
      ValueError: a layer is no dense one, or the heads of a mixer are not alike or have parameters outside its
        projections; with the name of the layer.
    """
    chosen = {one.path for one in layers}
    found: list[Units] = []
    for path, node in sorted(nnx.iter_modules(model), key=lambda pair: in_order(pair[0])):
        if isinstance(node, Mlp):
            making = ("up",) if node.gate is None else ("gate", "up")
            one = Neurons(path, tuple((*path, name) for name in making), (*path, "down"), node.up.out_features)
        elif isinstance(node, MultiHead) and heads:
            making = tuple((*path, name) for name in node.projections)
            one = Heads(path, making, (*path, "out"), node.heads, node.head_dim)
        else:
            continue
        parts = {*one.making, one.reading}
        if parts <= chosen:
            check_cut(model, one)
            found.append(one)
    return found


def check_cut(model: nnx.Module, one: Units) -> None:
    """Raises ValueError, one line, if neurons or heads cannot be cut."""
    what = "neurons" if isinstance(one, Neurons) else "heads"
    for path in (*one.making, one.reading):
        layer = find(model, path)
        if not isinstance(layer, nnx.Linear):
            raise ValueError(f"{dotted(path)} is a {type(layer).__name__}: {what} are cut from dense layers only")
    if isinstance(one, Heads):
        mixer = find(model, one.path)
        known = {path[len(one.path)] for path in (*one.making, one.reading)}
        others = {path[0] for path, _ in nnx.to_flat_state(nnx.state(mixer))} - known
        widths = {find(model, path).out_features for path in one.making}
        has = [f"{name} beside its projections" for name in sorted(others)]
        has += ["projections of several widths"] * (widths != {one.count * one.size})
        has += ["heads that are not alike"] * (not mixer.heads_alike)
        if has:
            rule = "its heads cannot be cut: where='mlp' selects no mixer"
            raise ValueError(f"{dotted(one.path)} ({type(mixer).__name__}) has {has[0]}: {rule}")


def put(model: nnx.Module, path: Path, layer: nnx.Module) -> None:
    """Puts a layer at a path of the model, in place."""
    owner, last = find(model, path[:-1]), path[-1]
    if isinstance(last, int):
        owner[last] = layer
    else:
        setattr(owner, last, layer)


def dense(kernel: np.ndarray, bias: np.ndarray | None, like: nnx.Module) -> Dense:
    """A dense layer with this kernel `[in, out]` and bias `[out]`, with the dtypes of another layer."""
    layer = LayerForm(Form(Dense), *kernel.shape, bias is not None, like.dtype, like.param_dtype).blank()
    layer.kernel[...] = jnp.asarray(kernel, like.param_dtype)
    if bias is not None:
        layer.bias[...] = jnp.asarray(bias, like.param_dtype)
    return layer


def kernel_of(layer: nnx.Module) -> np.ndarray:
    """The weight of a linear layer as one matrix `[in, out]`, float64."""
    return np.asarray(dense_weight(layer), np.float64)


def bias_of(layer: nnx.Module) -> np.ndarray | None:
    """The bias of a linear layer, float64 `[out]`, or None."""
    return None if layer.bias is None else np.asarray(layer.bias[...], np.float64)
