"""Distillation: a student learns the outputs of a teacher's blocks and its logits.

Layer by layer, block i of the student maps the teacher's input of block i to the teacher's output. No block sees the
error of another one, so that all are trained at once and the gradient of each is its own. Jointly, each block gets what
the student's blocks before it give, and the logits are matched as well. Hidden states first, block by block, and then
the outputs: Bick et al. 2024, arXiv 2408.10189 (MOHAWK); attention alone, then the whole: Zhang et al. 2024, arXiv
2410.10254 (LoLCATs). Logits are matched by their squared error (Kim et al. 2021, arXiv 2105.08919).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.compression.watch import watch
from efficient_tx.linear.replacement import Path, find
from efficient_tx.models.transformer import Block
from efficient_tx.task import Objective, model_inputs


class Call(NamedTuple):
    """A call of a block: its path, input and output `[rows, length, features]`, mask bool `[rows, length]` or None."""

    path: Path
    x: jax.Array
    mask: jax.Array | None
    out: jax.Array


def trace(model: nnx.Module, features: Mapping[str, Any]) -> tuple[list[Call], jax.Array]:
    """The calls of a model's blocks at evaluation, in order, and its outputs.

    Args:
      model: built with `remat=False`; not changed.
      features: arguments of its call.
    """
    model, calls = nnx.merge(*nnx.split(model)), []
    for path, block in list(nnx.iter_modules(model)):
        if isinstance(block, Block):
            watch(block, partial(called, calls, path))
    return calls, model(**features, key=None)


def called(calls: list[Call], path: Path, out: jax.Array, x: jax.Array, *, mask=None, key=None) -> None:
    """Records a call of a block."""
    calls.append(Call(path, x, mask, out))


class Student(nnx.Module):
    """A model as the student of another one: gives its errors instead of its outputs.

    Both compute as at evaluation: without dropout, and with the samples of an evaluation. The parameters of the student
    are those of `model` alone; the teacher's are an argument.

    Args:
      model: the student; built with `remat=False`.
      teacher: graph definition of the teacher, `nnx.split(teacher)[0]`. Its blocks have the paths of the student's.
      variances: of the teacher, see `variances`; the errors need them.
      jointly: whether the student's blocks run one after the other, or each on the teacher's inputs.
    """

    def __init__(
        self, model: nnx.Module, teacher: nnx.GraphDef, variances: Sequence[float] = (), *, jointly: bool = False
    ):
        self.model = model
        self.teach: Callable = lambda params, features: trace(nnx.merge(teacher, params), features)
        self.variances = tuple(variances)
        self.jointly = jointly

    def __call__(self, *, teacher: nnx.State, key: jax.Array | None = None, **features: jax.Array) -> jax.Array:
        """Errors of each example, float32 `[batch, 2]`: of blocks, their mean, and of the logits, 0 unless jointly.

        Each is the mean squared error over the example's real tokens, relative to the variance of the teacher's output.

        Args:
          teacher: parameters of the teacher.
          key: not used.
          **features: arguments of both models.
        """
        calls, logits = self.teach(teacher, features)
        batch, mask = len(features["inputs"]), features.get("mask")
        *of_blocks, of_logits = self.variances
        if self.jointly:
            own, answers = trace(self.model, features)
            outs = [call.out for call in own]
            off = (answers - logits).reshape(batch, -1, logits.shape[-1])
            last = example_error(off, mask if logits.ndim > 2 else None, batch) / of_logits
        else:
            outs = [find(self.model, call.path)(call.x, mask=call.mask) for call in calls]
            last = jnp.zeros(batch)
        errors = [
            example_error(out - call.out, call.mask, batch) / variance
            for out, call, variance in zip(outs, calls, of_blocks, strict=True)
        ]
        return jnp.stack([sum(errors) / len(errors), last], axis=1)


def example_error(off: jax.Array, mask: jax.Array | None, batch: int) -> jax.Array:
    """Mean square of `off` `[rows, length, features]` over the real tokens of each example, float32 `[batch]`.

    Rows r, r + batch, … belong to example r: a pair is one batch of twice the size.
    """
    real = jnp.ones(off.shape[:2], bool) if mask is None else mask
    squares = jnp.square(jnp.where(real[..., None], off, 0).astype(jnp.float32)).mean(2)
    total, count = (x.sum(1).reshape(-1, batch).sum(0) for x in (squares, real))
    return total / jnp.maximum(count, 1)


def score(errors: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums over the examples of a batch, each with the number of examples that count: of both errors, and of blocks."""
    counted = batch["weight"].reshape(len(errors), -1).any(1)
    errors = jnp.where(counted[:, None], errors, 0)
    total = counted.sum().astype(jnp.float32)
    return {"loss": (errors.sum(), total), "blocks": (errors[:, 0].sum(), total)}


# Of a `Student`. The loss is the error of the blocks and, jointly, that of the logits.
DISTILLATION = Objective(score, metrics=("blocks",), best="loss", higher_is_better=False)


def join(student: Student) -> None:
    """Makes the blocks of a student run one after the other."""
    student.jointly = True


def joined(student: Student) -> Student:
    """The same student, whose blocks run one after the other."""
    copy = nnx.merge(*nnx.split(student))
    join(copy)
    return copy


def variances(teacher: nnx.Module, batches: Iterable[Mapping[str, Any]]) -> list[float]:
    """The variance of the output of each block, in the order of their calls, and then of the logits.

    Over the real tokens of the examples that count, and the mean over the channels; sums are float64. What does not
    vary at all counts as of variance 1.

    Args:
      teacher: built with `remat=False`.
      batches: as of its task.

    Raises:
      ValueError: there are no batches, or an output is not finite.
    """
    graphdef, params = nnx.split(teacher)

    @jax.jit
    def run(params, batch):
        calls, logits = trace(nnx.merge(graphdef, params), model_inputs(batch))
        counted = batch["weight"].reshape(len(batch["weight"]), -1).any(1)
        outs = [(call.out, call.mask) for call in calls]
        outs.append(
            (logits.reshape(len(counted), -1, logits.shape[-1]), batch.get("mask") if logits.ndim > 2 else None)
        )
        return [(out.astype(jnp.float32), real_tokens(out, mask, counted)) for out, mask in outs]

    parts = [[moments(*output) for output in run(params, batch)] for batch in batches]
    if not parts:
        raise ValueError("there are no calibration data: the training split has no full batch")
    sums = [[sum(part) for part in zip(*of_one)] for of_one in zip(*parts)]
    found = [float(np.mean(squares / count - (total / count) ** 2)) for count, total, squares in sums]
    if not np.isfinite(found).all():
        raise ValueError("the outputs of the model's blocks are not finite: the model or its data are damaged")
    return [variance if variance > 0 else 1.0 for variance in found]


def moments(out: jax.Array, real: jax.Array) -> tuple[int, np.ndarray, np.ndarray]:
    """Number of tokens, their sum and that of their squares, float64 `[features]`."""
    tokens = np.asarray(out, np.float64)[np.asarray(real)]
    return len(tokens), tokens.sum(0), np.square(tokens).sum(0)


def real_tokens(out: jax.Array, mask: jax.Array | None, counted: jax.Array) -> jax.Array:
    """Which tokens of `out` `[rows, length, features]` are real, of examples that count; bool `[rows, length]`."""
    examples = jnp.tile(counted, len(out) // len(counted))[:, None]
    return jnp.broadcast_to(examples, out.shape[:2]) & (True if mask is None else mask)
