"""Replace: linear layers of any NNX model, ours or not, swapped for layers of another structure by projection."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.linear.dense import Dense
from efficient_tx.linear.structured import Weight

# Where something is in a model, as in `nnx.iter_graph`: ("encoder", "blocks", 0, "mlp", "up").
Path = tuple[str | int, ...]


class Projection(NamedTuple):
    """A layer whose weight W gave way to the nearest one Ŵ of another structure.

    Attributes:
      path: of the layer; the first one, where several lead to it.
      distance: ‖W − Ŵ‖ in Frobenius norm, a float32 scalar (float64 of a float64 weight).
      norm: ‖W‖.
    """

    path: Path
    distance: jax.Array
    norm: jax.Array


def relative_error(projections: list[Projection]) -> float:
    """Relative Frobenius error of all the layers as one, √(Σ ‖W − Ŵ‖² / Σ ‖W‖²); 0 where every W is 0."""
    distance = sum(float(projection.distance) ** 2 for projection in projections)
    norm = sum(float(projection.norm) ** 2 for projection in projections)
    return (distance / norm) ** 0.5 if norm else 0.0


def dotted(path: Path) -> str:
    """ "encoder.blocks.0.mlp.up" """
    return ".".join(map(str, path))


def replace(
    model: nnx.Module, select: Callable[[Path, nnx.Module], bool], structure: type[Weight], **options: Any
) -> list[Projection]:
    """Puts layers of another structure in the place of a model's linear layers, in the model itself.

    The new layer is the nearest one to the old one's weight, of the same sizes and dtypes, and takes over the very
    `nnx.Param` of its bias. Layers are found wherever NNX keeps modules: in attributes, `nnx.List`, `nnx.Dict`, and
    tuples, lists and dicts marked `nnx.data`. One at several places stays one.

    A linear layer is an `nnx.Linear` or of a class of `LINEAR`. Not of a subclass of `nnx.Linear`, which may do more
    than that (`nnx.LoRALinear`), nor the `nnx.LinearGeneral` layers within `nnx.MultiHeadAttention`, whose kernels are
    no matrices: those stay. What else an `nnx.Linear` can be given (precision, dot_general) the new layer doesn't have.

    Args:
      model: is changed; its other modules, variables and values stay as they are.
      select: (path, layer) -> whether to replace this linear layer, asked once for each, at the first of its paths.
      structure: class of the new layers.
      **options: of the structure, as in its constructor.

    Returns:
      What was replaced, in the order of the paths. An optimizer's state of the old parameters does not fit any more.

    Raises:
      ValueError: the model is itself such a layer; one of them is a stack of layers (made under `nnx.vmap`), or shares
        its kernel with another; or the structure refuses sizes or options.
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
    """Multiplies every structured weight of a model out: a `Dense` layer takes its place, which computes the same.

    A model trained so far with structured weights can go on without their limits (reverse sparsification, Dao et al.
    2022, arXiv 2204.00595). `replace` says what stays, what is returned and what raises.
    """
    return replace(model, lambda path, layer: not isinstance(layer, nnx.Linear), Dense)


def transfer(source: nnx.Module, target: nnx.Module) -> list[Projection]:
    """Gives `target` the parameters of `source`, projected where a linear layer is of another structure.

    A layer of `target` of another class, or of other options, than the one at its path in `source` becomes the nearest
    one to that; all other variables are copied.

    Args:
      source: a model of the same architecture but for the structures of its linear layers; stays as it is.
      target: is changed.

    Returns:
      What was projected, in the order of the paths.

    Raises:
      ValueError: something else differs: its path, and what it is in each of the models.
    """
    projections = []
    for path, new in nnx.iter_modules(target):
        old = find(source, path)
        if isinstance(new, Weight) and is_linear(old) and form(old) != form(new):
            bias = None if old.bias is None else old.bias[...]
            projections.append(project(path, dense_weight(old), bias, new))
    projected = {projection.path for projection in projections}
    for here, there in ((target, source), (source, target)):
        for path, variable in nnx.iter_graph(here):
            if isinstance(variable, nnx.Variable) and path[:-1] not in projected:
                other = find(there, path)
                if not (isinstance(other, nnx.Variable) and other.shape == variable.shape):
                    shapes = [getattr(find(model, path), "shape", "absent") for model in (source, target)]
                    raise ValueError(f"{dotted(path)} is {shapes[0]} there and {shapes[1]} here")
                if here is target:
                    variable.set_value(other[...].astype(variable.dtype))
    return projections


def is_linear(node: Any) -> bool:
    """Whether `node` is a linear layer that can be replaced."""
    return type(node) is nnx.Linear or isinstance(node, Weight)


def dense_weight(layer: nnx.Module) -> jax.Array:
    """The weight of a linear layer, `[in_features, out_features]`, multiplied out in full precision on every device."""
    with jax.default_matmul_precision("highest"):
        return layer.to_dense() if isinstance(layer, Weight) else layer.kernel[...]


def form(layer: nnx.Module) -> tuple:
    """What two linear layers of equal form share: one's parameters mean the same in the other."""
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    if isinstance(layer, nnx.Linear):
        return sizes
    options = {
        name: value
        for name, value in vars(layer).items()
        if not (name.startswith("_") or name in ("dtype", "param_dtype") or isinstance(value, nnx.Variable))
    }
    return (*sizes, type(layer), options)


def project(path: Path, kernel: jax.Array, bias: jax.Array | None, layer: Weight) -> Projection:
    """Makes `layer` the nearest one to a dense layer."""
    try:
        layer.project(kernel, bias)
    except ValueError as error:
        raise ValueError(f"{dotted(path)}: {error}") from None
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return Projection(path, jnp.linalg.norm(wide - layer.to_dense()), jnp.linalg.norm(wide))


def find(model: nnx.Module, path: Path) -> Any:
    """What is at `path`, None where nothing is."""
    node = model
    for key in path:
        try:
            node = getattr(node, key) if isinstance(key, str) and isinstance(node, nnx.Pytree) else node[key]
        except (AttributeError, LookupError, TypeError):
            return None
    return node


def swap(model: nnx.Module, change: Callable[[Path, nnx.Module], nnx.Module]) -> None:
    """Puts change(path, layer) in the place of every linear layer; each is asked for once."""
    # Old nodes are kept with the new ones: the identity of one that is gone could come back.
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
            # A module, or a tuple, list or dict with modules in it, or neither.
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
    """The index, key or name in an entry of one of jax's paths."""
    return next(getattr(key, kind) for kind in ("idx", "key", "name") if hasattr(key, kind))
