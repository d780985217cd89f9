"""Weights of a run as a safetensors file, whose metadata have the run's config: from it the model is built again."""

from pathlib import Path

from efficient_tx.config.stored import CONFIG, to_store
from efficient_tx.config.trained import trained_run
from efficient_tx.files import local_path
from efficient_tx.models.weights import save_weights
from efficient_tx.training.disk import writing
from efficient_tx.training.errors import refusing


def export_weights(workdir: str | Path, path: str | Path, *, checkpoint: str = "best", dtype: str | None = None) -> int:
    """Writes the parameters of a trained run, under the names of `models.weights`.

    With the run's config among them, `model_of_weights` builds the model again, and a run starts from the file by
    `init_from`, as from the workdir. Folders of this machine are left out of that config.

    Args:
      workdir: of the run; it is only read.
      path: ends in .safetensors; a file of that name is replaced.
      checkpoint: "best" (on validation), "last", or a step.
      dtype: in the file, "float32" or "bfloat16"; None keeps that of the parameters, float32.

    Returns:
      The step of the checkpoint.

    Raises:
      Refused: one line: no such run or checkpoint, another ending or dtype, or a missing package.
      RunError: the file cannot be written.
    """
    config, _, model, step = trained_run(Path(workdir), checkpoint)
    with config.unlocked():
        config.init_from = config.task.data_dir = None
    with refusing(), writing(Path(path)):
        save_weights(model, local_path(path), dtype=dtype, about={CONFIG: to_store(config), "step": step})
    return step
