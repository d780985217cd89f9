"""The scripts in examples/, each as a process, and the commands for those that are files of a run."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

import efficient_tx.eval
import efficient_tx.train
from efficient_tx.config.trained import trained_run
from lra.expressions import VOCABULARY
from tests.docs.pages import SHORT
from tests.support import ROOT
from tests.support.command import finished_run, here, scratch
from tests.support.models import run as forward
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
        ("reuse_linen_bridge.py", r"all parameters moved: True\n.*the same: False\n.*other padding: True"),
        ("reuse_equinox.py", r"gradients finite: True"),
        ("reuse_task_jax.py", r"test accuracy"),
        pytest.param("reuse_task_torch.py", r"test accuracy", marks=pytest.mark.torch),
    ],
)
def test_reuse(script, line):
    for package, extra in (("equinox", "test"), ("torch", "bench")):
        if package in script:
            installed(package, extra=extra)
    out = run(EXAMPLES / script)
    assert re.search(line, out)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", out, re.MULTILINE)]
    assert losses == sorted(losses, reverse=True)  # what trains, learns
    for score, baselines in re.findall(r"test accuracy ([\d.]+); to beat: (.*)", out):
        assert float(score) > 1.2 * max(map(float, re.findall(r"[\d.]+", baselines)))


# Without the package and flax; prints what of them, or of what they need, was imported all the same.
ALONE = """
import runpy, sys
for name in ("efficient_tx", "lra", "flax", "optax", "orbax", "ml_collections", "safetensors"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_an_exported_run_needs_jax_and_numpy_alone(tmp_path):
    """Its answer is the run's own; bad input is one line."""
    path = tmp_path / "classifier.npz"
    out = run(EXAMPLES / "export_run.py", finished_run()[0], path)
    assert "for cpu, cuda, tpu" in out and (tmp_path / "classifier.safetensors").exists()
    text = "[MAX 4 3 [MIN 2 3 ] 1 ]"
    alone = (sys.executable, "-I", "-c", ALONE, str(EXAMPLES / "run_exported.py"))
    done = subprocess.run([*alone, str(path), text], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    _, _, model, _ = trained_run(finished_run()[0], "best")
    ids = np.array([[VOCABULARY.index(word) for word in text.split()]])
    assert f"{text} -> {forward(model, ids).argmax()}\n" in done.stdout
    assert float(re.search(r"difference to the exporting machine is (.*)\n", done.stdout)[1]) < 1e-5
    for given, line in [
        ([str(path), "[MAX 4 four ]"], "'four' is no word of the vocabulary"),
        (["none"], "none is no"),
    ]:
        done = subprocess.run([*alone, *map(str, given)], cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 1 and line in done.stderr and done.stderr.count("\n") == 1
    for script in ("export_run.py", "run_exported.py"):
        done = subprocess.run([sys.executable, EXAMPLES / script], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1 and done.stderr.startswith("give ")


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
    libraries = ("equinox", "linen", "linen_bridge", "nnx", "plain_jax", "task_jax", "task_torch")
    reuse = [f"reuse_{library}.py" for library in libraries]
    assert scripts == ["export_run.py", "own_mixer/my_mixers.py", "own_task/my_task.py", *reuse, "run_exported.py"]
    for script in scripts:
        text = (EXAMPLES / script).read_text(encoding="utf-8")
        assert "Command: " in text and "Duration: " in text, script
