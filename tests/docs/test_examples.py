"""The scripts in examples/, each as a process, and the commands for those that are files of a run."""

import os
import re
import subprocess
import sys

import pytest

import efficient_tx.eval
import efficient_tx.train
from tests.docs.pages import SHORT
from tests.support import ROOT
from tests.support.command import here, scratch
from tests.support.packages import installed

EXAMPLES = ROOT / "examples"


def run(*words, cwd=ROOT):
    """The standard output of a Python command that succeeds."""
    environment = os.environ | {"EFFICIENT_TX_DATA": str(scratch() / "data"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("reuse_plain_jax.py", r"same output with other padding: True\n.*gradients finite: True"),
        ("reuse_nnx.py", r"logits: \(8, 3\)"),
        (
            "reuse_linen.py",
            r"(same: False\n.*){2}same: True\nrefused: mask has shape .*pass the key mask",
        ),
        ("reuse_equinox.py", r"gradients finite: True"),
    ],
)
def test_reuse(script, line):
    if script == "reuse_equinox.py":
        installed("equinox", extra="test")
    out = run(EXAMPLES / script)
    assert re.search(line, out)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", out, re.MULTILINE)]
    assert losses == sorted(losses, reverse=True)  # what trains, learns


@pytest.mark.slow
def test_own_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = f"--config={EXAMPLES / 'own_task/my_task.py'}"
    status, out, error = here(efficient_tx.train.command, task, "--workdir=texts", "--config.steps=5")
    assert status == 0, error
    assert "texts (texts.csv): 120 training examples" in out
    status, out, error = here(efficient_tx.eval.command, "--workdir=texts")
    assert status == 0 and "texts" in out, error


@pytest.mark.slow
@pytest.mark.parametrize("mixers", ["my_mixers:SquaredReLU", "my_mixers:Shift,softmax"])
def test_own_mixer(mixers, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES / "own_mixer")
    monkeypatch.delitem(sys.modules, "my_mixers", raising=False)  # of another folder
    arguments = (f"--config=quickstart:{mixers}", f"--workdir={tmp_path}/run", *SHORT.split())
    status, out, error = here(efficient_tx.train.command, *arguments)
    assert status == 0 and "test accuracy" in out, error


def test_examples_are_all_run():
    """And each says how it is started, and how long that takes."""
    scripts = sorted(path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py"))
    reuse = [f"reuse_{library}.py" for library in ("equinox", "linen", "nnx", "plain_jax")]
    assert scripts == ["own_mixer/my_mixers.py", "own_task/my_task.py", *reuse]
    for script in scripts:
        text = (EXAMPLES / script).read_text(encoding="utf-8")
        assert "Command: " in text and "Duration: " in text, script
