"""A training step of a config, from shapes alone: no data, no parameters, no device."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from efficient_tx.commands import out_of_memory
from efficient_tx.config.build import build_model, build_stages
from efficient_tx.config.check import empty_inputs
from efficient_tx.config.names import task_without_data
from efficient_tx.fit.chips import Chip
from efficient_tx.numerics.flops import of_program
from efficient_tx.training.memory import needed
from efficient_tx.training.stages import Stage
from efficient_tx.training.step import AXIS, make_train_step
from efficient_tx.training.summary import parameter_count


class Step(NamedTuple):
    """Attributes:
    memory: bytes, of `needed`; infinite where the compiler refuses for want of it.
    flops: of matrix products; None if they cannot be counted.
    moved: bytes that go through main memory at the least: what the step is given is read and what it returns is
      written, each once, and each byte of the temporaries is written and read; None if it was not compiled.
    """

    memory: float
    flops: float | None
    moved: int | None


class Recipe:
    """The first stage of a config's run, with the loss of classification: an objective of the task's own needs data."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.task = task_without_data(config.task)
        model = nnx.eval_shape(lambda: build_model(config, self.task))
        self.parameters = parameter_count(model)
        self._stage: Stage = build_stages(config, model)[0][0]

    def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of one device, `[1, size, ...]`."""
        inputs = {name: ((size, *x.shape[1:]), x.dtype) for name, x in empty_inputs(self.task).items()}
        label = (size, self.task.max_len) if self.task.kind == "token_labels" else (size,)
        arrays = inputs | {"label": (label, jnp.int32), "weight": (label, jnp.float32)}
        return {name: jax.ShapeDtypeStruct((1, *shape), dtype) for name, (shape, dtype) in arrays.items()}

    def compiled(self, size: int, chip: Chip) -> Step:
        """The step with batches of `size` examples, a multiple of the config's grad_accum, for one chip."""
        devices = chip.devices()
        everywhere = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), self._stage.like())
        step = make_train_step(
            nnx.split(self._stage.model)[0], self._stage.optimizer, seed=0, grad_accum=self.config.grad_accum,
            devices=devices,
        )  # fmt: skip
        arguments: tuple[Any, ...] = (state, self.batch(size))
        flops = of_program(lambda: step.trace(*arguments))
        try:
            done = step.lower(*arguments).compile(compiler_options=chip.compiler_options)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not out_of_memory(error):
                raise
            return Step(math.inf, flops, None)
        sizes = done.memory_analysis()
        given = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        code, shared = sizes.generated_code_size_in_bytes, sizes.alias_size_in_bytes
        memory = needed(done)
        return Step(memory, flops, given + 2 * (memory - code - given + shared))
