"""Workdirs as runs leave them, written in a moment: configs are real, scores are given."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficient_tx.config.load import ConfigFile
from efficient_tx.training.disk import write_checked
from efficient_tx.training.history import encode

SMALL = {"task.max_len": 16, "model.features": 8, "model.mlp_features": 16, "model.layers": 1, "model.heads": 2}


def config_of(method: str, **settings: Any) -> dict[str, Any]:
    return ConfigFile(f"quickstart:{method}").resolve({**SMALL, **settings}).to_dict()


def write_run(
    path: Path,
    config: Mapping[str, Any],
    *,
    validation: Sequence[tuple[int, float]] = ((10, 0.25), (20, 0.5)),
    test: float | None = 0.5,
    speed: float = 10.0,
    right: np.ndarray | None = None,
    **summary: Any,
) -> Path:
    """A run in the folder `path`.

    Args:
      validation: (step, accuracy) of its evaluations.
      test: accuracy; None for a run that is not finished.
      speed: steps a second.
      right: bool `[items]`, whether each test item was answered rightly, saved as predictions.
      summary: replaces entries of summary.json.
    """
    path.mkdir(parents=True)
    write_checked(path / "config.json", dict(config))
    lines, before = [], 0
    for step, accuracy in validation:
        line = {"step": step, "loss": 1.0, "accuracy": accuracy}
        lines.append({**line, "split": "train", "seconds": (step - before) / speed})
        lines.append({**line, "split": "validation"})
        before = step
    (path / "metrics.jsonl").write_bytes(b"".join(map(encode, lines)))
    if test is not None:
        about = {"task": "listops", "source": "generated, seed 0", "best_step": 20, "baselines": {"constant": 0.125}}
        about |= {"val_accuracy": 0.5, "test_accuracy": test, "last_test_accuracy": test, "higher_is_better": True}
        about |= {"parameters": 1000, "steps_per_second": speed, "peak_memory_bytes": 10**9, "protocol": "default"}
        about |= {"protocol_departures": [], "versions": {"jax": "1.2.3"}, "commit": "abc", "peak_memory_of": "process"}
        about |= {"device": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1}}
        write_checked(path / "summary.json", json.loads(json.dumps({**about, **summary})))
    if right is not None:
        labels = np.arange(len(right)) % 10
        scores = {"accuracy": right.astype(np.float32), "accuracy_count": np.ones(len(right), np.float32)}
        np.savez(path / "predictions_test_best.npz", step=20, label=labels, **scores)
    return path
