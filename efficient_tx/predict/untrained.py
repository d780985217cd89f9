"""Scores of a model before its training: of its gradients, of its tangent kernel, of its approximation."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.inspect.captured import capture
from efficient_tx.inspect.errors import errors, exact_out
from efficient_tx.task import Batch, Objective
from efficient_tx.training.step import NOTHING, outputs, score

# Random directions of the logits along which the tangent kernel is taken.
DIRECTIONS = 4
# Examples on which attention is compared with the exact one.
COMPARED = 8


def gradsign(model: nnx.Module, objective: Objective, batch: Batch) -> float:
    """How far the gradients of the examples agree in sign, in [0, 1]: Σ_k |Σ_i sign ∂l_i/∂θ_k| / (n · parameters).

    Zhang and Jia (2021, arXiv 2110.08616), whose score is not divided. Memory is that of n copies of the parameters.
    """
    graphdef, params = nnx.split(model)

    def loss(params, row):
        total, weight = score(nnx.merge(graphdef, params), one(row), None, objective, NOTHING)["loss"]
        return total / jnp.where(weight > 0, weight, 1)

    @jax.jit
    def agreement(params, batch):
        grads = jax.tree.leaves(jax.vmap(jax.grad(loss), (None, 0))(params, batch))
        return sum(jnp.abs(jnp.sign(grad).sum(0)).sum() for grad in grads) / sum(grad.size for grad in grads)

    return float(agreement(params, dict(batch)))


def alignment(model: nnx.Module, batch: Batch) -> float | None:
    """How far the tangent kernel of the examples has the form of their labels: a cosine in [-1, 1].

    The kernel is K_ij = ⟨∂f(x_i)/∂θ, ∂f(x_j)/∂θ⟩, summed over the logits, here along a few random signs of them; the
    labels' kernel is 1 where two are equal, else 0 (y yᵀ of labels that are numbers). Both are centred (Cortes, Mohri
    and Rostamizadeh 2012, arXiv 1203.0550). Mok et al. (2022, arXiv 2203.14577) ask how much such scores tell before
    training: little. Memory is that of n copies of the parameters.

    Returns:
      None if all labels are equal.
    """
    graphdef, params = nnx.split(model)

    def logits(params, row, signs):
        answers = outputs(nnx.merge(graphdef, params), one(row), None, NOTHING)[0]
        return jnp.dot(answers[first(row["weight"])] if row["label"].ndim else answers, signs)

    @jax.jit
    def kernel(params, batch, signs):
        grads = jax.tree.leaves(jax.vmap(jax.grad(logits), (None, 0, None))(params, batch, signs))
        return sum((rows := grad.reshape(len(grad), -1)) @ rows.T for grad in grads)

    batch = dict(batch)
    labels = np.asarray([y[first(w)] if np.ndim(y) else y for y, w in zip(batch["label"], batch["weight"])])
    answers = jax.eval_shape(lambda params: outputs(nnx.merge(graphdef, params), batch, None, NOTHING), params)
    draws = jax.random.rademacher(jax.random.key(0), (DIRECTIONS, answers.shape[-1]), jnp.float32)
    summed = centred(np.mean([kernel(params, batch, signs) for signs in draws], axis=0, dtype=np.float64))
    numbers = np.issubdtype(labels.dtype, np.floating)
    same = centred(np.outer(labels, labels) if numbers else (labels[:, None] == labels).astype(np.float64))
    size = np.linalg.norm(summed) * np.linalg.norm(same)
    return float(np.sum(summed * same) / size) if size else None


def approximation(model: nnx.Module, batch: Batch) -> float | None:
    """The mean error of the attention against the exact one, over layers and heads, on what the batch gives it.

    0 of exact attention; None if no mixer has an exact counterpart.
    """
    found = []
    for call in capture(model, {name: array[:COMPARED] for name, array in batch.items()}).calls:
        expected = exact_out(call)
        if expected is not None and (error := errors(call, expected, call.variant)) is not None:
            found.append(error.mean())
    return float(np.mean(found)) if found else None


def one(row: Batch) -> Batch:
    """An example as a batch."""
    return jax.tree.map(lambda x: x[None], row)


def first(weights):
    """The place of the first label of an example that counts."""
    return (weights > 0).argmax()


def centred(kernel: np.ndarray) -> np.ndarray:
    """The kernel of features from which their mean is taken."""
    return kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()
