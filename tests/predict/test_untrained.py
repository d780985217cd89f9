"""Scores before training, beside closed forms of a linear model and loops over examples."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION
from efficient_tx.models import Classifier
from efficient_tx.predict.untrained import alignment, approximation, gradsign
from efficient_tx.training.objective import CLASSIFICATION

ROWS, FEATURES, CLASSES = 6, 5, 3


class Linear(nnx.Module):
    """Logits x W, so that all derivatives are known."""

    def __init__(self):
        self.weight = nnx.Param(jnp.asarray(np.random.default_rng(0).normal(size=(FEATURES, CLASSES)), jnp.float32))

    def __call__(self, inputs, *, key=None):
        return inputs @ self.weight[...]


def batch(labels=(0, 1, 2, 0, 1, 2)):
    x = np.random.default_rng(1).normal(size=(ROWS, FEATURES)).astype(np.float32)
    return {"inputs": x, "label": np.array(labels, np.int32), "weight": np.ones(ROWS, np.float32)}


@pytest.mark.quick
def test_signs_of_gradients():
    given, model = batch(), Linear()
    logits = given["inputs"] @ np.asarray(model.weight[...])
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    off = chances - np.eye(CLASSES)[given["label"]]
    signs = np.sign(given["inputs"][:, :, None] * off[:, None, :])
    expected = np.abs(signs.sum(0)).sum() / (ROWS * FEATURES * CLASSES)
    assert gradsign(model, CLASSIFICATION, given) == pytest.approx(expected, rel=1e-6)
    alike = {**given, "inputs": np.ones_like(given["inputs"]), "label": np.zeros(ROWS, np.int32)}
    assert gradsign(model, CLASSIFICATION, alike) == 1


@pytest.mark.quick
def test_the_tangent_kernel_of_a_linear_model_is_that_of_its_inputs():
    """∂(x W s)/∂W = x sᵀ: the kernel is x·y times the number of classes, for signs s of either kind."""
    given, centre = batch(), np.eye(ROWS) - 1 / ROWS

    def cosine(kernel, other):
        a, b = centre @ kernel @ centre, centre @ other @ centre
        return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)

    x, same = given["inputs"].astype(np.float64), np.equal.outer(given["label"], given["label"])
    assert alignment(Linear(), given) == pytest.approx(cosine(x @ x.T, same), rel=1e-4)  # products in float32
    numbers = {**given, "label": x[:, 0]}
    assert alignment(Linear(), numbers) == pytest.approx(cosine(x @ x.T, np.outer(x[:, 0], x[:, 0])), rel=1e-4)
    assert alignment(Linear(), batch([1] * ROWS)) is None


@pytest.mark.quick
def test_of_a_label_for_each_token_the_first_that_counts():
    class Tokens(Linear):
        def __call__(self, inputs, *, key=None):
            return jnp.stack([inputs @ self.weight[...], -(inputs**2) @ self.weight[...]], axis=1)

    given = batch()
    labels = np.stack([np.zeros(ROWS, np.int32), given["label"]], axis=1)
    second = {**given, "label": labels, "weight": np.array([[0, 1]] * ROWS, np.float32)}
    squares = {**given, "inputs": -(given["inputs"] ** 2)}
    assert alignment(Tokens(), second) == pytest.approx(alignment(Linear(), squares), rel=1e-6)


def test_in_a_transformer_as_example_by_example():
    tokens = np.random.default_rng(0).integers(1, 9, (4, 12)).astype(np.int32)
    mask = np.arange(12) < np.array([12, 9, 7, 12])[:, None]
    given = {"inputs": np.where(mask, tokens, 0), "mask": mask, "label": np.array([0, 1, 2, 1]), "weight": np.ones(4)}

    def model_of(mixer, **options):
        return Classifier(
            vocab_size=9, max_len=12, num_classes=3, features=8, layers=1, heads=2, mlp_features=8, dropout=0.0,
            mixers=[partial(ATTENTION[mixer], linear=nnx.Linear, **options)], rngs=nnx.Rngs(3),
        )  # fmt: skip

    model = model_of("softmax")
    graphdef, params = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(params, row):
        return -jax.nn.log_softmax(nnx.merge(graphdef, params)(row["inputs"], mask=row["mask"]))[0, row["label"][0]]

    rows = [{name: array[i : i + 1] for name, array in given.items()} for i in range(4)]
    signs = [np.concatenate([np.sign(g).ravel() for g in jax.tree.leaves(gradient(params, row))]) for row in rows]
    # A sign may differ where a gradient is rounding: of a thousand parameters, some.
    assert gradsign(model, CLASSIFICATION, given) == pytest.approx(np.abs(np.sum(signs, 0)).mean() / 4, abs=0.01)
    assert approximation(model, given) == 0
    assert 0.001 < approximation(model_of("local", window=3), given) < 2
    assert approximation(model_of("vmean"), given) is None or approximation(model_of("vmean"), given) > 0
    assert approximation(model_of("fourier"), given) is None
