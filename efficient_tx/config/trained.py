"""Trained models: of a checkpoint of a run, and of a file that has a run's weights and config."""

from collections.abc import Callable
from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict

from efficient_tx.config.build import build_model, build_stages, build_task
from efficient_tx.config.names import task_without_data
from efficient_tx.config.schema import with_dense_weights
from efficient_tx.config.stored import config_of_weights, restore
from efficient_tx.files import local_path
from efficient_tx.models.weights import load_weights
from efficient_tx.task import Task
from efficient_tx.training.errors import refusing
from efficient_tx.training.evaluation import trained_parameters
from efficient_tx.training.objective import objective_of
from efficient_tx.training.stages import Stage
from efficient_tx.training.workdir import read_config


def trained_run(workdir: Path, checkpoint: str) -> tuple[ConfigDict, Task, nnx.Module, int]:
    """A run: its config, whose layers are those of the checkpoint; its task, its model, and the step.

    Args:
      checkpoint: "best" (on validation), "last", or a step.

    Raises:
      Refused: there is no such run or checkpoint, or its data are not there.
    """
    path = str(workdir)
    with refusing(path):
        config = restore(read_config(path))
        with config.unlocked():
            config.remat = False
        task = build_task(config)
        step, stage, model = trained_model(path, checkpoint, config, task, print)
    return with_dense_weights(config) if stage.start else config, task, model, step


def trained_model(
    path: str, checkpoint: str, config: ConfigDict, task: Task, warn: Callable[[str], None]
) -> tuple[int, Stage, nnx.Module]:  # fmt: skip
    """The step of a checkpoint of the run in the workdir `path`, the stage there, and the model with its values.

    Args:
      checkpoint, warn: as of `trained_parameters`.
      config: of the run.
      task: gives the sizes of the model.

    Raises:
      ConfigError, Refused: as `build_model` and `trained_parameters`.
    """
    stages, _ = build_stages(config, nnx.eval_shape(lambda: build_model(config, task)), objective_of(task))
    step, stage, parameters = trained_parameters(path, checkpoint, stages, warn)
    return step, stage, nnx.merge(nnx.split(stage.model)[0], parameters)


def model_of_weights(path: str | Path, task: Task | None = None) -> tuple[ConfigDict, nnx.Module]:
    """The config in a file of `export_weights`, and its model with the weights.

    Args:
      path: the file.
      task: gives the sizes of the model; None: the config says them, and no data are needed.

    Raises:
      ValueError: one line: there is no such file, it is unreadable, has no config, or does not fit it.
    """
    path = local_path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    stored = config_of_weights(path)
    if stored is None:
        raise ValueError(f"{path} has no config of a run: export_weights writes one")
    config = restore(stored)
    task = task or task_without_data(config.task)
    model = nnx.eval_shape(lambda: build_model(config, task))
    load_weights(model, path)
    return config, model
