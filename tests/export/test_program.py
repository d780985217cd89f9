"""The exported program: of every mixer, structure and kind of model, for any batch size, and portable."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from efficient_tx.attention import ATTENTION, Skyformer, Softmax
from efficient_tx.export.program import PLATFORMS, program
from efficient_tx.kernels.verify.targets import TARGETS
from efficient_tx.linear import LINEAR, Dense
from efficient_tx.models import Classifier, DualEncoder, TokenClassifier, ViT
from efficient_tx.models.pretrained.parameters import parameters
from tests.support.mixers import BUDGET
from tests.support.models import run

LENGTH = 24
SIZES = {"num_classes": 3, "features": 16, "layers": 1, "heads": 2, "mlp_features": 24}
TEXT = SIZES | {"vocab_size": 16, "max_len": LENGTH}
DRAWS = np.random.default_rng(0)
MASK = np.arange(LENGTH) < np.array([[24], [11], [1]])
IDS = DRAWS.integers(0, 16, (3, LENGTH), dtype=np.int32)


def check(model, batch):
    """Read back, it computes what the model does, with other weights and batch sizes than it was exported with.

    The tolerance is for float32 sums of some dozen terms in another order.
    """
    exported = program(model, {name: x[:2] for name, x in batch.items()})
    assert exported.platforms == PLATFORMS
    assert not re.findall(r"triton|mosaic|tpu_custom_call|callback", exported.mlir_module())
    again = export.deserialize(exported.serialize())
    for variable in parameters(model).values():
        if jnp.issubdtype(variable.dtype, jnp.floating):
            variable.set_value(1.25 * variable[...])
    weights, outputs = {name: x[...] for name, x in parameters(model).items()}, run(model, **batch)
    for rows in (slice(0, 3), slice(1, 2)):
        ours = again.call(weights, {name: x[rows] for name, x in batch.items()})
        np.testing.assert_allclose(ours, outputs[rows], atol=1e-5 * max(1, abs(outputs).max()))


def of(cls, structure=Dense):
    def make(features, **sizes):
        return cls(features, linear=structure, **sizes, **cls.within(BUDGET))

    return make


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.first(1)
def test_every_mixer(name):
    check(Classifier(mixers=[of(ATTENTION[name])], rngs=nnx.Rngs(0), **TEXT), {"inputs": IDS, "mask": MASK})


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.first(1)
def test_every_structure(name):
    structure = LINEAR[name]
    model = Classifier(mixers=[of(Softmax, structure)], linear=structure, rngs=nnx.Rngs(0), **TEXT)
    check(model, {"inputs": IDS, "mask": MASK})


@pytest.mark.slow
def test_every_kind_of_model():
    """Pairs, labels of tokens with positions of their own, images of both models."""
    mixers, rngs = [of(Skyformer)], nnx.Rngs(0)
    check(
        DualEncoder(mixers=mixers, rngs=rngs, **TEXT),
        {"inputs": IDS, "mask": MASK, "inputs2": IDS[::-1].copy(), "mask2": MASK[::-1].copy()},
    )
    own = DRAWS.random((3, LENGTH)) < 0.7
    places = np.tile(np.arange(LENGTH, dtype=np.int32), (3, 1))
    check(TokenClassifier(mixers=mixers, rngs=rngs, **TEXT), {"inputs": IDS, "mask": own, "positions": places})
    images = DRAWS.normal(size=(3, 16, 16, 3)).astype(np.float32)
    check(ViT(image_shape=(16, 16, 3), patch_size=4, mixers=mixers, rngs=rngs, **SIZES), {"inputs": images})


# With Cholesky, and with eigenvalues; each beside a structured weight.
@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "target"), [("skyformer", "h100"), ("skyformer", "v5e"), ("lev", "h100"), ("lev", "v5e")]
)
def test_the_vendors_compilers_take_it(name, target):
    """As it is read back, for a chip that is not there."""
    structure = LINEAR["monarch"]
    model = Classifier(mixers=[of(ATTENTION[name], structure)], linear=structure, rngs=nnx.Rngs(0), **TEXT)
    batch = {"inputs": IDS, "mask": MASK}
    exported = export.deserialize(program(model, batch).serialize())
    place = jax.sharding.SingleDeviceSharding(TARGETS[target].devices()[0])

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    arguments = jax.tree.map(abstract, ({name: x[...] for name, x in parameters(model).items()}, batch))
    traced = jax.jit(lambda weights, batch: exported.call(weights, batch)).trace(*arguments)
    compiled = traced.lower(lowering_platforms=(TARGETS[target].platform,)).compile()
    assert compiled.out_info.shape == (3, 3)


def test_what_jax_cannot_keep_is_one_line():
    class Calling(nnx.Module):
        def __call__(self, inputs, *, key=None):
            return jax.pure_callback(np.sin, inputs, inputs, vmap_method="expand_dims")

    with pytest.raises(ValueError, match=r"the model cannot be exported: .*callback") as error:
        program(Calling(), {"inputs": np.ones((2, 3), np.float32)})
    assert "\n" not in str(error.value)


def test_products_of_float32_are_as_precise_on_every_platform():
    model = Classifier(mixers=[of(Softmax)], rngs=nnx.Rngs(0), **TEXT)
    batch = {"inputs": IDS, "mask": MASK}
    products = [
        re.findall(r"stablehlo.dot_general .*", program(model, batch, precision=precision).mlir_module())
        for precision in ("highest", None)
    ]
    assert products[0] and all("precision = [HIGHEST, HIGHEST]" in line for line in products[0])
    assert any("HIGHEST" not in line for line in products[1])
