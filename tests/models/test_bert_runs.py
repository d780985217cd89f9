"""The shipped recipe of a pretrained text encoder, on a small BERT and a few e-mails: runs and refusals."""

import json

import numpy as np
import pytest

import efficient_tx.eval
import efficient_tx.train
from tests.support import ROOT, published_berts, vocabulary
from tests.support.command import here
from tests.support.fetched import store

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path):
    files = {f"easy-ham-1/{i}.txt": f"From: a\n\ndear reader, {'the ' * i}a.".encode() for i in range(30)}
    files |= {f"spam-1/{i}.txt": f"From: b\n\nbuy now{'!' * i}".encode() for i in range(1, 15)}
    store(tmp_path / "data" / "spam", files)
    vocabulary.write(published_berts.save(tmp_path / "data" / "minilm"))
    assert len(vocabulary.TOKENS) == published_berts.VOCAB
    return tmp_path


def train(root, workdir, *options, argument=""):
    settings = {
        "init_from": root / "data" / "minilm", "task.data_dir": root / "data", "task.vocab_size": published_berts.VOCAB,
        "task.max_len": 8, "model.features": published_berts.WIDTH, "model.layers": published_berts.LAYERS,
        "model.heads": published_berts.HEADS, "model.mlp_features": published_berts.HIDDEN,
        "model.norm_epsilon": 1e-3, "steps": 4, "batch_size": 4, "eval_every": 2, "log_every": 2, "loggers": "()",
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    config = f"--config={ROOT}/configs/minilm_spam.py{argument}"
    return here(efficient_tx.train.command, config, f"--workdir={root / workdir}", *flags, *options)


def test_a_run_starts_from_the_folder_is_evaluated_and_starts_another(root):
    status, out, error = train(root, "dense")
    assert status == 0, error
    for line in (
        f"parameters of {root}/data/minilm/model.safetensors, a checkpoint of BERT",
        "  of its 10 positions the first 8 are taken",
        "  head.kernel is not there: it stays as initialised",
    ):
        assert line in out
    status, table, error = here(efficient_tx.eval.command, f"--workdir={root / 'dense'}")
    assert status == 0, error
    row = json.loads((root / "dense" / "eval_test_best.json").read_text())
    assert row["count"] == 8 and f"{row['accuracy']:.4f}" in table
    status, out, error = train(root, "small", f"--config.init_from={root / 'dense'}", argument=":linear+low_rank")
    assert status == 0, error
    assert "all 4 projected layers, relative error 0." in out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("init_from={root}/data/spam", "config.json"),
        ("init_from={root}/nothing.safetensors", "there is no file "),
        ("model.layers=3", "has weights of 2 blocks, and here are 3"),
        ("model.heads=4", "num_attention_heads is 3 in "),
        ("task.max_len=11", "max_len is 11, and "),
        ("task.vocab_size=29", "the vocabulary has 30 tokens"),
        ("task.vocabulary={root}/data/spam", "no vocabulary in "),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(root, option, message):
    status, _, error = train(root, "run", f"--config.{option.format(root=root)}")
    assert (status, error.count("\n")) == (2, 1), error
    assert message in error
    assert not (root / "run").exists() or not any((root / "run").iterdir())


def test_without_a_start_it_is_trained_from_scratch(root):
    status, out, error = train(root, "scratch", "--config.init_from=")
    assert status == 0, error
    assert "a checkpoint of BERT" not in out
    assert np.isfinite(json.loads((root / "scratch" / "summary.json").read_text())["test_accuracy"])
