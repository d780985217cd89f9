"""Predictions: what a model answered to every item of a split, and how each item was scored, in a file."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from efficient_tx.task import Batch, Objective
from efficient_tx.training.disk import write_bytes


class Predictions:
    """Gathers the rows of an evaluation.

    The arrays of the file, for n items in the order of the split:

      label: `[n]`, or `[n, L]` of per-token labels.
      output: float32, what the model answers, `[n, ...]`; of per-token classes only `prediction`.
      prediction: the class with the largest output, of a classification, as `label`.
      step: of the checkpoint.
      NAME, NAME_count: float32 `[n]`, for the loss and every metric: the item's sum and divisor. The metric of the
        split is ΣNAME / ΣNAME_count.

    Args:
      objective: of the task.
      classes: whether the outputs are logits of classes.
      outputs: whether the file is wanted; the scores of the items are gathered in any case.
    """

    def __init__(self, objective: Objective, *, classes: bool, outputs: bool):
        self._names, self._classes, self._outputs, self._parts = objective.names, classes, outputs, []

    def keep(self, batch: Batch, rows: dict[str, Any]) -> None:
        """Takes a batch from `evaluation_batches(numbered=True)` and its rows from `eval_step`; both `[d, b, ...]`."""
        flat = {"item": batch["item"]}
        if self._outputs:
            output, flat["label"] = rows["output"], batch["label"]
            if self._classes:
                flat["prediction"] = np.asarray(output).argmax(-1).astype(np.int32)
            if not self._classes or batch["label"].ndim == 2:  # [devices, b]: one label for each item
                flat["output"] = output
        for name in self._names:
            flat[name], flat[f"{name}_count"] = rows[name]
        flat = {name: np.asarray(array).reshape(-1, *array.shape[2:]) for name, array in flat.items()}
        real = flat["item"] >= 0
        self._parts.append({name: array[real] for name, array in flat.items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the file."""
        whole = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        order = np.argsort(whole.pop("item"), kind="stable")
        return {name: array[order] for name, array in whole.items()}

    def standard_errors(self) -> dict[str, float | None]:
        """Of the loss and every metric over the items; None if there is one item only.

        That of a ratio of sums, linearised: √(n/(n−1) Σ(s_i − m c_i)²) / Σ c_i with m = Σ s_i / Σ c_i. Items are
        independent; the labels within one need not be.
        """
        arrays, errors = self.arrays(), {}
        for name in self._names:
            sums, counts = (arrays[key].astype(np.float64) for key in (name, f"{name}_count"))
            n, total = len(sums), counts.sum()
            apart = sums - sums.sum() / total * counts
            errors[name] = float(np.sqrt(n / (n - 1) * (apart**2).sum()) / total) if n > 1 and total else None
        return errors

    def write(self, path: Path, *, step: int) -> None:
        """Writes the file, atomically.

        Raises:
          RunError: it cannot be written.
        """
        content = io.BytesIO()
        np.savez_compressed(content, step=step, **self.arrays())
        write_bytes(path, content.getvalue())
