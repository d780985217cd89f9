"""Distillation of a run: the training that `compress` does before a result becomes a run of its own."""

import copy
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import optax
from flax import nnx
from ml_collections import ConfigDict

from efficient_tx.compression.distillation import DISTILLATION, Student, join, joined
from efficient_tx.config.build import build_model, build_stages
from efficient_tx.data.batching import evaluation_batches, train_batches
from efficient_tx.task import Objective, Task
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.history import History
from efficient_tx.training.loop import Loop, Plan
from efficient_tx.training.optimizer import evaluation_params
from efficient_tx.training.report import Report
from efficient_tx.training.step import init_state


class Distillation:
    """A distillation in a folder of its own, with metric lines and checkpoints as those of a run.

    Args:
      path: the folder.
      steps: the first half trains each block on the teacher's inputs, the second all of them together. Each half begins
        with fresh moments and a warm-up, and ends with the end of its schedule.
    """

    def __init__(self, path: Path, steps: int):
        self.path, self.steps, self.half = path, steps, -(-steps // 2)
        self.checkpoints = Checkpoints(path / "checkpoints")

    def begin(self, config: ConfigDict, model: nnx.Module) -> None:
        """Writes a model as what is to be distilled; `config` is that of the result."""
        begin(self.checkpoints, fitted(config, self.half), Student(model, nnx.split(model)[0]), DISTILLATION)

    def run(
        self, config: ConfigDict, task: Task, teacher: nnx.Module, variances: Sequence[float], *, title: str
    ) -> nnx.Module:  # fmt: skip
        """Trains, from the newest checkpoint, and returns the model of the last step.

        Args:
          config: of the result.
          task: of the result, which gives the examples.
          teacher: with its values.
          variances: of the teacher's outputs, see `compression.distillation.variances`.
          title: of the learning curve.
        """
        first, second = fitted(config, self.half), fitted(config, max(self.steps - self.half, 1))
        graphdef, parameters = nnx.split(teacher)
        student = Student(nnx.eval_shape(lambda: build_model(first, task)), graphdef, variances)
        (alone,), early = build_stages(first, student, DISTILLATION)
        (together,), late = build_stages(second, joined(student), DISTILLATION)
        # By its name the state of this optimizer is another one, and starts anew.
        anew = optax.named_chain(("together", together.optimizer))
        alone = alone._replace(given={"teacher": parameters})
        together = together._replace(start=self.half, optimizer=anew, transform=join, given=alone.given)
        rows = {"batch_size": config.batch_size}
        history = History(self.path / "metrics.jsonl")
        report = Report(self.path, history, steps=self.steps, config={}, title=title, objective=DISTILLATION, **rows)
        report.say(f"distilling: up to step {self.half} each block alone, up to {self.steps} all together")
        loop = Loop(
            [alone, together],
            lambda step: early(step) if step < self.half else late(step - self.half),
            batches=train_batches(task, seed=config.seed, **rows),
            validation=evaluation_batches(task.validation, task, **rows),
            plan=Plan(**{field.name: config[field.name] for field in dataclasses.fields(Plan)} | {"steps": self.steps}),
            checkpoints=self.checkpoints,
            history=history,
            report=report,
            seed=config.seed,
            grad_accum=config.grad_accum,
            lengths=config.lengths,
        )
        state = loop.run()
        return nnx.merge(nnx.split(student)[0], evaluation_params(state.optimizer, state.params)).model

    def clear(self) -> None:
        """Deletes the checkpoints of a distillation that is done; its metric lines stay."""
        shutil.rmtree(self.checkpoints.directory, ignore_errors=True)


def fitted(config: ConfigDict, steps: int) -> ConfigDict:
    """The config of a part of a distillation: that of the result, with its optimizer fitted to these steps.

    Without weight decay, which would pull parameters to zero that a step gives no gradient.
    """
    config = copy.deepcopy(config)
    config.steps, config.optimizer.warmup, config.optimizer.weight_decay = steps, steps // 10, 0.0
    config.remat = False
    return config


def begin(checkpoints: Checkpoints, config: ConfigDict, model: nnx.Module, objective: Objective) -> None:
    """Writes a model as the state of a run before its first step."""
    stages, _ = build_stages(config, model, objective)
    checkpoints.open()
    checkpoints.save(0, init_state(model, stages[0].optimizer, objective))
