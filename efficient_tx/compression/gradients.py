"""Gradients of a loss for the weights of layers, over calibration examples, with the memory of a few layers."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.compression.layer_form import LayerForm
from efficient_tx.compression.model import Layer, bias_of, kernel_of, put
from efficient_tx.compression.statistics import shared_out
from efficient_tx.linear import Dense
from efficient_tx.linear.replacement import Path, dotted, find

Batch = Mapping[str, Any]
# (model, batch) -> the mean loss over the rows of a batch that count, a scalar; traced by jax.
Loss = Callable[[nnx.Module, Batch], jax.Array]

# Bytes of the gradients that are in memory at once; those of one layer may take more.
MOST_BYTES = 2**30


class Gradients:
    """Gradients for the weights `[in, out]` of some layers of a model, each layer as a dense one.

    A gradient is the mean over a share of the examples. The model itself is not changed.

    Args:
      model: with its values; evaluated as it is, without dropout.
      layers: of this model.
      loss: see `Loss`.
      batches: of calibration, each of any number of rows.
      progress: gets the number of batches that are done, in each pass over them.

    Raises:
      ValueError: there are no batches, or (in a method) a gradient is not finite.
    """

    def __init__(
        self, model: nnx.Module, layers: Sequence[Layer], loss: Loss, batches: Sequence[Batch],
        progress: Callable[[int], None] = lambda done: None,
    ):  # fmt: skip
        if not batches:
            raise ValueError("there are no calibration data: the training split has no full batch")
        self.batches, self.progress = batches, progress
        self.kernels = {layer.path: jnp.asarray(kernel_of(layer.module), jnp.float32) for layer in layers}
        copy = nnx.merge(*nnx.split(model))
        for layer in layers:
            put(copy, layer.path, as_dense(layer.module))
        graphdef, self._others = nnx.split(copy)
        paths = {layer.name: layer.path for layer in layers}

        def mean_loss(some, rest, others, batch):
            whole = nnx.merge(graphdef, others, copy=True)  # of this trace
            for name, kernel in (some | rest).items():
                find(whole, paths[name]).kernel[...] = kernel
            return loss(whole, batch)

        self._gradient = jax.jit(jax.grad(mean_loss))

    def squares(self, count: int) -> dict[Path, np.ndarray]:
        """The mean square of `count` gradients of each weight, float64 `[in, out]`: their Fisher matrix's diagonal.

        There are fewer gradients if there are fewer examples.
        """
        sums = {path: np.zeros(kernel.shape) for path, kernel in self.kernels.items()}
        number = 0
        for grads in self._each(tuple(self.kernels), count):
            number += 1
            for total, grad in zip(sums.values(), grads, strict=True):
                total += np.square(grad, dtype=np.float64)
        return {path: total / number for path, total in sums.items()}

    def stacks(self, count: int) -> Iterator[tuple[Path, np.ndarray]]:
        """`count` gradients of each layer, float32 `[count, in, out]`, one layer after another.

        There are fewer gradients if there are fewer examples. The batches are passed once for as many layers as have
        MOST_BYTES of gradients. All gradients are those at the kernels that hold when the first one is asked for.
        """
        for paths in in_groups({path: 4 * count * kernel.size for path, kernel in self.kernels.items()}, MOST_BYTES):
            rows = [[] for _ in paths]
            for grads in self._each(paths, count):
                for stack, grad in zip(rows, grads, strict=True):
                    stack.append(grad)
            for path in paths:
                yield path, np.stack(rows.pop(0))

    def _each(self, paths: tuple[Path, ...], count: int) -> Iterator[list[np.ndarray]]:
        """The gradients of some layers, of one share of the examples after another; float32."""
        named = {dotted(path): kernel for path, kernel in self.kernels.items()}
        some = {name: named.pop(name) for name in map(dotted, paths)}
        rest = named
        for parts in in_shares([len(batch["label"]) for batch in self.batches], count):
            total, examples = None, sum(rows.stop - rows.start for _, rows in parts)
            for number, rows in parts:
                batch = {name: np.asarray(array)[rows] for name, array in self.batches[number].items()}
                grads = self._gradient(some, rest, self._others, shared_out(batch))
                grads = {name: len(batch["label"]) / examples * grad for name, grad in grads.items()}
                total = grads if total is None else jax.tree.map(jnp.add, total, grads)
                if rows.stop == len(self.batches[number]["label"]):
                    self.progress(number + 1)
            found = [np.asarray(total[name]) for name in some]
            for name, grad in zip(some, found, strict=True):
                if not np.isfinite(grad).all():
                    raise ValueError(f"{name} has gradients that are not finite: the model or its data are damaged")
            yield found


def as_dense(layer: nnx.Module) -> Dense:
    """A dense layer with the bias of another one, and a kernel of zeros in float32."""
    new = LayerForm.of(Dense, layer)._replace(param_dtype=jnp.float32).blank()
    if (bias := bias_of(layer)) is not None:
        new.bias[...] = jnp.asarray(bias, jnp.float32)
    return new


def in_shares(sizes: Sequence[int], count: int) -> Iterator[list[tuple[int, slice]]]:
    """Rows of batches shared out over `count` gradients: of each the parts, (batch, rows).

    A batch is cut into equal parts, as few as there have to be; then neighbouring parts go together. There are fewer
    gradients than `count` if there are fewer rows.
    """
    wanted = -(-count // len(sizes))
    parts = []
    for number, size in enumerate(sizes):
        cuts = next((cuts for cuts in range(wanted, size) if size % cuts == 0), size)
        each = size // cuts
        parts += [(number, slice(start, start + each)) for start in range(0, size, each)]
    count = min(count, len(parts))
    edges = [i * len(parts) // count for i in range(count + 1)]
    for start, end in itertools.pairwise(edges):
        yield parts[start:end]


def in_groups(sizes: Mapping[Path, int], most: int) -> Iterator[tuple[Path, ...]]:
    """Neighbouring entries in groups whose sizes sum to at most `most`, or that have one entry."""
    group, total = [], 0
    for path, size in sizes.items():
        if group and total + size > most:
            yield tuple(group)
            group, total = [], 0
        group.append(path)
        total += size
    yield tuple(group)
