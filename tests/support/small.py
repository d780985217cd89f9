"""A small transformer with the weights of a trained one, batches for it, and what reaches its layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.attention import Softmax
from efficient_tx.compression import compress
from efficient_tx.compression.model import linear_layers
from efficient_tx.config.methods import named_method
from efficient_tx.linear import Dense
from efficient_tx.linear.replacement import find
from efficient_tx.models import Classifier
from tests.support.models import run

LENGTH = 12
SIZES = {"features": 16, "layers": 2, "heads": 4, "mlp_features": 48, "max_len": LENGTH}


def model(mixer=Softmax, mlp="gelu", linear=Dense, seed=0, **sizes):
    """A model whose biases and neurons are not those of a fresh one: spread out, as after training."""
    made = Classifier(
        num_classes=3, vocab_size=16, mixers=[functools.partial(mixer, linear=linear)], mlp=mlp, linear=linear,
        rngs=nnx.Rngs(seed), **(SIZES | sizes),
    )  # fmt: skip
    draws = np.random.default_rng(seed)
    for layer in linear_layers(made):
        if layer.module.bias is not None:
            layer.module.bias[...] = jnp.asarray(draws.normal(size=layer.module.out_features), layer.module.param_dtype)
    return made


@functools.cache
def batches(count=6):
    draws = np.random.default_rng(1)
    return tuple(
        {
            "inputs": draws.integers(0, 16, (8, LENGTH)),
            "mask": np.arange(LENGTH) < draws.integers(4, LENGTH + 1, (8, 1)),
            "label": np.zeros(8, int),
            "weight": np.ones(8, np.float32),
        }
        for _ in range(count)
    )


def loss(made, batch):
    """Cross-entropy, the mean over the examples."""
    logits = made(batch["inputs"], mask=batch["mask"], key=None)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1))


def output(made):
    return run(made, batches()[0]["inputs"], mask=batches()[0]["mask"])


def compressed(name, budget=0.5, made=None, **options):
    made = made or model()
    return made, compress(made, named_method(name), budget, batches=batches(), loss=loss, **options)


def layer_inputs(made, batch, path):
    """What reaches a layer, `[tokens, in]` of the real tokens, by a layer in its place that keeps it."""
    seen = []

    class Spy:
        def __call__(self, x):
            seen.append(np.asarray(x))
            return layer(x)

    layer = find(made, path)
    owner = find(made, path[:-1])
    for name, parts in ((path[-1], owner),):
        object.__setattr__(parts, name, Spy())
        try:
            hidden = made.embedding(batch["inputs"], mask=batch["mask"])
            for block in made.encoder.blocks:
                hidden = block(hidden, mask=jnp.asarray(batch["mask"]))
        finally:
            object.__setattr__(parts, name, layer)
    return seen[0].reshape(-1, layer.in_features)[batch["mask"].ravel()]
