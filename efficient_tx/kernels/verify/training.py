"""Whole training steps, as an accelerator runs them: of the Skyformer paper, of a language model and of a ViT."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficient_tx.attention import ATTENTION
from efficient_tx.models.classifier import Classifier, TokenClassifier
from efficient_tx.models.vit import ViT
from efficient_tx.task import Batch
from efficient_tx.training.step import AXIS, init_state, make_train_step, split_batch

# Chen et al. 2021, arXiv 2111.00035: 2 layers, 64 wide, 2 heads, MLP 128, dropout 0.1, batches of 32 sequences.
LENGTH, BATCH, VOCAB, CLASSES = 2048, 32, 32, 10
MIXERS = ("skyformer", "softmax")


class Recipe(NamedTuple):
    """A model, made when called, and a batch for it."""

    model: Callable[[], nnx.Module]
    batch: Batch


def listops(mixer: str, length: int = LENGTH, batch: int = BATCH) -> Recipe:
    """The paper's ListOps model with any mixer, and a batch of real tokens."""
    model = partial(
        Classifier, num_classes=CLASSES, vocab_size=VOCAB, max_len=length, mixers=[ATTENTION[mixer]], features=64,
        layers=2, heads=2, mlp_features=128, dropout=0.1,
    )  # fmt: skip
    r = np.random.default_rng(0)
    inputs, label = r.integers(1, VOCAB, (batch, length), dtype=np.int32), r.integers(0, CLASSES, batch, dtype=np.int32)
    return Recipe(seeded(model), examples(inputs, label) | {"mask": np.ones((batch, length), bool)})


def language(length: int = 2048, batch: int = 32, vocab: int = 32000) -> Recipe:
    """A causal model of four layers of GLA, 512 wide, in bfloat16, that predicts the next of every token."""
    model = partial(
        TokenClassifier, num_classes=vocab, vocab_size=vocab, max_len=length, mixers=[ATTENTION["gla"]], causal=True,
        features=512, layers=4, heads=4, mlp_features=1408, mlp="swiglu", norm="rms", positions="none", dropout=0.0,
        dtype=jnp.bfloat16,
    )  # fmt: skip
    inputs = np.zeros((batch, length), np.int32)
    return Recipe(seeded(model), examples(inputs, inputs) | {"mask": np.ones((batch, length), bool)})


def vision(batch: int = 1024) -> Recipe:
    """ViT-S/16 with softmax for 224 × 224 pixels, in bfloat16, as in configs/vit_imagenet.py."""
    model = partial(
        ViT, num_classes=1000, image_shape=(224, 224, 3), mixers=[ATTENTION["softmax"]], pool="mean",
        positions="sincos", representation=384, dtype=jnp.bfloat16,
    )  # fmt: skip
    return Recipe(seeded(model), examples(np.zeros((batch, 224, 224, 3), np.float32), np.zeros(batch, np.int32)))


RECIPES = {
    "Skyformer, ListOps": partial(listops, "skyformer"),
    "GLA, causal language model": language,
    "ViT-S/16": vision,
}


def seeded(model: Callable[..., nnx.Module]) -> Callable[[], nnx.Module]:
    return lambda: model(rngs=nnx.Rngs(0))


def examples(inputs: np.ndarray, label: np.ndarray) -> Batch:
    return {"inputs": inputs, "label": label, "weight": np.ones(label.shape, np.float32)}


def listops_step(mixer: str, devices: list[jax.Device], **sizes: int) -> tuple[Any, ...]:
    """The mapped step (state, batch) -> state, a first state, and a batch of real tokens, for these devices."""
    recipe, optimizer = listops(mixer, **sizes), optax.adamw(1e-4)
    model = recipe.model()
    step = make_train_step(nnx.split(model)[0], optimizer, seed=0, devices=devices)
    return step, init_state(model, optimizer), split_batch(recipe.batch, devices)


def lowered(recipe: Recipe, devices: list[Any]) -> tuple[jax.stages.Lowered, Any]:
    """The mapped step for described devices, without any array on them; and the state, as shapes and dtypes."""
    optimizer = optax.adamw(1e-4)
    graphdef, _ = nnx.split(nnx.eval_shape(recipe.model))
    everywhere = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        jax.eval_shape(lambda: init_state(recipe.model(), optimizer)),
    )
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), split_batch(recipe.batch, devices))
    return make_train_step(graphdef, optimizer, seed=0, devices=devices).lower(state, batch), state
