"""A mixer inside Flax Linen's own attention module, and inside NNX's: `as_attention_fn` has the signature they call.

Command:   python examples/reuse_linen.py
Needs:     jax, flax, optax, numpy: what `pip install .` brings
Duration:  seconds on a CPU
"""

import jax
import jax.numpy as jnp
from flax import linen, nnx

from efficient_tx.attention import as_attention_fn


def main():
    x = jax.random.normal(jax.random.key(0), (2, 64, 32))
    real = jnp.arange(64) < jnp.array([[64], [40]])
    mask = real[:, None, None, :]  # the key mask, [batch, 1, 1, length]

    layer = linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=as_attention_fn("skyformer", landmarks=16))
    parameters = layer.init(jax.random.key(1), x, mask=mask)
    print("linen:", layer.apply(parameters, x, mask=mask).shape)

    module = nnx.MultiHeadAttention(
        4, 32, attention_fn=as_attention_fn("performer", random_features=32), decode=False, rngs=nnx.Rngs(0)
    )
    print("nnx:", module(x, mask=mask).shape)

    # What a mixer cannot do is an error of one line, never another result.
    causal = jnp.tril(jnp.ones((64, 64), bool))[None, None]
    try:
        layer.apply(parameters, x, mask=causal)
    except ValueError as error:
        print("refused:", error)


if __name__ == "__main__":
    main()
