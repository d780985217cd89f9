"""Of the run that is compressed: examples of calibration, and the loss."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.compress.asked import Asked
from efficient_tx.data.batching import train_batches
from efficient_tx.task import Batch, Objective, Task
from efficient_tx.training.step import NOTHING, score


def calibration(task: Task, asked: Asked, batch_size: int) -> Sequence[Batch]:
    """The batches of calibration, of which the last one may be smaller.

    They have different examples of the training split, as they are, without augmentation: the first ones of an epoch.
    """
    count = min(asked.calibration, len(task.train))
    # Buckets would mix the examples of several epochs.
    plain = dataclasses.replace(task, augment=None, bucket=False)
    whole = train_batches(plain, batch_size=count, seed=asked.draw)[0]
    return [{name: rows[i : i + batch_size] for name, rows in whole.items()} for i in range(0, count, batch_size)]


def too_few(task: Task, calibration: int) -> str | None:
    """The line for who asks for more examples of calibration than there are; None for who does not."""
    if (there := len(task.train)) >= calibration:
        return None
    return f"calibration has all {there} training examples, {calibration} were asked for"


def mean_loss(objective: Objective, model: nnx.Module, batch: Batch) -> jax.Array:
    """The loss that training minimises, of a batch without dropout."""
    total, weight = score(model, batch, None, objective, NOTHING)["loss"]
    return total / jnp.where(weight > 0, weight, 1)
