"""The public API as a user's type checker sees it: `mypy` (pyproject.toml) checks this file, nothing runs it."""

from collections.abc import Callable
from typing import Any, assert_type

import jax
import optax
from flax import nnx

from efficient_tx.attention import (
    ATTENTION,
    LevState,
    Mixer,
    MultiHead,
    Skyformer,
    as_attention_fn,
    gla_step,
    lev_init,
    lev_step,
    skyformer,
    soft,
    softmax,
)
from efficient_tx.config import make_config
from efficient_tx.export import export_function, export_weights, model_of_weights
from efficient_tx.kernels import block_attention, flash_attention, gated_linear_attention, monarch
from efficient_tx.linear import LINEAR, Form, Monarch, Sum, densify, replace, structured_learning_rates
from efficient_tx.linear.structured import Weight
from efficient_tx.models import Bert, Classifier, ViT
from efficient_tx.models.pretrained import load_pretrained, pretrained_bert
from efficient_tx.models.weights import load_weights, save_weights
from efficient_tx.task import Task, data_directory


def functions(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> None:
    assert_type(softmax(q, k, v, mask=mask, causal=True), jax.Array)
    assert_type(skyformer(q, k, v, mask=mask, key=jax.random.key(0), landmarks=64), jax.Array)
    assert_type(soft(q, v, grid=True), jax.Array)
    assert_type(as_attention_fn("skyformer", landmarks=64), Callable[..., jax.Array])


def text_encoder(ids: jax.Array, mask: jax.Array) -> None:
    bert = pretrained_bert("minilm", num_classes=2, mixers=[Skyformer])
    assert_type(bert, Bert)
    assert_type(bert.embed(ids, mask=mask), jax.Array)
    assert_type(load_pretrained(bert, "minilm"), list[str])


def kernels(q: jax.Array, k: jax.Array, v: jax.Array, blocks: jax.Array) -> None:
    assert_type(flash_attention(q, k, v, score="gaussian"), jax.Array | tuple[jax.Array, jax.Array])
    assert_type(block_attention(q, k, v, blocks=blocks, block_size=64), jax.Array | tuple[jax.Array, jax.Array])
    assert_type(gated_linear_attention(q, k, v), tuple[jax.Array, jax.Array])
    assert_type(monarch(q, k, v), jax.Array)


def decoding(q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array) -> None:
    assert_type(gla_step(q, k, v, state), tuple[jax.Array, jax.Array])
    assert_type(lev_step(q, k, v, lev_init(1, 2, 8)), tuple[jax.Array, LevState])


def modules(x: jax.Array, mask: jax.Array) -> None:
    mixer = Skyformer(64, heads=2, linear=Monarch, landmarks=128, rngs=nnx.Rngs(0))
    assert_type(mixer(x, mask=mask), jax.Array)
    assert_type(mixer.state_bytes(1024), int)
    assert_type(ATTENTION["skyformer"], type[Mixer])
    assert_type(LINEAR["monarch"], type[Weight])
    layer = Monarch(64, 64, blocks=4, rngs=nnx.Rngs(0))
    assert_type(layer(x), jax.Array)
    assert_type(layer.to_dense(), jax.Array)
    assert_type(Monarch.from_dense(x, blocks=4), Monarch)
    assert_type(layer.bytes_stored, int)
    parts = Sum(64, 64, first=Form(Monarch, blocks=4), rngs=nnx.Rngs(0))
    assert_type(parts(x), jax.Array)
    assert_type(parts.first, Weight)


def models(x: jax.Array) -> None:
    vit = ViT(num_classes=10, image_shape=(32, 32, 3), mixers=[Skyformer], rngs=nnx.Rngs(0))
    assert_type(vit(x), jax.Array)
    classifier = Classifier(num_classes=2, vocab_size=9, max_len=64, mixers=[Skyformer], rngs=nnx.Rngs(0))
    assert_type(classifier(x), jax.Array)
    replace(vit, lambda path, layer: "mlp" in path, Monarch, blocks=4)
    densify(vit)
    assert_type(structured_learning_rates(vit), optax.GradientTransformation)


class Mean(Mixer):
    """A mixer of a user's own."""

    def mix(self, x: jax.Array, *, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        return x.mean(axis=1, keepdims=True) + 0 * x


class Own(MultiHead):
    """Attention of a user's own."""

    function = staticmethod(softmax)


def own(x: jax.Array) -> None:
    assert_type(Mean(64)(x), jax.Array)
    assert_type(Own(64, heads=2, rngs=nnx.Rngs(0))(x), jax.Array)
    make_config("lra.listops", "skyformer", steps=100)


def tasks(task: Task) -> None:
    assert_type(task.max_len, int)
    data_directory()


def taken_home(model: nnx.Module) -> None:
    assert_type(export_function("run", "a.npz", vocabulary=["a"], precision=None), dict[str, Any])
    assert_type(export_weights("run", "a.safetensors", dtype="bfloat16"), int)
    _, again = model_of_weights("a.safetensors")
    assert_type(again, nnx.Module)
    save_weights(model, "b.safetensors", about={"step": 1})
    load_weights(model, "b.safetensors")
