"""Pyramid: the published sizes, and plain numpy for a small one."""

import itertools
import json
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION, Soft, Softmax
from efficient_tx.config import build, check, evaluation, make_config, schema, stored
from efficient_tx.data.batching import train_batches
from efficient_tx.models import Block, Pyramid
from efficient_tx.numerics.random import dropout
from efficient_tx.task import Task
from efficient_tx.training.step import clear_window, init_state, make_train_step, split_batch
from tests.support.models import run

TOY = {"features": (4, 8, 12), "depths": (1, 2, 1), "heads": (1, 2, 3)}


class Mean(nnx.Module):
    """A mixer without products: every token and the mean of all, dropped out."""

    def __init__(self, features, dropout=0.0, **_):
        self.dropout = dropout

    def __call__(self, x, *, mask=None, key=None):
        return dropout(x + x.mean(axis=1, keepdims=True), self.dropout, key)


def toy(mixers=(Mean,), image_shape=(11, 11, 2), **options):
    return Pyramid(num_classes=5, image_shape=image_shape, mixers=list(mixers), rngs=nnx.Rngs(0), **TOY | options)


def images(batch=3, shape=(11, 11, 2), seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *shape)).astype(np.float32)


def norm(x, layer):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])


def linear(x, layer):
    return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


def convolve(image, layer, stride):
    """3 × 3 with a zero beyond the edges, of one image."""
    kernel, (height, width, _) = np.asarray(layer.kernel[...], np.float64), image.shape
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    rows = [
        [np.einsum("ijc,ijcf->f", padded[i : i + 3, j : j + 3], kernel) for j in range(0, width, stride)]
        for i in range(0, height, stride)
    ]
    return np.array(rows) + np.asarray(layer.bias[...])


def mean(x):
    return x + x.mean(axis=-2, keepdims=True)


def mlp(x, layer):
    hidden = linear(x, layer.up)
    return linear(0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))), layer.down)


@pytest.mark.slow
def test_logits_are_the_formula():
    """Of 11 × 11 pixels, which no stride divides: grids of 3, 2 and 1; three stages, the last with a class token."""
    model, inputs = toy(), images()
    strides = [(2, 1, 2), (2,), (2,)]
    logits = []
    for x in inputs.astype(np.float64):
        for s, stage in enumerate(model.stages):
            for convolution, stride in zip(stage.convolutions, strides[s], strict=True):
                x = np.maximum(norm(convolve(x, convolution.conv, stride), convolution.norm), 0)
            side = len(x)
            x = x.reshape(side * side, -1)
            if s == 2:
                x = np.concatenate([np.asarray(stage.cls[...]), x])
            x = x + np.asarray(stage.positions[...])
            for block in stage.blocks:
                if s == 2:
                    x = x + mean(norm(x, block.mixer_norm))
                    x = x + mlp(norm(x, block.mlp_norm), block.mlp)
                else:
                    x = norm(x + mean(x), block.mixer_norm)
                    x = norm(x + mlp(x, block.mlp), block.mlp_norm)
            if s < 2:
                x = x.reshape(side, side, -1)
        logits.append(linear(norm(x[0], model.norm), model.head))
    assert [stage.side for stage in model.stages] == [3, 2, 1]
    np.testing.assert_allclose(run(model, inputs), logits, atol=1e-4)  # float32


@pytest.mark.slow
def test_mixers_go_by_stage():
    seen = []

    def named(name):
        def make(features, **sizes):
            seen.append((name, features, sizes["heads"], sizes["max_len"]))
            return Mean(features)

        return make

    toy([named("a"), named("b")], image_shape=(32, 32, 1))
    assert seen == [("a", 4, 1, 64), ("b", 8, 2, 16), ("b", 8, 2, 16), ("a", 12, 3, 5)]


@pytest.mark.parametrize("name", ["softmax", "soft", "linformer", "fourier", "pool"])
@pytest.mark.slow
def test_mixers_of_the_table_fit(name):
    model = nnx.eval_shape(lambda: toy([ATTENTION[name], ATTENTION[name], Softmax]))
    out = nnx.eval_shape(lambda model: model(jnp.zeros((2, 11, 11, 2)), key=jax.random.key(0)), model)
    assert (out.shape, out.dtype) == ((2, 5), jnp.float32)


