"""Fingerprint of a config: a key that no fingerprint depends on is dead."""

import hashlib
from functools import cached_property

import jax
import numpy as np
from flax import nnx

from efficient_tx.config import build, check
from efficient_tx.data.batching import evaluation_batches, train_batches
from efficient_tx.training.stages import enter
from efficient_tx.training.step import init_state, make_train_step, split_batch


def digest(*parts):
    seen = hashlib.sha256()
    for part in parts:
        seen.update(part.encode() if isinstance(part, str) else np.asarray(part).tobytes())
    return seen.hexdigest()


class Fingerprint:
    """Of three training steps: where they start from, what they are fed, the test set included, and the programs.

    Programs are made only to tell two apart that begin alike, and the model's own first: they take most of the time.
    """

    def __init__(self, config):
        check.check(config)
        self.config, self.task = config, (task := build.build_task(config))
        self.model = build.build_model(config, task)
        self.batches = train_batches(task, batch_size=config.batch_size, seed=config.seed)
        splits = [evaluation_batches(split, task, batch_size=8) for split in (task.test, task.validation)]
        fed = [self.batches[i] for i in range(3)] + [split[i] for split in splits for i in range(len(split))]
        self.beginning = digest(*jax.tree.leaves(nnx.split(self.model)[1]), *jax.tree.leaves(fed))

    @cached_property
    def forward(self):
        graphdef, params = nnx.split(self.model)
        program = jax.jit(lambda params, inputs, key: nnx.merge(graphdef, params)(**inputs, key=key))
        return digest(program.lower(params, check.empty_inputs(self.task), jax.random.key(0)).as_text())

    @cached_property
    def programs(self):
        """And the parameters with which the last one starts."""
        stages, _ = build.build_stages(self.config, self.model)
        device = jax.local_devices()[:1]
        state, programs = init_state(self.model, stages[0].optimizer), []
        for before, stage in zip([stages[0], *stages], stages):
            state = state if stage is before else enter(state, before, stage)
            graphdef = nnx.split(stage.model)[0]
            division = {"grad_accum": self.config.grad_accum, "lengths": self.config.lengths}
            step = make_train_step(graphdef, stage.optimizer, seed=self.config.seed, devices=device, **division)
            programs.append(step.lower(state, split_batch(self.batches[0], device)).as_text())
        return digest(*programs, *jax.tree.leaves(state.params))

    def __eq__(self, other):
        return all(getattr(self, part) == getattr(other, part) for part in ("beginning", "forward", "programs"))

    __hash__ = None
