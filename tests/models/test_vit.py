"""ViT against plain numpy, and the branches of the shared block that it brought along: drop path and layer scale."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION, Softmax
from efficient_tx.models import Block, Encoder, Mlp, ViT
from efficient_tx.models.transformer import drop_path
from efficient_tx.models.vit import patches, sincos
from tests.support.models import run

TINY = {"num_classes": 3, "image_shape": (8, 8, 2), "patch_size": 2, "features": 8, "layers": 2, "heads": 2}


def vit(mixers=(Softmax,), image_shape=TINY["image_shape"], **options):
    """A tiny ViT whose head is not zero, as it is at the start."""
    settings = TINY | {"mlp_features": 16, "image_shape": image_shape} | options
    model = ViT(mixers=list(mixers), rngs=nnx.Rngs(0), **settings)
    kernel = np.random.default_rng(1).normal(size=model.head.kernel.shape)
    model.head.kernel[...] = jnp.asarray(kernel, jnp.float32)
    return model


def images(batch=3, shape=TINY["image_shape"], seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *shape)).astype(np.float32)


def cut(image, size):
    """The patches of one image, one pixel after the other."""
    height, width, channels = image.shape
    return np.array(
        [
            [image[top + i, left + j, c] for i in range(size) for j in range(size) for c in range(channels)]
            for top in range(0, height, size)
            for left in range(0, width, size)
        ]
    )


class Nothing(nnx.Module):
    def __call__(self, x, *, mask=None, key=None):
        return x


@pytest.mark.parametrize("representation", [None, 5])
@pytest.mark.parametrize("positions", ["learned", "sincos", "none"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_what_is_around_the_encoder_is_its_formula(pool, positions, representation):
    model = vit(pool=pool, positions=positions, representation=representation)
    model.encoder = Nothing()
    if pool == "cls":
        model.cls[...] = jnp.arange(8.0)[None]
    inputs = images()
    x = np.stack([cut(image, 2) for image in inputs]) @ np.asarray(model.embedding.kernel[...])
    x = x + np.asarray(model.embedding.bias[...])
    if positions == "sincos":
        x = x + sincos(4, 4, 8)
    if pool == "cls":
        x = np.concatenate([np.broadcast_to(np.arange(8.0), (3, 1, 8)), x], axis=1)
    if positions == "learned":
        assert model.learned.shape == x.shape[1:]
        x = x + np.asarray(model.learned[...])
    x = x[:, 0] if pool == "cls" else x.mean(1)
    if representation:
        x = np.tanh(x @ np.asarray(model.representation.kernel[...]))
    expected = x @ np.asarray(model.head.kernel[...])
    np.testing.assert_allclose(run(model, inputs), expected, rtol=1e-4, atol=1e-5)  # float32


def test_patches_are_a_convolution():
    """As a published kernel `[size, size, channels, features]` sees them: here of 3 rows and 2 columns of patches."""
    inputs, kernel = images(shape=(12, 8, 2)), images(1, (4, 4, 2, 5), seed=1)[0]
    convolved = jax.lax.conv_general_dilated(
        inputs, kernel, window_strides=(4, 4), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    cuts = patches(jnp.asarray(inputs), 4)
    np.testing.assert_array_equal(cuts, [cut(image, 4) for image in inputs])
    projected = cuts @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(projected, convolved.reshape(3, 6, 5), rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.quick
def test_sincos_by_its_formula():
    table = sincos(2, 3, 12)
    for row in range(2):
        for column in range(3):
            for c in range(3):
                frequency = 10000 ** (-c / 2)
                expected = [f(p * frequency) for p in (column, row) for f in (np.sin, np.cos)]
                np.testing.assert_allclose(table[3 * row + column, c::3], expected, atol=1e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.slow
def test_without_positions_the_order_of_patches_does_not_matter(pool):
    inputs, order = images(), np.random.default_rng(1).permutation(16)
    shuffled = inputs.reshape(3, 4, 2, 4, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(3, 16, 2, 2, 2)[:, order]
    shuffled = shuffled.reshape(3, 4, 4, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(inputs.shape)
    for positions in ("none", "sincos"):
        model = vit(pool=pool, positions=positions)
        distance = np.abs(run(model, inputs) - run(model, shuffled)).max()
        assert (distance < 1e-4) == (positions == "none")  # float32; else about 1


def test_rotary_positions_reach_the_mixers():
    """An image upside down and mirrored has the same patch pairs in opposite directions."""
    model = vit(pool="mean", positions="rope2d", head_dim=4)
    assert all(block.mixer.positions == "rope2d" for block in model.encoder.blocks)
    inputs = images()
    assert np.abs(run(model, inputs) - run(model, inputs[:, ::-1, ::-1])).max() > 1e-4


@pytest.mark.parametrize("pool", ["cls", pytest.param("mean", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.first(6)
def test_every_mixer_fits(name, pool):
    """With a class token in front of 16 patches, and of the patches alone."""
    model = nnx.eval_shape(lambda: vit([partial(ATTENTION[name])], pool=pool, layers=1))
    out = nnx.eval_shape(lambda model: model(jnp.zeros((2, 8, 8, 2)), key=jax.random.key(0)), model)
    assert (out.shape, out.dtype) == ((2, 3), jnp.float32)


@pytest.mark.parametrize(
    ("features", "heads", "pool", "millions"),
    [(192, 3, "cls", 5.72), (384, 6, "cls", 22.05), (768, 12, "cls", 86.57)],
)
@pytest.mark.slow
def test_parameters_are_as_many_as_published(features, heads, pool, millions):
    """DeiT's tiny, small and base for 224 pixels in patches of 16, as timm counts them."""
    sizes = {"features": features, "heads": heads, "mlp_features": 4 * features, "pool": pool}
    model = nnx.eval_shape(
        lambda: ViT(num_classes=1000, image_shape=(224, 224, 3), mixers=[Softmax], rngs=nnx.Rngs(0), **sizes)
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert round(count / 1e6, 2) == millions


def test_the_head_starts_at_zero():
    model = ViT(mixers=[Softmax], rngs=nnx.Rngs(0), mlp_features=16, **TINY)
    np.testing.assert_array_equal(run(model, images()), 0)


@pytest.mark.slow
def test_draws_belong_to_the_example():
    model = vit(dropout=0.2, drop_path=0.5)
    inputs, keys = images(), jax.random.split(jax.random.key(0), 3)
    once = run(model, inputs, key=keys)
    np.testing.assert_allclose(run(model, inputs[::-1], key=keys[::-1])[::-1], once, rtol=1e-5, atol=1e-5)
    assert np.abs(once - run(model, inputs)).max() > 1e-3


@pytest.mark.slow
def test_bfloat16_computes_near_float32():
    inputs, half = images(), vit(dtype=jnp.bfloat16, layer_scale=0.5)
    logits = run(half, inputs)
    assert logits.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(logits, run(vit(layer_scale=0.5), inputs), atol=0.2)  # logits of 3; 8 bits of mantissa


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "last"}, "pool is 'last': choose one of cls, mean"),
        ({"positions": "rope"}, "positions is 'rope'"),
        ({"patch_size": 3}, "patch_size is 3: .* 8 × 8"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"positions": "rope2d"}, "4 × 4 patches and pool='cls'"),
        ({"positions": "rope2d", "pool": "mean", "image_shape": (4, 16, 2)}, "2 × 8 patches"),
        ({"positions": "sincos", "features": 6}, "features is 6"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"mlp": "relu"}, "choose one of gelu, gelu_erf, swiglu"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        vit(**options)