@pytest.mark.slow
def test_draws_belong_to_the_example():
    model = toy(dropout=0.2, drop_path=0.5)
    inputs, keys = images(), jax.random.split(jax.random.key(0), 3)
    once = run(model, inputs, key=keys)
    np.testing.assert_allclose(run(model, inputs[::-1], key=keys[::-1])[::-1], once, rtol=1e-5, atol=1e-5)
    assert np.abs(once - run(model, inputs)).max() > 1e-3


@pytest.mark.slow
def test_post_norm_blocks_drop_their_branches_by_example():
    """Without a branch the norms remain: two examples that go the same way differ by their own tokens only."""
    block = Block(8, mixer=Mean, mlp_features=16, drop_path=0.5, post_norm=True, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(64, 5, 8)).astype(np.float32)
    out = np.asarray(block(x, key=jax.random.split(jax.random.key(0), 64)))
    ways = []
    for mixed, kept in itertools.product((0, 2), (0, 2)):
        middle = norm(x + mixed * mean(x), block.mixer_norm)
        ways.append(norm(middle + kept * mlp(middle, block.mlp), block.mlp_norm))
    fits = np.array([np.abs(out - way).max(axis=(1, 2)) < 1e-4 for way in ways])  # float32; else about 1
    assert (fits.sum(0) == 1).all() and fits.any(axis=1).all()


@pytest.mark.slow
def test_the_rate_of_drop_path_rises_over_all_stages_and_the_last_has_pre_norm():
    blocks = [block for stage in toy(drop_path=0.3).stages for block in stage.blocks]
    np.testing.assert_allclose([block.drop_path for block in blocks], [0, 0.1, 0.2, 0.3])
    assert [block.post_norm for block in blocks] == [True, True, True, False]


@pytest.mark.slow
def test_remat_and_bfloat16_compute_the_same():
    inputs, key = images(), jax.random.key(3)
    remat, plain = (run(toy(remat=remat, dropout=0.1), inputs, key=key) for remat in (True, False))
    np.testing.assert_array_equal(remat, plain)
    half = toy(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype(jnp.float32)}
    logits = run(half, inputs)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, run(toy(), inputs), atol=0.2)  # logits of 2; 8 bits of mantissa


@pytest.mark.quick
def test_it_holds_parameters_and_nothing_else():
    variables = [node for _, node in nnx.iter_graph(nnx.eval_shape(toy)) if isinstance(node, nnx.Variable)]
    assert variables and all(type(variable) is nnx.Param for variable in variables)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "gigantic"}, "size is 'gigantic': choose one of tiny, small, medium, large, huge"),
        ({"image_shape": (32, 64, 3)}, r"image_shape is \(32, 64, 3\): Pyramid reads square images"),
        ({"depths": (1, 2)}, r"features \(4, 8, 12\), depths \(1, 2\)"),
        ({"features": (), "depths": (), "heads": ()}, "one at least"),
        ({"depths": (1, 0, 1)}, r"depths\[1\] is 0"),
        ({"depths": (1, "a", 1)}, r"depths\[1\] is 'a'"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0"),
        ({"heads": (1, 3, 3), "mixers": [Softmax]}, "8 features do not divide into 3 heads"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"mixers": [partial(Soft, value_conv=-1)]}, "value_conv is -1.*bottleneck='convolution'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        toy(**options)


@pytest.mark.quick
def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"shape \(12, 12, 2\).* \(11, 11, 2\)"):
        toy()(np.zeros((1, 12, 12, 2), np.float32))


def bars(seed):
    """64 pictures of 28 × 28 of one bar, upright (label 1) or not."""
    generator = np.random.default_rng(seed)
    pictures = []
    for label in generator.integers(0, 2, 64):
        image = generator.normal(0, 0.1, (28, 28, 1)).astype(np.float32)
        place = generator.integers(2, 24)
        image[:, place : place + 3] += 1
        pictures.append({"inputs": image if label else image.swapaxes(0, 1), "label": int(label)})
    return pictures


