"""Distillation of a run: the training that `compress` does before a result becomes a run of its own."""

import copy
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

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
      steps: the first half trains each block on the teacher's inputs, the second all of them together.
    """

    def __init__(self, path: Path, steps: int):
        self.path, self.steps = path, steps
        self.checkpoints = Checkpoints(path / "checkpoints")

    def settings(self, config: ConfigDict) -> ConfigDict:
        """The config of the distillation of a result: that of the result, with an optimizer fitted to the steps.

        Without weight decay, which would pull parameters to zero that a step gives no gradient.
        """
        config = copy.deepcopy(config)
        config.steps, config.optimizer.warmup, config.optimizer.weight_decay = self.steps, self.steps // 10, 0.0
        config.remat = False
        return config

    def begin(self, config: ConfigDict, model: nnx.Module) -> None:
        """Writes a model as what is to be distilled; `config` is that of the result."""
        begin(self.checkpoints, self.settings(config), Student(model, nnx.split(model)[0]), DISTILLATION)

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
        settings = self.settings(config)
        graphdef, parameters = nnx.split(teacher)
        student = Student(nnx.eval_shape(lambda: build_model(settings, task)), graphdef, variances)
        (alone,), schedule = build_stages(settings, student, DISTILLATION)
        alone = alone._replace(given={"teacher": parameters})
        together = alone._replace(start=self.steps // 2, model=joined(student), transform=join)
        rows = {"batch_size": config.batch_size}
        history = History(self.path / "metrics.jsonl")
        report = Report(self.path, history, steps=self.steps, config={}, title=title, objective=DISTILLATION, **rows)
        report.say(f"distilling: up to step {together.start} each block alone, up to {self.steps} all together")
        loop = Loop(
            [alone, together],
            schedule,
            batches=train_batches(task, seed=config.seed, **rows),
            validation=evaluation_batches(task.validation, task, **rows),
            plan=Plan(**{field.name: settings[field.name] for field in dataclasses.fields(Plan)}),
            checkpoints=self.checkpoints,
            history=history,
            report=report,
            seed=config.seed,
            grad_accum=config.grad_accum,
        )
        state = loop.run()
        return nnx.merge(nnx.split(student)[0], evaluation_params(state.optimizer, state.params)).model

    def clear(self) -> None:
        """Deletes the checkpoints of a distillation that is done; its metric lines stay."""
        shutil.rmtree(self.checkpoints.directory, ignore_errors=True)


def begin(checkpoints: Checkpoints, config: ConfigDict, model: nnx.Module, objective: Objective) -> None:
    """Writes a model as the state of a run before its first step."""
    stages, _ = build_stages(config, model, objective)
    checkpoints.open()
    checkpoints.save(0, init_state(model, stages[0].optimizer, objective))