@pytest.mark.quick
def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"shape \(8, 8, 3\).* \(8, 8, 2\)"):
        vit()(np.zeros((1, 8, 8, 3), np.float32))


@pytest.mark.slow
def test_drop_path_leaves_out_whole_examples_and_keeps_the_mean():
    keys = jax.random.split(jax.random.key(0), 20_000)
    x = jnp.ones((20_000, 2, 3))
    out = np.asarray(drop_path(x, 0.25, keys))
    kept = out[:, 0, 0] > 0
    np.testing.assert_array_equal(out, np.broadcast_to(kept[:, None, None] * np.float32(1 / 0.75), out.shape))
    # 20,000 draws: standard deviation sqrt(0.25 x 0.75 / 20000) = 0.003
    assert abs(kept.mean() - 0.75) < 4 * 0.0031
    np.testing.assert_array_equal(drop_path(x[:5], 0.25, keys[:5]), out[:5])
    assert drop_path(x, 0.25, None) is x and drop_path(x, 0.0, keys) is x


@pytest.mark.slow
def test_a_block_drops_its_branches_by_example_and_scales_them():
    """Every example goes one of four ways through a block, each computed from the branches themselves."""
    block = Block(8, mixer=partial(Softmax, heads=2), mlp_features=16, drop_path=0.5, layer_scale=0.1, rngs=nnx.Rngs(0))
    block.mlp_scale[...] = jnp.arange(8.0)
    x = np.random.default_rng(0).normal(size=(64, 5, 8)).astype(np.float32)

    @jax.jit
    def everything(x, keys):
        ways = {}
        for mixed, kept in itertools.product((0, 1, 2), (0, 1, 2)):
            middle = x + mixed * 0.1 * block.mixer(block.mixer_norm(x))
            ways[mixed, kept] = middle + kept * jnp.arange(8) * block.mlp(block.mlp_norm(middle))
        return block(x), block(x, key=keys), ways

    evaluated, out, ways = everything(x, jax.random.split(jax.random.key(0), 64))
    np.testing.assert_allclose(evaluated, ways[1, 1], atol=1e-4)  # float32; branches are about 1
    fits = np.array([np.abs(out - ways[way]).max(axis=(1, 2)) < 1e-4 for way in itertools.product((0, 2), (0, 2))])
    assert (fits.sum(0) == 1).all() and fits.any(axis=1).all()


@pytest.mark.quick
def test_the_rate_of_drop_path_rises_linearly():
    encoder = Encoder(8, layers=4, mixers=[partial(Softmax, heads=2)], mlp_features=16, drop_path=0.3, rngs=nnx.Rngs(0))
    np.testing.assert_allclose([block.drop_path for block in encoder.blocks], [0, 0.1, 0.2, 0.3])
    assert vit(layers=1, drop_path=0.3).encoder.blocks[0].drop_path == 0


def test_gelu_with_the_error_function():
    from scipy.special import erf

    mlp = Mlp(4, 6, kind="gelu_erf", rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    hidden = x @ np.asarray(mlp.up.kernel[...])
    expected = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))) @ np.asarray(mlp.down.kernel[...])
    np.testing.assert_allclose(mlp(x), expected, atol=1e-5)  # float32; the tanh form differs by up to 5e-4


def test_the_epsilon_of_the_norms():
    model = vit(norm_epsilon=0.5, layers=1)
    norms = [model.encoder.norm, model.encoder.blocks[0].mixer_norm, model.encoder.blocks[0].mlp_norm]
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.5)
    for norm in norms:
        np.testing.assert_allclose(norm(x), expected, atol=1e-5)  # float32


@pytest.mark.quick
@pytest.mark.parametrize("options", [{"norm_epsilon": 0.0}, {"norm_epsilon": np.inf}, {"layer_scale": np.nan}])
def test_what_makes_no_number_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*: it must be a positive number"):
        vit(**options)
