"""Bert: texts as WordPiece ids, through post-norm blocks, to one vector per sentence and to logits."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.checks import at_least
from efficient_tx.models.classifier import TokenEncoder, check_pool, pool_tokens


class Bert(TokenEncoder):
    """BERT's encoder (Devlin et al. 2018, arXiv 1810.04805), with any mixer and any linear layer.

    Embeddings of tokens, positions and segments are added and normalised, and norms follow the residual sums. A linear
    layer of the pooled tokens gives the logits: without BERT's own layer for pooling, as in Sentence-BERT (Reimers and
    Gurevych 2019, arXiv 1908.10084). The default sizes are those of all-MiniLM-L6 (Wang et al. 2020, arXiv 2002.10957).

    Args:
      num_classes: labels are in [0, num_classes); 0 is a model without a head, which has no logits.
      mixers: see `TokenEncoder`; BERT has softmax attention.
      features: width of the tokens.
      layers: number of blocks.
      heads: number of heads of each mixer.
      mlp_features: width inside the MLPs.
      pool: pooling of a sequence to one vector: "mean" over the real tokens, "cls" (the first of them, [CLS]) or "last"
        (the last of them).
      norm_epsilon: number added to the variance in the norms.
      mlp: kind of MLP: "gelu", "gelu_erf" or "swiglu".
      segments: number of segments, see `TokenEmbedding`.
      post_norm: see `TokenEncoder`.
      **encoder: see `TokenEncoder`.

    Raises:
      ValueError: a name or a size that does not fit.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        mixers: Sequence[Callable[..., nnx.Module]],
        features: int = 384,
        layers: int = 6,
        heads: int = 12,
        mlp_features: int = 1536,
        pool: str = "mean",
        norm_epsilon: float = 1e-12,
        mlp: str = "gelu_erf",
        segments: int = 2,
        post_norm: bool = True,
        rngs: nnx.Rngs,
        **encoder: Any,
    ):
        at_least(0, num_classes=num_classes)
        check_pool(pool, encoder.get("causal", False))
        super().__init__(
            mixers=mixers,
            features=features,
            layers=layers,
            heads=heads,
            mlp_features=mlp_features,
            epsilon=norm_epsilon,
            mlp=mlp,
            segments=segments,
            post_norm=post_norm,
            rngs=rngs,
            **encoder,
        )
        self.pool = pool
        start = nnx.initializers.normal(0.02)
        self.head = nnx.Linear(features, num_classes, kernel_init=start, rngs=rngs) if num_classes else None

    def embed(
        self, inputs: jax.Array, *, mask: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """Sentence embeddings at evaluation, unit vectors, float32 `[batch, features]`; zero without a real token.

        Args:
          inputs: token ids, int `[batch, length]`.
          mask: bool `[batch, length]`, True for real tokens; None means all are.
          segments: int `[batch, length]`, see `TokenEmbedding`; None means the first one.

        Raises:
          ValueError: see `TokenEmbedding`.
        """
        pooled = pool_tokens(*self.encode(inputs, mask, None, segments=segments), self.pool)
        return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits, float32 `[batch, num_classes]`; arguments as in `Classifier` and `embed`.

        Raises:
          ValueError: the model has no head; see `TokenEmbedding`.
        """
        if self.head is None:
            raise ValueError("a model with num_classes=0 has no logits: use embed or encode")
        return self.head(pool_tokens(*self.encode(inputs, mask, key, positions, segments), self.pool))
