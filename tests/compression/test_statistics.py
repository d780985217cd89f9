"""Statistics of the inputs of layers, against the inputs themselves."""

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import Softmax
from efficient_tx.compression.model import select
from efficient_tx.compression.statistics import gather, recorder
from efficient_tx.models import DualEncoder
from tests.support.small import LENGTH, SIZES, batches, layer_inputs, model


@pytest.mark.parametrize("path", ["encoder.blocks.1.mlp.down", "encoder.blocks.1.mixer.out"])
def test_statistics_are_those_of_the_real_tokens(path):
    made = model()
    layers = select(made, path)
    inputs = gather(made, layers, batches(), triangles=[layers[0].path])[layers[0].path]
    x = np.concatenate([layer_inputs(made, batch, layers[0].path) for batch in batches()]).astype(np.float64)
    assert inputs.count == len(x) == sum(batch["mask"].sum() for batch in batches())
    # The model computes in float32, compiled and not; the sums are float64.
    np.testing.assert_allclose(inputs.mean, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(inputs.moment, x.T @ x / len(x), atol=1e-5)
    np.testing.assert_allclose(inputs.variance, x.var(0), atol=1e-5)
    np.testing.assert_allclose(inputs.triangle.T @ inputs.triangle / len(x), inputs.moment, atol=1e-10)


def test_examples_without_weight_and_padding_count_for_nothing():
    made, layers = model(), select(model(), "mlp")
    (batch, *_) = batches()
    first = {name: array[:5] for name, array in batch.items()}
    noisy = {name: array.copy() for name, array in batch.items()}
    noisy["weight"][5:] = 0
    noisy["inputs"][~noisy["mask"]] = 3
    for path, one in gather(made, layers, [first]).items():
        other = gather(made, layers, [noisy])[path]
        assert one.count == other.count
        np.testing.assert_allclose(one.moment, other.moment, atol=1e-6)


@pytest.mark.parametrize("names", [(), ("mask",), ("mask2",), ("mask", "mask2")])
def test_both_texts_of_a_pair_count_with_masks_or_without(names):
    """Of the examples with a weight; a text without a mask is all real."""
    sizes = SIZES | {"layers": 1}
    made = DualEncoder(num_classes=3, vocab_size=16, mixers=[Softmax], rngs=nnx.Rngs(0), **sizes)
    one, two, *_ = batches()
    pairs = {"inputs": one["inputs"], "inputs2": two["inputs"], "label": one["label"], "weight": one["weight"].copy()}
    pairs |= {name: text["mask"] for name, text in zip(("mask", "mask2"), (one, two)) if name in names}
    pairs["weight"][5:] = 0
    layers = select(made, "mlp.up")
    found = gather(made, layers, [pairs])[layers[0].path]
    alone = {name: array[:5] for name, array in pairs.items()}
    given = [alone.get(name, np.ones((5, LENGTH), bool)) for name in ("mask", "mask2")]
    expected = gather(made, layers, [alone | dict(zip(("mask", "mask2"), given))])[layers[0].path]
    assert found.count == expected.count == np.sum(given)
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-6)  # the model computes in float32
    np.testing.assert_allclose(found.moment, expected.moment, atol=1e-5)


def test_statistics_of_rows_on_several_devices_are_those_on_one(monkeypatch):
    made = model()
    layers = select(made, "blocks.1.mlp.down")
    path = layers[0].path

    def found():
        (tokens,) = recorder(made, layers)(batches()[0])[path]
        return len(tokens.x.sharding.device_set), gather(made, layers, batches(), triangles=[path])[path]

    four, spread = found()
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    one, alone = found()
    assert (four, one, spread.count) == (4, 1, alone.count)
    # The model computes in float32; rows come back in their order.
    np.testing.assert_allclose(spread.moment, alone.moment, atol=1e-5)
    np.testing.assert_allclose(spread.mean, alone.mean, atol=1e-6)
    np.testing.assert_allclose(spread.triangle, alone.triangle, atol=1e-4)
