"""Statistics of the inputs of linear layers, gathered in one pass over calibration batches with fixed memory."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficient_tx.attention import Mixer
from efficient_tx.compression.model import Layer
from efficient_tx.compression.watch import watch
from efficient_tx.linear.replacement import Path, find
from efficient_tx.task import model_inputs
from efficient_tx.tokens.mask import compact, joined


class Inputs(NamedTuple):
    """Statistics of the inputs x of one layer over all real tokens, float64.

    Attributes:
      count: number of tokens.
      mean: E x, `[in]`.
      moment: E x xᵀ, `[in, in]`, not centred.
      triangle: R, upper triangular `[in, in]`, with RᵀR = Σ x xᵀ, from a QR decomposition: its condition is that of the
        inputs, and not its square. None unless asked for.
    """

    count: int
    mean: np.ndarray
    moment: np.ndarray
    triangle: np.ndarray | None = None

    @property
    def variance(self) -> np.ndarray:
        """Variance of each channel, `[in]`, not negative."""
        return np.maximum(np.diag(self.moment) - self.mean**2, 0)


class Tokens(NamedTuple):
    """Inputs `[rows, in]` of one call of a layer, and which rows are real tokens, `[rows]`."""

    x: jax.Array
    real: jax.Array


def gather(
    model: nnx.Module, layers: Sequence[Layer], batches: Iterable[Mapping[str, Any]], *,
    triangles: Collection[Path] = (), progress: Callable[[int], None] = lambda done: None,
) -> dict[Path, Inputs]:  # fmt: skip
    """Statistics of the inputs of some layers of a model at evaluation, over its real tokens.

    Neither padding nor examples of weight 0 count. One batch is in memory at a time, shared out over the local devices.
    Sums are float64.

    Args:
      model: with its values; not changed.
      layers: of this model.
      batches: as of the task.
      triangles: paths of the layers whose `triangle` is wanted.
      progress: called with the number of batches that are done.

    Raises:
      ValueError: there are no batches, a layer is not called by the model, or an input is not finite.
    """
    recorded = recorder(model, layers)
    sums: dict[Path, list] = {}
    for done, batch in enumerate(batches, start=1):
        for path, calls in recorded(batch).items():
            for tokens in calls:
                add(sums, path, np.asarray(tokens.x)[np.asarray(tokens.real)], triangle=path in triangles)
        progress(done)
    if not sums:
        raise ValueError("there are no calibration data: the training split has no full batch")
    if missing := [layer.name for layer in layers if layer.path not in sums]:
        raise ValueError(f"{missing[0]} is not called by the model: select other layers")
    for layer in layers:
        if not np.isfinite(sums[layer.path][1]).all():
            raise ValueError(f"{layer.name} has inputs that are not finite: the model or its data are damaged")
    return {path: Inputs(count, total / count, moment / count, r) for path, (count, total, moment, r) in sums.items()}


def add(sums: dict[Path, list], path: Path, x: np.ndarray, *, triangle: bool) -> None:
    """Adds tokens `[rows, in]` to the sums of a layer: count, Σ x, Σ x xᵀ, and R."""
    x = x.astype(np.float64)
    width = x.shape[1]
    empty = [0, np.zeros(width), np.zeros((width, width)), np.zeros((0, width)) if triangle else None]
    known = sums.setdefault(path, empty)
    known[0] += len(x)
    known[1] += x.sum(0)
    known[2] += x.T @ x
    if triangle:
        known[3] = tall_qr([known[3], x])


def tall_qr(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """The factor R `[at most columns, columns]` of a QR decomposition of blocks of rows stacked on each other.

    Applied to R and the next block again and again, this is the R of all rows up to signs (TSQR; Demmel, Grigori,
    Hoemmen and Langou 2012, arXiv 0808.2664).
    """
    return scipy.linalg.qr(np.concatenate(blocks), mode="r", overwrite_a=True, check_finite=False)[0][
        : blocks[0].shape[1]
    ]


def recorder(model: nnx.Module, layers: Sequence[Layer]) -> Callable[[Mapping[str, Any]], dict[Path, list[Tokens]]]:
    """A compiled function of a batch that returns the inputs of the layers in each of their calls, in order."""
    graphdef, params = nnx.split(model)
    gathered = {layer.path: gathered_first(model, layer.path) for layer in layers}

    @jax.jit
    def run(params, batch):
        watched, tape = nnx.merge(graphdef, params), []
        for layer in layers:
            watch(find(watched, layer.path), lambda out, x, path=layer.path: tape.append((path, x)))
        watched(**model_inputs(batch), key=None)
        calls: dict[Path, list[Tokens]] = {}
        for path, x in tape:
            rows = x.reshape(-1, x.shape[-1])
            calls.setdefault(path, []).append(Tokens(rows, real(len(rows), batch, gathered[path])))
        return calls

    return lambda batch: run(params, shared_out(batch))


def shared_out(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with its rows shared out over the local devices, if these divide them."""
    devices = jax.local_devices()
    if len(batch["label"]) % len(devices):
        return batch
    return jax.device_put(dict(batch), NamedSharding(Mesh(devices, "devices"), PartitionSpec("devices")))


def gathered_first(model: nnx.Module, path: Path) -> bool:
    """Whether the layer belongs to a mixer that moves the real tokens of an example to its start."""
    owners = [find(model, path[:size]) for size in range(len(path))]
    return any(isinstance(owner, Mixer) and owner.side_by_side for owner in owners)


def real(rows: int, batch: Mapping[str, Any], gathered: bool) -> jax.Array:
    """Which of a layer's rows count, bool `[rows]`: real tokens of examples with a weight.

    Both texts of a pair are one batch of twice the size. Tokens that a model puts in front of an example are real. Rows
    that are no tokens, as after pooling, belong to the examples in equal parts.
    """
    weight, mask = jnp.asarray(batch["weight"]), batch.get("mask")
    counted = weight.reshape(len(weight), -1).any(1)
    if "inputs2" in batch and rows >= 2 * batch["inputs"].size:
        counted, mask = jnp.tile(counted, 2), joined(mask, batch.get("mask2"), batch["inputs"].shape)
    each = rows // len(counted)
    tokens = jnp.broadcast_to(counted[:, None], (len(counted), each))
    if mask is not None and each >= mask.shape[1]:
        mask = jnp.pad(mask, ((0, 0), (each - mask.shape[1], 0)), constant_values=True)
        tokens &= compact(mask, mask) if gathered else mask
    return tokens.ravel()
