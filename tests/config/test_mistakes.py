"""Mistakes in a config: one line that names the place, the value and what would work."""

import pytest

from efficient_tx.config import check, load, resolve, stored
from tests.support import ROOT


@pytest.fixture(autouse=True)
def root(monkeypatch):
    """Config files are named from the repository's root."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("path", "typed", "words"),
    [
        ("configs/lra_listops.py:softmax+monrach", {}, ["'monrach'", "nearest: 'monarch'"]),
        ("skyformer", {"task.name": "lra.text"}, ["config.task.name is 'lra.text'", "choose the task by its config"]),
        ("configs/lra_listops.py:softmax*0", {}, ["'softmax*0'", "NAME*COUNT"]),
        ("configs/lra_listops.py:a+b+c+d", {}, ["at most three parts"]),
        ("configs/lra_listop.py", {}, ["configs/lra_listop.py", "nearest is configs/lra_listops.py"]),
        ("configs/base.py", {}, ["configs/base.py has no get_config"]),
        ("skyformer", {"model.causal": True}, ["config.attention.skyformer", "causal"]),
        ("fourier", {"model.positions": "rope"}, ["config.attention.fourier", "rope"]),
        ("skyformer", {"protocol": "lar"}, ["'lar'", "choose one of default, lra, skyformer"]),
        ("skyformer", {"optimizer.name": "adamm"}, ["config.optimizer.name is 'adamm'", "nearest: 'adam'"]),
        ("skyformer", {"dtype": "float16"}, ["config.dtype is 'float16'", "bfloat16"]),
        ("skyformer", {"grad_accum": 5}, ["config.grad_accum is 5", "batch_size 32"]),
        ("skyformer", {"attention.softmax.x": 1}, ["attention.softmax.x", "mixers here are skyformer"]),
        ("skyformer", {"loggers": ("wand",)}, ["'wand'", "nearest: 'wandb'"]),
        ("skyformer", {"steps": 0}, ["config.steps is 0", "at least 1"]),
        ("skyformer", {"seed": -1}, ["config.seed is -1"]),
        ("skyformer", {"model.dropout": 0.999999}, ["config.model: dropout is 0.999999"]),
        ("skyformer", {"model.head_dim": -4}, ["config.model.head_dim is -4"]),
        ("skyformer", {"model.positions": "rope2d"}, ["rope2d", "2000 is no square"]),
        ("skyformer", {"task.max_len": 10**11}, ["config.task.max_len"]),
        ("skyformer", {"task.max_len": 0}, ["config.task.max_len is 0: it must be at least 1"]),
        ("README.md", {}, ["no config file README.md"]),
        ("skyformer", {"model.features": 0}, ["config.model.features is 0", "at least 1"]),
        ("skyformer", {"attention.skyformer.landmarks": 1}, ["config.attention.skyformer: landmarks is 1"]),
        ("skyformer+monarch", {"linear.mlp.blocks": 0}, ["config.linear.mlp: blocks is 0"]),
        ("skyformer+monarch", {"densify_at": 5000}, ["config.densify_at is 5000", "less than steps=5000"]),
        ("skyformer", {"densify_at": 10}, ["config.densify_at is 10", "no weight is structured"]),
        ("skyformer+monarch", {"densify_at": 10, "densify_warmup": -1}, ["config.densify_warmup is -1"]),
        (
            "skyformer+monarch",
            {"densify_at": 10, "optimizer.name": "schedule_free_adamw"},
            ["config.optimizer.name=schedule_free_adamw", "densify_at"],
        ),
        (
            "skyformer",
            {"optimizer.structured_lr": True, "optimizer.name": "sgd"},
            ["config.optimizer.structured_lr=True has no rule for optimizer.name=sgd"],
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place(path, typed, words):
    path = path if "." in path else f"configs/lra_listops.py:{path}"
    with pytest.raises(ValueError) as caught:
        check.check(resolve.resolve(load.load(path), typed))
    for word in words:
        assert word in str(caught.value)


def test_a_damaged_config_is_named():
    with pytest.raises(ValueError, match=r"config\.json has no .*damaged"):
        stored.restore({})
