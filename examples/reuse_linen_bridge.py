"""An NNX module of this package inside a Linen model, by flax's bridge: its parameters are in the Linen tree.

Command:   python examples/reuse_linen_bridge.py
Needs:     jax, flax, optax, numpy: what `pip install .` brings
Duration:  seconds on a CPU
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen
from flax.nnx import bridge
from flax.training.train_state import TrainState

from efficient_tx.attention import Skyformer
from efficient_tx.linear import Monarch

FEATURES, CLASSES = 32, 3


class Model(linen.Module):
    """A Linen model around a mixer, which draws other landmarks and drops out other channels in every step."""

    @linen.compact
    def __call__(self, x, *, mask, training=False):
        # The class and its arguments, not a module: Linen makes it when it initialises. metadata_fn=None: plain arrays
        # in the tree, as Linen's own layers have them.
        mixer = bridge.to_linen(
            Skyformer, FEATURES, heads=2, linear=Monarch, landmarks=16, dropout=0.1, metadata_fn=None, name="mixer"
        )
        # One key for all, which the mixer folds per example; without a key it evaluates.
        key = self.make_rng("mixer") if training else None
        x = x + mixer(linen.LayerNorm()(x), mask=mask, key=key)
        x = jnp.where(mask[..., None], x, 0).sum(1) / mask.sum(1)[:, None]
        return linen.Dense(CLASSES)(x)


def main():
    x = jax.random.normal(jax.random.key(0), (8, 48, FEATURES))
    mask = jnp.arange(48) < jnp.arange(41, 49)[:, None]  # True for real tokens
    label = jnp.arange(8) % CLASSES

    model = Model()
    parameters = model.init(jax.random.key(1), x, mask=mask)["params"]
    print("in the tree:", {name: layer["w1"].shape for name, layer in parameters["mixer"].items()})
    state = TrainState.create(apply_fn=model.apply, params=parameters, tx=optax.adamw(1e-2))

    @jax.jit
    def step(state, key):
        def loss_of(parameters):
            given = {"params": parameters}
            logits = state.apply_fn(given, x, mask=mask, training=True, rngs={"mixer": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=gradients), loss

    for number in range(20):
        state, loss = step(state, jax.random.key(number))
        if number in (0, 9, 19):
            print(f"step {number + 1}: loss {loss:.3f}")

    moved = jax.tree.map(lambda new, old: bool((new != old).any()), state.params, parameters)
    print("all parameters moved:", all(jax.tree.leaves(moved)))

    def apply(x, **options):
        return model.apply({"params": state.params}, x, mask=mask, **options)

    drawn = [apply(x, training=True, rngs={"mixer": jax.random.key(number)}) for number in range(2)]
    print("two keys draw the same:", bool((drawn[0] == drawn[1]).all()))
    other = jnp.where(mask[..., None], x, 1e3)
    print("same output with other padding:", bool(jnp.allclose(apply(x), apply(other), atol=1e-5)))


if __name__ == "__main__":
    main()
