"""What a user brings: a mixer, a weight structure and a task in files of their own, through train.py and eval.py."""

import json
import sys
import textwrap

import pytest

import efficient_tx.eval
import efficient_tx.train
from tests.support import ROOT
from tests.support.command import finish, here, start

MIXERS = """
    import jax.numpy as jnp
    from efficient_tx.attention import MultiHead, softmax
    from efficient_tx.linear import LowRank

    def sharpened(q, k, v, *, mask=None, key=None, sharpness: float = 2.0):
        '''Softmax attention with scores times a number.

        Args:
          sharpness: what scores are multiplied by.
        '''
        return softmax(sharpness * q, k, v, mask=mask)

    class Sharpened(MultiHead):
        '''Mine.'''
        function = staticmethod(sharpened)

    class Thin(LowRank):
        '''A structure of mine.'''
"""
TASK = """
    import jax.numpy as jnp
    import numpy as np
    from efficient_tx.task import Objective, Task

    KIND = "tokens"

    def sizes(*, length, **_):
        return {"num_classes": 1, "vocab_size": 5, "max_len": length}

    def score(outputs, batch):
        wrong, weight = outputs[:, 0] - batch["label"], batch["weight"]
        total = weight.sum()
        return {"loss": ((wrong**2 * weight).sum(), total), "error": ((abs(wrong) * weight).sum(), total)}

    OBJECTIVE = Objective(score, metrics=("error",), best="error", higher_is_better=False, label_dtype="float32")

    def split(count, seed, length):
        rng = np.random.default_rng(seed)
        inputs = rng.integers(1, 5, (count, length)).astype(np.int32)
        return [{"inputs": row, "label": float((row == 1).mean())} for row in inputs]

    def get_task(*, length: int = 6):
        '''The share of token 1.

        Args:
          length: tokens of an example.
        '''
        parts = (split(count, seed, length) for seed, count in enumerate((40, 13, 14)))
        return Task(
            *parts, kind=KIND, name="shares", source="drawn", objective=OBJECTIVE, baselines={"mean": 0.5},
            **sizes(length=length),
        )
"""
CONFIG = """
    from efficient_tx.config import make_config

    def get_config(argument=""):
        return make_config(
            "shares.py", argument, steps=4, batch_size=8, eval_every=2, checkpoint_every=2, log_every=2, loggers=(),
            model={"features": 8, "layers": 1, "heads": 2, "mlp_features": 8}, optimizer={"warmup": 0},
        )
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the user's files and nothing else."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name, text in {"mine.py": MIXERS, "shares.py": TASK, "plan.py": CONFIG}.items():
        (folder / name).write_text(textwrap.dedent(text))
    monkeypatch.chdir(folder)
    yield folder
    forget()


def forget():
    for name in [name for name in sys.modules if name in ("mine", "others") or name.startswith("task_file")]:
        del sys.modules[name]


def train(*arguments):
    return here(efficient_tx.train.command, *arguments)


def evaluate(*arguments):
    return here(efficient_tx.eval.command, *arguments)


def read(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_mixer_a_structure_and_a_task_of_ones_own(folder, tmp_path, monkeypatch):
    command = ["--config=plan.py:mine:Sharpened+mine:Thin", "--workdir=run", "--config.attention.Sharpened.sharpness=3"]
    status, out, error = train(*command)
    assert (status, error) == (0, ""), error
    config, summary = read(folder / "run" / "config.json"), read(folder / "run" / "summary.json")
    assert (config["mixers"], config["linear"]["mlp"]["name"]) == ("mine:Sharpened", "mine:Thin")
    assert config["attention"]["Sharpened"]["sharpness"] == 3.0
    # A relative path of a task is stored as an absolute one.
    assert config["task"] == {"name": str(folder / "shares.py"), "length": 6}
    assert {"val_error", "test_error", "last_test_error"} <= set(summary) and "test_accuracy" not in summary
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    validation = {line["step"]: line["error"] for line in lines if line["split"] == "validation"}
    assert summary["val_error"] == min(validation.values()) == validation[summary["best_step"]]
    assert f"test error {summary['test_error']:.4f} (checkpoint of step {summary['best_step']}" in out
    assert "to beat: mean 0.5000" in out and summary["baselines"] == {"mean": 0.5}

    # The same command is done; its evaluation, from this folder, says the same.
    assert "is finished" in train(*command)[1]
    forget()
    status, out, error = evaluate("--workdir=run")
    assert (status, error) == (0, "")
    row = read(folder / "run" / "eval_test_best.json")
    assert (row["error"], row["count"], row["metrics"]) == (summary["test_error"], 14, ["error"])
    assert "error" in out and "accuracy" not in out
    # The parameters are those of softmax: the class is named again, or another one.
    for name in ("softmax", "mine:Sharpened"):
        forget()
        assert evaluate("--workdir=run", "--set", f"mixers={name}")[::2] == (0, "")
    again = read(folder / "run" / "eval_test_best_mixers=mine-Sharpened.json")
    assert again["error"] == row["error"] != read(folder / "run" / "eval_test_best_mixers=softmax.json")["error"]

    # From another folder, where only the mixer's module is missing.
    forget()
    monkeypatch.chdir(tmp_path)
    status, _, error = evaluate("--workdir=work/run")
    assert status == 2 and error.count("\n") == 1 and "No module named 'mine'" in error
    assert "modules are looked for in the working directory and on PYTHONPATH" in error
    (tmp_path / "mine.py").write_text(textwrap.dedent(MIXERS))
    assert evaluate("--workdir=work/run")[::2] == (0, "")


def test_two_classes_of_one_name_are_refused(folder):
    (folder / "others.py").write_text(textwrap.dedent(MIXERS))
    status, out, error = train("--config=plan.py:mine:Sharpened,others:Sharpened", "--workdir=run")
    assert (status, out, error.count("\n")) == (2, "", 1) and not (folder / "run").exists()
    assert "'others:Sharpened' and 'mine:Sharpened'" in error or "'mine:Sharpened' and 'others:Sharpened'" in error


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("def get_task", "def got_task", "has no get_task"),
        ("KIND", "SORT", "has no KIND"),
        ("def sizes", "def size", "has no sizes"),
        ('"tokens"', '"words"', "whose KIND is 'words': choose one of"),
        ("        parts = (", "        raise RuntimeError('lost')\n        parts = (", "RuntimeError: lost ("),
        (
            "    parts = (",
            "    return None\n        parts = (",
            "get_task returned a NoneType, not an efficient_tx.task",
        ),
        (
            "**sizes(length=length),",
            "**{**sizes(length=length), 'num_classes': 2},",
            "sizes() says that num_classes is 1",
        ),
        ("def split(", "def split((", "shares.py"),
        ("outputs[:, 0] - batch", "outputs - batch", "the objective of the task cannot be used"),
        ('"num_classes": 1, ', "", "config.task cannot be used: sizes() gives no num_classes, which a model"),
        ("float((row", "1e300 * 1e300 * float((row", "the label inf: labels are finite (example 0 of the train split)"),
        ("astype(np.int32)", "astype(np.float32)", "has 'inputs' of float32 [6]: token ids are whole numbers [length]"),
    ],
    ids=[
        *("get_task", "KIND", "sizes", "wrong KIND", "exception", "no Task", "other sizes", "syntax", "objective"),
        *("sizes", "label", "dtype"),
    ],
)
def test_a_mistake_in_a_tasks_file_is_one_line(folder, old, new, words):
    assert old in TASK
    (folder / "shares.py").write_text(textwrap.dedent(TASK.replace(old, new)))
    status, _, error = train("--config=plan.py:softmax", "--workdir=run")
    assert (status, error.count("\n")) == (2, 1), error
    assert words in error and "Traceback" not in error and not (folder / "run").exists()


def test_a_missing_file_of_a_task_is_one_line(folder):
    (folder / "shares.py").unlink()
    status, out, error = train("--config=plan.py:softmax", "--workdir=run")
    assert (status, out, error.count("\n")) == (2, "", 1) and "is 'shares.py': there is no such file" in error


def test_the_help_shows_the_users_options(folder):
    status, out, error = train("--config=plan.py:mine:Sharpened+mine:Thin", "--help")
    assert (status, error) == (0, "")
    assert "attention.Sharpened.sharpness = 2.0\n      what scores are multiplied by\n" in out
    assert "task.length = 6\n      tokens of an example\n" in out and "linear.mlp.name = 'mine:Thin'" in out


@pytest.mark.slow
def test_modules_run_from_an_empty_folder(tmp_path):
    """As processes: python -m efficient_tx.train with a shipped config, and .eval; both say what is wrong."""
    path = {"PYTHONPATH": str(ROOT)}
    small = ["--config=quickstart:softmax", "--config.steps=2", "--config.task.train_size=300"]
    small += ["--config.task.val_size=50", "--config.task.test_size=50", "--config.model.layers=1"]
    small += ["--config.model.features=16", "--config.model.heads=2", "--config.model.mlp_features=16"]
    small += ["--config.batch_size=8", "--config.grad_accum=1", "--config.task.max_len=24", "--config.task.min_len=4"]
    status, _, error = finish(
        start("-m efficient_tx.train", *small, "--workdir=run", folder=tmp_path, environment=path)
    )
    assert status == 0, error
    status, out, error = finish(start("-m efficient_tx.eval", "--workdir=run", folder=tmp_path, environment=path))
    assert (status, error) == (0, "") and "listops" in out
    status, _, error = finish(start("-m efficient_tx.eval", "run", folder=tmp_path, environment=path))
    assert status == 2 and error.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_a_mixer_of_ones_own_as_processes(folder):
    """Nothing but the working directory puts the module on the path."""
    path = {"PYTHONPATH": str(ROOT)}
    options = ["--config=plan.py:mine:Sharpened", "--workdir=run"]
    status, _, error = finish(start("-m efficient_tx.train", *options, folder=folder, environment=path))
    assert status == 0, error
    evaluation = ["--workdir=run", "--set", "mixers=mine:Sharpened"]
    status, _, error = finish(start("-m efficient_tx.eval", *evaluation, folder=folder, environment=path))
    assert (status, error) == (0, "")
