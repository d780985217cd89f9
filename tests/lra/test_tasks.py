"""Every task by its command: four steps and an evaluation, on generated or fetched data and a tiny model."""

import json

import pytest

from tests.support import ROOT, toy
from tests.support.command import evaluate_here, scratch, train_here
from tests.support.fetched import fetched

# config, the data set that it needs, its settings
RUNS = {
    "listops": ("lra_listops.py:linear", None, {"task.min_len": 4, "task.max_len": 40}),
    "text": ("lra_text.py:linear", "spam", {"task.source": "spam", "task.max_len": 100}),
    "text in buckets": (
        "lra_text.py:linear",
        "spam",
        {"task.source": "spam", "task.max_len": 300, "task.bucket": True},
    ),
    "retrieval": ("lra_retrieval.py:linear", "sotu", {"task.source": "sotu", "task.max_len": 100}),
    "image": ("lra_image.py:linear", "fashion_mnist", {"task.source": "fashion_mnist"}),
    "image, legacy mask": (
        "lra_image.py:linear",
        "fashion_mnist",
        {"task.source": "fashion_mnist", "task.legacy_mask": True},
    ),
    "pathfinder": ("lra_pathfinder.py:linear", None, {"task.contour_length": 6, "model.positions": "rope2d"}),
    "pathfinder, legacy mask": ("lra_pathfinder.py:linear", None, {"task.legacy_mask": True, "model.pool": "cls"}),
    "path-x": ("lra_pathx.py:linear", None, {}),
    "recall": ("recall.py:gla", None, {"attention.gla.conv": 4}),
    "recall, needle": ("recall.py:linear", None, {"task.kind": "needle", "task.max_len": 128}),
    "recall, parity": ("recall.py:softmax", None, {"task.kind": "parity", "task.max_len": 32}),
    "vision": ("vit_fashion.py:linear", "fashion_mnist", {}),
    "vision, pyramid": ("soft_fashion.py", "fashion_mnist", {}),
}
TEST_SIZE = 13  # of batches of 4, the last one is not full
TINY = {
    "steps": 4,
    "batch_size": 4,
    "grad_accum": 1,
    "eval_every": 2,
    "log_every": 2,
    "optimizer.warmup": 2,
    "task.train_size": 50,
    "task.val_size": 10,
    "task.test_size": TEST_SIZE,
    "loggers": "()",
}
TINY_MODEL = {"model.features": 16, "model.mlp_features": 16, "model.heads": 2, "model.layers": 1}
PYRAMID = {"model.features": "(8,8,8)", "model.heads": "(1,1,1)"}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_four_steps_and_an_evaluation(run, tmp_path):
    config, data, settings = RUNS[run]
    model = PYRAMID if config.startswith("soft") else TINY_MODEL
    settings = TINY | model | {"task.data_dir": fetched(data) if data else scratch() / "data"} | settings
    options = [f"--config.{key}={value}" for key, value in settings.items()]
    status, out, error = train_here(tmp_path, *options, run=[f"--config={ROOT}/configs/{config}"])
    assert status == 0, error
    lines = toy.lines(tmp_path)
    assert [(line["step"], line["split"]) for line in lines] == [
        (step, split) for step in (2, 4) for split in ("train", "validation")
    ]
    assert all(0 < line["loss"] < 20 and 0 <= line["accuracy"] <= 1 for line in lines)
    status, table, error = evaluate_here(f"--workdir={tmp_path}")
    assert status == 0, error
    row = json.loads((tmp_path / "eval_test_best.json").read_text())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (row["task"], row["source"]) == (summary["task"], summary["source"])
    assert row["accuracy"] == pytest.approx(summary["test_accuracy"])
    # Of recall the answers count, one a sequence at least.
    assert row["count"] >= TEST_SIZE if config.startswith("recall") else row["count"] == TEST_SIZE
    assert f"{row['accuracy']:.4f}" in table and f"{row['accuracy']:.4f}" in out
