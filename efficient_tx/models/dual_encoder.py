"""DualEncoder: two token sequences, read by one encoder, to logits of one label of the pair."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.checks import OptionError
from efficient_tx.models.classifier import TokenEncoder, check_pool, pool_tokens
from efficient_tx.numerics.random import example_keys, fold
from efficient_tx.tokens.mask import joined

PAIR_HEADS = ("interaction", "concatenation")


class DualEncoder(TokenEncoder):
    """A transformer that encodes both sequences with the same parameters and compares their pooled vectors x₁ and x₂.

    Args:
      num_classes: labels are in [0, num_classes).
      pool: pooling of a sequence to one vector: "mean", "cls" or "last", see `Classifier`.
      pair_head: classifier of the pair, "interaction" or "concatenation". "interaction": an MLP of [x₁, x₂, x₁ ⊙ x₂,
        x₁ − x₂] with one hidden layer, as in the paper of Long Range Arena (Tay et al. 2020, arXiv 2011.04006).
        "concatenation": an MLP of [x₁, x₂] with two hidden layers, as in the arena's code.
      **encoder: see `TokenEncoder`.

    Raises:
      ValueError: a name or a size that does not fit.
    """

    def __init__(self, *, num_classes: int, pool: str = "mean", pair_head: str = "interaction", **encoder: Any):
        if pair_head not in PAIR_HEADS:
            raise OptionError("pair_head", pair_head, f"choose one of {', '.join(PAIR_HEADS)}")
        check_pool(pool, encoder.get("causal", False))
        super().__init__(prefix=1 if pool == "cls" else 0, **encoder)
        self.pool, self.pair_head = pool, pair_head
        features, hidden = self.encoder.features, self.encoder.mlp_features
        widths = [4 * features, hidden] if pair_head == "interaction" else [2 * features, hidden, -(-hidden // 2)]
        layers = []
        for inner, outer in itertools.pairwise(widths):
            layers += [nnx.Linear(inner, outer, rngs=encoder["rngs"]), nnx.relu]
        self.head = nnx.Sequential(*layers, nnx.Linear(widths[-1], num_classes, rngs=encoder["rngs"]))

    def __call__(
        self,
        inputs: jax.Array,
        inputs2: jax.Array,
        *,
        mask: jax.Array | None = None,
        mask2: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits, float32 `[batch, num_classes]`.

        Args:
          inputs, inputs2: token ids, both int `[batch, length]`.
          mask, mask2: bool `[batch, length]`, True for real tokens; None means that all of its input are.
          key: None at evaluation; in training one key per example `[batch]`, or a single key, folded per example.

        Raises:
          ValueError: the two inputs have different shapes.
        """
        if inputs.shape != inputs2.shape:
            raise ValueError(f"a pair has inputs of shape {inputs.shape} and {inputs2.shape}: pad both to one length")
        # One batch with twice the rows. Two separate passes could run in parallel, and jaxlib 0.10.2's batched Cholesky
        # on CPU hangs if more of them run at once than there are threads.
        keys = example_keys(key, inputs.shape[0])
        keys = None if keys is None else jnp.concatenate([fold(keys, 0), fold(keys, 1)])
        both = jnp.concatenate([inputs, inputs2])
        real = joined(mask, mask2, inputs.shape)
        x1, x2 = jnp.split(pool_tokens(*self.encode(both, real, keys), self.pool), 2)
        parts = [x1, x2, x1 * x2, x1 - x2] if self.pair_head == "interaction" else [x1, x2]
        return self.head(jnp.concatenate(parts, axis=-1))
