"""The run that is compressed: its model, its examples, its loss."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from efficient_tx.compress.asked import Asked
from efficient_tx.config.build import build_task
from efficient_tx.config.evaluation import trained_model
from efficient_tx.config.schema import with_dense_weights
from efficient_tx.config.stored import restore
from efficient_tx.data.batching import train_batches
from efficient_tx.task import Batch, Objective, Task
from efficient_tx.training.errors import refusing
from efficient_tx.training.step import NOTHING, score
from efficient_tx.training.workdir import read_config


def load(workdir: Path, checkpoint: str) -> tuple[ConfigDict, Task, nnx.Module, int]:
    """The run to compress: its config, whose layers are those of the checkpoint; its task, its model and the step."""
    path = str(workdir)
    with refusing(path):
        config = restore(read_config(path))
        with config.unlocked():
            config.remat = False
        task = build_task(config)
        step, stage, model = trained_model(path, checkpoint, config, task, print)
    return with_dense_weights(config) if stage.start else config, task, model, step


def calibration(task: Task, asked: Asked, batch_size: int) -> Sequence[Batch]:
    """The batches of calibration, of which the last one may be smaller.

    They have different examples of the training split, as they are, without augmentation: the first ones of an epoch.
    """
    count = min(asked.calibration, len(task.train))
    # Buckets would mix the examples of several epochs.
    plain = dataclasses.replace(task, augment=None, bucket=False)
    whole = train_batches(plain, batch_size=count, seed=asked.draw)[0]
    return [{name: rows[i : i + batch_size] for name, rows in whole.items()} for i in range(0, count, batch_size)]


def mean_loss(objective: Objective, model: nnx.Module, batch: Batch) -> jax.Array:
    """The loss that training minimises, of a batch without dropout."""
    total, weight = score(model, batch, None, objective, NOTHING)["loss"]
    return total / jnp.where(weight > 0, weight, 1)
