"""Fingerprint of a config: a key that no fingerprint depends on is dead."""

import hashlib

import jax
import numpy as np
from flax import nnx

from efficient_tx.config import build, check
from efficient_tx.data.batching import evaluation_batches, train_batches
from efficient_tx.training.stages import enter
from efficient_tx.training.step import init_state, make_train_step, split_batch


def fingerprint(config):
    """Of three training steps: the programs, where they start from and what they are fed, the test set included."""
    check.check(config)
    task = build.build_task(config)
    model = build.build_model(config, task)
    stages, _ = build.build_stages(config, model)
    device = jax.local_devices()[:1]
    batches = train_batches(task, batch_size=config.batch_size, seed=config.seed)
    state, seen = init_state(model, stages[0].optimizer), hashlib.sha256()
    for before, stage in zip([stages[0], *stages], stages):
        state = state if stage is before else enter(state, before, stage)
        graphdef = nnx.split(stage.model)[0]
        step = make_train_step(
            graphdef, stage.optimizer, seed=config.seed, grad_accum=config.grad_accum, devices=device
        )
        seen.update(step.lower(state, split_batch(batches[0], device)).as_text().encode())
    tests = evaluation_batches(task.test, task, batch_size=8)
    validations = evaluation_batches(task.validation, task, batch_size=8)
    fed = [batches[i] for i in range(3)] + [split[i] for split in (tests, validations) for i in range(len(split))]
    for leaf in [*jax.tree.leaves(state.params), *jax.tree.leaves(fed)]:
        seen.update(np.asarray(leaf).tobytes())
    return seen.hexdigest()
