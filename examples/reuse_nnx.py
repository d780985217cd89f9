"""Modules in a Flax NNX model of your own: a mixer, structured weights, and the projection of a trained layer.

Command:   python examples/reuse_nnx.py
Needs:     jax, flax, optax, numpy: what `pip install .` brings
Duration:  seconds on a CPU
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from efficient_tx.attention import Skyformer
from efficient_tx.linear import Monarch, replace, structured_learning_rates

FEATURES, CLASSES = 32, 3


class Model(nnx.Module):
    """A model of your own: one block around a mixer of the package, and a linear layer for the classes."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.mixer = Skyformer(FEATURES, heads=2, linear=Monarch, landmarks=16, rngs=rngs)
        self.mlp = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.head = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x, *, mask, key=None):
        x = x + self.mixer(self.norm(x), mask=mask, key=key)
        x = x + nnx.gelu(self.mlp(x))
        return self.head(jnp.where(mask[..., None], x, 0).sum(1) / mask.sum(1)[:, None])


def main():
    model = Model(rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (8, 48, FEATURES))
    mask = jnp.arange(48) < 40
    mask = jnp.broadcast_to(mask, (8, 48))  # True for real tokens
    label = jnp.arange(8) % CLASSES

    # Linear layers become the nearest ones of another structure, in place.
    for projection in replace(model, lambda path, layer: "mlp" in path, Monarch, blocks=4):
        print("replaced:", projection)

    # Structured factors learn at rates of their own.
    optimizer = nnx.Optimizer(model, optax.chain(optax.adamw(1e-2), structured_learning_rates(model)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, key):
        def loss_of(model):
            logits = model(x, mask=mask, key=key)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    for number in range(10):
        loss = step(model, optimizer, jax.random.split(jax.random.key(number), 8))  # one key per example
        if number in (0, 9):
            print(f"step {number + 1}: loss {loss:.3f}")

    # Evaluation: no key, nothing is drawn anew.
    print("logits:", model(x, mask=mask).shape)

    # One layer: the nearest Monarch matrix to a dense one, and back.
    small = Monarch.from_dense(model.head.kernel[...], blocks=2)
    error = jnp.linalg.norm(small.to_dense() - model.head.kernel[...]) / jnp.linalg.norm(model.head.kernel[...])
    print(f"projected head: {small.parameters} parameters, relative error {error:.2f}")


if __name__ == "__main__":
    main()
