"""The worked examples of CONTRIBUTING.md: files in their places and rows in the tables, trained for a few steps."""

import importlib.util
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION
from efficient_tx.config.build import build_model, build_task
from efficient_tx.config.check import check
from efficient_tx.config.load import ConfigFile
from efficient_tx.config.resolve import resolve
from efficient_tx.data.batching import train_batches
from efficient_tx.linear import LINEAR
from efficient_tx.training.objective import classification
from tests.docs.pages import write_files
from tests.support import ROOT
from tests.support.mixers import check_padding

TINY = {"task.max_len": 8, "model.layers": 1, "model.features": 16, "model.mlp_features": 32, "model.causal": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """path in the repository -> where the example of the page was written."""
    folder = tmp_path_factory.mktemp("contributing")
    return {path.relative_to(folder).as_posix(): path for path in write_files("CONTRIBUTING.md", folder)}


@pytest.fixture
def placed(files, monkeypatch):
    """Makes an example the module that it would be in the repository."""

    def place(path):
        assert not (ROOT / path).exists()
        name = path.removesuffix(".py").replace("/", ".")
        spec = importlib.util.spec_from_file_location(name, files[path])
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return place


def test_mixer_structure_and_task_train(files, placed, monkeypatch):
    """All three at once, through the config, from the command's argument to a loss that falls."""
    mixer = placed("efficient_tx/attention/fixed/decay.py").Decay
    monkeypatch.setitem(ATTENTION, "decay", mixer)
    monkeypatch.setitem(LINEAR, "banded", placed("efficient_tx/linear/banded.py").Banded)
    placed("efficient_tx/data/parity_of_ones.py")
    assert mixer.family == "fixed"

    file = ConfigFile(f"{files['configs/parity_of_ones.py']}:decay+banded")
    config = resolve(file.config(), TINY | {"attention.decay.rate": 0.8, "linear.mlp.bands": 8})
    check(config)
    task = build_task(config)
    assert task.baselines["constant"] >= 0.5
    model = build_model(config, task)
    assert {type(layer).__name__ for _, layer in nnx.iter_modules(model.encoder)} >= {"Decay", "Banded"}
    losses = train(model, task, steps=40)
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def train(model, task, steps):
    """The losses of gradient descent: one small program, where the real loop has several."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def step(params, batch):
        def loss(params):
            total, count = classification(nnx.merge(graphdef, params)(batch["inputs"], mask=batch["mask"]), batch)[
                "loss"
            ]
            return total / count

        value, gradients = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    losses = []
    for batch in train_batches(task, batch_size=32, seed=0)[:steps]:
        value, params = step(params, batch)
        losses.append(float(value))
    return losses


def test_mixer_keeps_the_promises(placed):
    module = placed("efficient_tx/attention/fixed/decay.py")
    check_padding(module.Decay)
    v = np.random.default_rng(0).normal(size=(1, 5, 1, 3)).astype(np.float32)
    expected = np.zeros((5, 3))
    for i in range(5):  # the formula of the docstring
        weights = [0.5 ** (i - j) for j in range(i + 1)]
        expected[i] = np.average(v[0, : i + 1, 0], axis=0, weights=weights)
    out = module.decay(v, v, v, causal=True, rate=0.5)
    np.testing.assert_allclose(out[0, :, 0], expected, rtol=1e-5)  # float32
    both = np.stack([np.average(v[0, :, 0], axis=0, weights=0.5 ** abs(np.arange(5) - i)) for i in range(5)])
    np.testing.assert_allclose(module.decay(v, v, v, rate=0.5)[0, :, 0], both, rtol=1e-5)
    with pytest.raises(ValueError, match="rate is 2: it must be between 0 and 1"):
        module.Decay(8, heads=2, rate=2, rngs=None)


def test_structure_projects_and_multiplies(placed):
    banded = placed("efficient_tx/linear/banded.py").Banded
    kernel = np.asarray(jax.random.normal(jax.random.key(0), (6, 9)))
    near = banded.from_dense(kernel, bands=2)
    seen = np.zeros((6, 9), bool)
    for j in range(9):
        seen[[j % 6, (j + 1) % 6], j] = True
    np.testing.assert_allclose(near.to_dense(), np.where(seen, kernel, 0), rtol=1e-6)