@pytest.fixture
def pictures(monkeypatch):
    """A task module of its own, as build.py finds them."""

    def sizes(**_):
        return {"num_classes": 2, "vocab_size": None, "max_len": 784, "image_shape": (28, 28, 1)}

    def get_task(*, data_dir: str | None = None):
        return Task(bars(0), bars(1), bars(2), kind="image", name="bars", source="drawn", **sizes())

    module = types.ModuleType("bars")
    module.KIND, module.sizes, module.get_task = "image", sizes, get_task
    monkeypatch.setitem(sys.modules, "bars", module)


def config(mixers="soft*2,softmax", **model):
    small = {"name": "pyramid", **TOY, **model}
    made = make_config(
        "bars", mixers, batch_size=16, steps=20, model=small, optimizer={"learning_rate": 3e-3, "warmup": 2}
    )
    if "soft" in made.attention:
        made.attention.soft.update({"grid": True, "bottleneck": "convolution", "landmarks": 4, "value_conv": -1})
    return made


@pytest.mark.slow
def test_it_learns_a_batch_by_heart(pictures):
    """From a config, on images of the size of Fashion-MNIST's, with SOFT on 7 × 7 and 4 × 4 tokens."""
    settings = config(features=(8, 16, 16), heads=(1, 2, 2), depths=(1, 1, 1))
    check.check(settings)
    task = build.build_task(settings)
    model = build.build_model(settings, task)
    assert [getattr(stage.blocks[0].mixer, "bottleneck", None) is not None for stage in model.stages] == [1, 1, 0]
    (stage,), _ = build.build_stages(settings, model)
    device = jax.local_devices()[:1]
    step = make_train_step(nnx.split(model)[0], stage.optimizer, seed=0, grad_accum=1, devices=device)
    state, losses = init_state(model, stage.optimizer), []
    batch = train_batches(task, batch_size=16, seed=0)[0]
    for _ in range(20):
        state = step(clear_window(state), split_batch(batch, device))
        total, count = state.window["loss"]
        losses.append(float(total) / float(count))
    assert losses[0] > 0.5  # of two classes: ln 2 is chance
    assert losses[-1] < 0.1


# Another value for each option of the model.
OTHER = {
    "size": "medium",
    "features": (4, 8, 24),
    "depths": (1, 1, 1),
    "heads": (2, 2, 3),
    "mlp_ratio": 3,
    "mlp": "gelu_erf",
    "dropout": 0.1,
    "drop_path": 0.1,
}


def fingerprint(**model):
    """The training-mode program of a model built from a config, with the shapes of its parameters."""
    settings = config("softmax", **model)
    task = build.build_task(settings)
    model = nnx.eval_shape(lambda: build.build_model(settings, task))
    graphdef, params = nnx.split(model)
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    return str(jax.make_jaxpr(lambda p, x: nnx.merge(graphdef, p)(x, key=jax.random.key(0)))(params, image))


@pytest.mark.slow
def test_no_option_is_dead(pictures):
    assert set(OTHER) == set(schema.options(Pyramid, schema.GIVEN["model"]))
    base = fingerprint()
    for name, value in OTHER.items():
        # `size` is what counts where the tuples are not given.
        model = {"features": None} if name == "size" else {}
        plain = fingerprint(depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), **model) if model else base
        other = {"depths": (1, 1, 1, 1), "heads": (1, 1, 1, 1), **model} if model else {}
        assert fingerprint(**other, **{name: value}) != plain, name


@pytest.mark.quick
def test_sizes_are_set_from_the_command_line(pictures):
    """As eval.py's --set reads them; and config.json has them as lists."""
    changed = evaluation.apply_settings(config().to_dict(), {"model.depths": "1,3,1"})
    assert changed.model.depths == (1, 3, 1)
    assert stored.restore(json.loads(config().to_json())).to_json() == config().to_json()
