"""Replace: swaps linear layers of any NNX model, ours or not, for layers of another structure, by projection."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.linear.dense import Dense
from efficient_tx.linear.structured import Weight

# The path of an object in a model, as in `nnx.iter_graph`: ("encoder", "blocks", 0, "mlp", "up").
Path = tuple[str | int, ...]


class Projection(NamedTuple):
    """A layer whose weight W was replaced by the nearest weight Ŵ of another structure.

    Attributes:
      path: path of the layer; the first one if there are several.
      distance: ‖W − Ŵ‖ in Frobenius norm, a float32 scalar (float64 for a float64 weight).
      norm: ‖W‖, of the same dtype.
    """

    path: Path
    distance: jax.Array
    norm: jax.Array


def relative_error(projections: list[Projection]) -> float:
    """Relative Frobenius error of all layers together, √(Σ ‖W − Ŵ‖² / Σ ‖W‖²); 0 if every W is 0."""
    distance = sum(float(projection.distance) ** 2 for projection in projections)
    norm = sum(float(projection.norm) ** 2 for projection in projections)
    return (distance / norm) ** 0.5 if norm else 0.0


def dotted(path: Path) -> str:
    """The path as text: "encoder.blocks.0.mlp.up"."""
    return ".".join(map(str, path))


def replace(
    model: nnx.Module, select: Callable[[Path, nnx.Module], bool], structure: type[Weight], **options: Any
) -> list[Projection]:
    """Replaces linear layers of a model, in place, by layers of another structure.

    The new layer has the same sizes and dtypes; its weight is the projection of the old weight, and its bias is the
    same `nnx.Param` object. Layers are found everywhere that NNX keeps modules: in attributes, `nnx.List`, `nnx.Dict`,
    and tuples, lists and dicts marked `nnx.data`. A layer that is shared between several places stays shared.

    A linear layer is an `nnx.Linear` or of a class in `LINEAR`. Subclasses of `nnx.Linear` are not replaced, because
    they may do more (`nnx.LoRALinear`), nor are the `nnx.LinearGeneral` layers in `nnx.MultiHeadAttention`, whose
    kernels are no matrices. Other arguments of an `nnx.Linear` (precision, dot_general) are lost.

    Args:
      model: the model to change; its other modules, variables and values stay the same.
      select: (path, layer) -> whether to replace this linear layer; called once per layer, with its first path.
      structure: class of the new layers, for example a value of `LINEAR`.
      **options: options of the structure, as in its constructor.

    Returns:
      The replaced layers, in the order of their paths. The optimizer state of the old parameters does not fit the new
      model.

    Raises:
      ValueError: the model itself is such a layer; a layer is a stack of layers (made under `nnx.vmap`) or shares its
        kernel with another layer; the structure does not allow the sizes or options.
    """
    tied = {path for paths in nnx.find_duplicates(model, only=nnx.Param) for path in paths}
    projections = []

    def change(path: Path, layer: nnx.Module) -> nnx.Module:
        if not select(path, layer):
            return layer
        kernel = dense_weight(layer)
        if not path:
            raise ValueError("the model is itself a linear layer: use from_dense of the structure")
        if kernel.ndim != 2:
            raise ValueError(f"{dotted(path)} is a stack of layers, its kernel has shape {kernel.shape}: select others")
        if (*path, "kernel") in tied:
            raise ValueError(f"{dotted(path)} shares its kernel with another module: select others")
        new = structure(
            *kernel.shape,
            use_bias=layer.bias is not None,
            dtype=layer.dtype,
            param_dtype=kernel.dtype,
            rngs=nnx.Rngs(0),
            **options,
        )
        projections.append(project(path, kernel, None, new))
        if layer.bias is not None:
            new.bias = layer.bias
        return new

    swap(model, change)
    return projections


def densify(model: nnx.Module) -> list[Projection]:
    """Replaces every structured layer of a model, in place, by a `Dense` layer that computes the same function.

    A model trained with structured weights can continue its training without their constraints (reverse sparsification,
    Dao et al. 2022, arXiv 2204.00595). Return value and errors are as in `replace`.
    """
    return replace(model, lambda path, layer: not isinstance(layer, nnx.Linear), Dense)


def transfer(source: nnx.Module, target: nnx.Module) -> list[Projection]:
    """Copies the parameters of `source` to `target`; linear layers of another structure are projected.

    A layer of `target` that has another class or other options than the layer at its path in `source` becomes the
    projection of that layer. All other variables are copied.

    Args:
      source: a model with the same architecture except for the structures of linear layers; not changed.
      target: the model to change.

    Returns:
      The projected layers, in the order of their paths.

    Raises:
      ValueError: another difference between the models; the message has its path and both shapes.
    """
    projections = []
    weights = {path: layer for path, layer in nnx.iter_modules(target) if isinstance(layer, Weight)}
    for path, new in weights.items():
        old = find(source, path)
        if is_linear(old) and form(old) != form(new) and not below(path, weights):
            bias = None if old.bias is None else old.bias[...]
            projections.append(project(path, dense_weight(old), bias, new))
    projected = {projection.path for projection in projections}
    for here, there in ((target, source), (source, target)):
        for path, variable in nnx.iter_graph(here):
            if isinstance(variable, nnx.Variable) and not below(path, projected):
                other = find(there, path)
                if not (isinstance(other, nnx.Variable) and other.shape == variable.shape):
                    shapes = [getattr(find(model, path), "shape", "absent") for model in (source, target)]
                    raise ValueError(f"{dotted(path)} is {shapes[0]} there and {shapes[1]} here")
                if here is target:
                    variable.set_value(other[...].astype(variable.dtype))
    return projections


def below(path: Path, others: Collection[Path]) -> bool:
    """Whether a path leads into one of the other paths."""
    return any(path[:end] in others for end in range(len(path)))


def is_linear(node: Any) -> bool:
    """Whether `node` is a linear layer that can be replaced."""
    return type(node) is nnx.Linear or isinstance(node, Weight)


def dense_weight(layer: nnx.Module) -> jax.Array:
    """The dense weight of a linear layer, `[in_features, out_features]`, in full precision on every device."""
    with jax.default_matmul_precision("highest"):
        return layer.to_dense() if isinstance(layer, Weight) else layer.kernel[...]


def form(layer: nnx.Module) -> tuple:
    """Class, sizes and options of a linear layer. Layers of equal form can exchange their parameters."""
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    if isinstance(layer, nnx.Linear):
        return sizes
    options = {
        name: form(value) if isinstance(value, Weight) else value
        for name, value in vars(layer).items()
        if not (name.startswith("_") or name in ("dtype", "param_dtype") or isinstance(value, nnx.Variable))
    }
    return (*sizes, type(layer), options)


def project(path: Path, kernel: jax.Array, bias: jax.Array | None, layer: Weight) -> Projection:
    """Sets `layer` to the projection of a dense layer."""
    try:
        layer.project(kernel, bias)
    except ValueError as error:
        raise ValueError(f"{dotted(path)}: {error}") from None
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return Projection(path, jnp.linalg.norm(wide - layer.to_dense()), jnp.linalg.norm(wide))


def find(model: nnx.Module, path: Path) -> Any:
    """The object at `path`; None if there is none."""
    node = model
    for key in path:
        try:
            node = getattr(node, key) if isinstance(key, str) and isinstance(node, nnx.Pytree) else node[key]
        except (AttributeError, LookupError, TypeError):
            return None
    return node


def swap(model: nnx.Module, change: Callable[[Path, nnx.Module], nnx.Module]) -> None:
    """Replaces every linear layer by change(path, layer), which is called once per layer."""
    # Old nodes are kept with the new ones: otherwise the id of a deleted node could be reused.
    seen: dict[int, tuple[nnx.Pytree, nnx.Pytree]] = {}

    def visit(node: nnx.Pytree, path: Path) -> nnx.Pytree:
        if id(node) in seen:
            return seen[id(node)][1]
        if is_linear(node):
            seen[id(node)] = node, change(path, node)
            return seen[id(node)][1]
        seen[id(node)] = node, node
        whole = isinstance(node, nnx.List)
        attributes = [(int(name) if whole and name.isdigit() else name, name) for name in vars(node)]
        for key, name in sorted(attributes, key=lambda pair: (isinstance(pair[0], str), pair[0])):
            if name.startswith("_pytree__"):
                continue
            # The attribute is a module, or a tuple, list or dict with modules, or neither.
            parts, structure = jax.tree_util.tree_flatten_with_path(
                getattr(node, name), is_leaf=lambda part: isinstance(part, (nnx.Pytree, nnx.Variable))
            )
            new = [
                visit(part, (*path, key, *map(entry, within))) if isinstance(part, nnx.Pytree) else part
                for within, part in parts
            ]
            if any(after is not before for after, (_, before) in zip(new, parts)):
                setattr(node, name, nnx.data(structure.unflatten(new)))
        return node

    visit(model, ())


def entry(key: Any) -> str | int:
    """The index, key or name in an entry of a jax key path."""
    return next(getattr(key, kind) for kind in ("idx", "key", "name") if hasattr(key, kind))
