"""Functions without any module system: Skyformer's attention and a Monarch product are functions of arrays.

Command:   python examples/reuse_plain_jax.py
Needs:     jax, flax, optax, numpy: what `pip install .` brings
Duration:  seconds on a CPU
"""

import jax
import jax.numpy as jnp

from efficient_tx.attention import gla_step, skyformer, softmax
from efficient_tx.kernels import monarch

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 96, 2, 16


def attention_layer(parameters, x, mask, key=None):
    """Multi-head Skyformer attention, `[batch, length, features]` -> the same, all of it plain JAX."""
    q, k, v = (jnp.einsum("blf,fhd->blhd", x, parameters[name]) for name in ("q", "k", "v"))
    heads = skyformer(q, k, v, mask=mask, key=key, landmarks=16)
    # The output projection is a Monarch matrix: two factors of 4 blocks in place of a matrix of 32 × 32.
    return monarch(heads.reshape(*x.shape[:2], -1), parameters["w1"], parameters["w2"])


def main():
    features = HEADS * HEAD_DIM
    keys = jax.random.split(jax.random.key(0), 6)
    parameters = {
        name: jax.random.normal(key, (features, HEADS, HEAD_DIM)) / features**0.5
        for name, key in zip(("q", "k", "v"), keys)
    }
    parameters["w1"] = jax.random.normal(keys[3], (4, 8, 8)) / 8**0.5  # [k, q, p]: 4 blocks of 8 × 8
    parameters["w2"] = jax.random.normal(keys[4], (4, 8, 8)) / 8**0.5  # [l, s, r]
    x = jax.random.normal(keys[5], (BATCH, LENGTH, features))
    mask = jnp.arange(LENGTH) < jnp.array([[LENGTH], [60]])  # True for real tokens: the second text has 60

    y = jax.jit(attention_layer)(parameters, x, mask)
    print("forward:", y.shape)

    # What stands in the padding does not matter.
    other = jax.jit(attention_layer)(parameters, jnp.where(mask[..., None], x, 1e3), mask)
    print("same output with other padding:", bool(jnp.allclose(y[1, :60], other[1, :60], atol=1e-5)))

    # In training the key is an argument: one key per example.
    draws = jax.random.split(jax.random.key(1), BATCH)
    loss, gradients = jax.value_and_grad(lambda p: (attention_layer(p, x, mask, draws) ** 2).mean())(parameters)
    finite = all(bool(jnp.isfinite(gradient).all()) for gradient in jax.tree.leaves(gradients))
    print(f"loss {loss:.3f}, gradients finite: {finite}")

    # Exact attention has the same signature.
    q = jax.random.normal(keys[0], (BATCH, LENGTH, HEADS, HEAD_DIM))
    print("exact softmax:", softmax(q, q, q, mask=mask).shape)

    # Decoding with a fixed state: a token in, a token out.
    state = jnp.zeros((BATCH, HEADS, HEAD_DIM, HEAD_DIM))
    for token in range(3):
        out, state = gla_step(q[:, token], q[:, token], q[:, token], state)
    print("decoded a token:", out.shape, "from a state of", state.shape)


if __name__ == "__main__":
    main()
