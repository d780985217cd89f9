"""docs/your_own_mixer.md and docs/your_own_task.md: their files do what the pages say."""

import importlib

import jax
import numpy as np
import pytest

from efficient_tx.config.build import build_task
from efficient_tx.config.load import ConfigFile
from efficient_tx.config.names import mixer_class, parse_mixers
from efficient_tx.data.batching import collate
from tests.docs.pages import write_files
from tests.support.mixers import check_padding


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a new user, with the files of both pages."""
    for page in ("docs/your_own_mixer.md", "docs/your_own_task.md"):
        write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_own_mixers_keep_the_promises_of_padding(folder):
    assert parse_mixers("my_mixers:Shift,softmax") == ["my_mixers:Shift", "softmax"]
    check_padding(mixer_class("my_mixers:SquaredReLU"))
    q = np.random.default_rng(0).normal(size=(3, 1, 6, 1, 4)).astype(np.float32)
    weights = np.maximum(q[0, 0, :, 0] @ q[1, 0, :, 0].T, 0) ** 3
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-6)
    out = importlib.import_module("my_mixers").squared_relu(*q, power=3)
    np.testing.assert_allclose(out[0, :, 0], weights @ q[2, 0, :, 0], rtol=1e-4, atol=1e-6)  # float32


def test_own_task_is_read_from_its_csv(folder):
    task = build_task(ConfigFile("my_task.py").resolve({}))
    assert [len(split) for split in (task.train, task.validation, task.test)] == [2, 2, 2]
    assert bytes(np.array(task.train[0]["inputs"] - 1, np.uint8)) == b"this is a good film"
    assert [task.train[0]["label"], task.train[1]["label"]] == [1, 0]


def test_own_objective_is_a_regression(folder):
    task = build_task(ConfigFile("my_ratings.py").resolve({}))
    batch = collate([*task.train[:2], task.train[0]], task)
    batch["weight"][2] = 0  # fills up the batch
    assert batch["label"].dtype == np.float32
    outputs = np.array([[4.0], [1.0], [np.nan]], np.float32)  # labels are 5 and 4
    sums = jax.tree.map(float, task.objective.score(outputs, batch))
    assert sums == {"loss": (1.0 + 9.0, 2.0), "error": (1.0 + 3.0, 2.0)}
