"""A weight structure of one's own is one file and a row: the table, the config and the models find it on arrival."""

import importlib
import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION
from efficient_tx.compare import readme
from efficient_tx.config.describe import describe
from efficient_tx.config.names import structure_class
from efficient_tx.config.schema import make_config
from efficient_tx.linear import LINEAR, densify, replace
from tests.support.mixers import check_padding

pytestmark = pytest.mark.quick
SOURCE = '''
"""A diagonal matrix."""

import jax.numpy as jnp

from efficient_tx.linear.structured import Factor, Structured, pad


class Diagonal(Structured):
    """A diagonal matrix.

    Args:
      power: the power of the stored numbers that is on the diagonal, odd.
    """

    paper = "Nobody 2026"
    computes = "diag(d)^p"
    size = "n"
    nearest = "the diagonal"

    def __init__(self, in_features, out_features, *, power: int = 1, **common):
        self.power = power
        super().__init__(in_features, out_features, **common)

    def factors(self):
        count = min(self.in_features, self.out_features)
        return {"d": Factor((count,), count / self.out_features)}

    def multiply(self, x, d):
        return pad(x[..., : d.shape[0]] * d**self.power, self.out_features)

    def fit(self, kernel):
        d = jnp.diagonal(kernel)
        return {"d": jnp.sign(d) * jnp.abs(d) ** (1 / self.power)}
'''


@pytest.fixture
def diagonal(tmp_path, monkeypatch):
    """The class: its file is written, imported, and has its row."""
    (tmp_path / "own_diagonal.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    cls = importlib.import_module("own_diagonal").Diagonal
    monkeypatch.setitem(LINEAR, "diagonal", cls)
    yield cls
    monkeypatch.delitem(sys.modules, "own_diagonal")


def test_an_own_structure_is_found_everywhere(diagonal):
    line = next(line for line in readme.structure_table().splitlines() if line.startswith("| `diagonal` |"))
    assert "diag(d)^p" in line and "`own_diagonal`" in line
    assert inspect.signature(diagonal).parameters["power"].default == 1
    assert {"use_bias", "dtype", "rngs"} <= inspect.signature(diagonal).parameters.keys()
    for name in ("diagonal", "own_diagonal:Diagonal"):
        assert structure_class(name, "linear.mlp.name") is diagonal
        config = make_config("lra.listops", f"softmax+{name}+dense")
        assert config.linear.mlp.to_dict() == {"name": name, "power": 1}
        assert describe(config)["linear.mlp.power"] == "the power of the stored numbers that is on the diagonal, odd"


def test_an_own_structure_keeps_the_promises(diagonal):
    kernel = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    layer = diagonal.from_dense(jnp.asarray(kernel), jnp.arange(7.0), power=3)
    kept = np.eye(5, 7, dtype=np.float32) * kernel
    np.testing.assert_allclose(layer.to_dense(), kept, atol=1e-6)  # float32 powers
    x = np.ones((2, 3, 5), np.float32)
    np.testing.assert_allclose(jax.jit(lambda x: layer(x))(x), x @ kept + np.arange(7), atol=1e-5)
    assert layer.parameters == 5 + 7 and layer.multiplies == 5
    check_padding(ATTENTION["softmax"], linear=diagonal)


def test_an_own_structure_takes_and_leaves_the_place_of_dense_layers(diagonal):
    model = nnx.Dict(one=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    kernel = np.asarray(model.one.kernel[...])
    replace(model, lambda path, layer: True, diagonal)
    assert type(model.one) is diagonal
    densify(model)
    np.testing.assert_allclose(model.one.kernel[...], np.diag(np.diag(kernel)))
