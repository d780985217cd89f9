"""Classifier: token sequences to logits of one label per sequence; TokenClassifier: of one label per token."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.checks import OptionError
from efficient_tx.models.embedding import TokenEmbedding
from efficient_tx.models.transformer import Encoder, make_norm
from efficient_tx.numerics.random import dropout, example_keys, fold
from efficient_tx.tokens.mask import bool_mask, token_ranks

POOLS = ("mean", "cls", "last")


def pool_tokens(x: jax.Array, mask: jax.Array | None, pool: str) -> jax.Array:
    """One vector per sequence, `[batch, length, features]` -> `[batch, features]`, in float32 at least.

    "mean" averages the real tokens, "cls" takes the first of them, "last" the last; zero without any.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if mask is None:
        return x.mean(axis=1) if pool == "mean" else x[:, 0 if pool == "cls" else -1]
    if pool == "mean":
        return jnp.where(mask[..., None], x, 0).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)[:, None]
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
    at = jnp.argmax(mask, axis=1) if pool == "cls" else last
    pooled = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
    return jnp.where(mask.any(axis=1)[:, None], pooled, 0)


def check_pool(pool: str, causal: bool) -> None:
    """Raises ValueError unless `pool` is in POOLS and works with `causal`."""
    if pool not in POOLS:
        raise OptionError("pool", pool, f"choose one of {', '.join(POOLS)}")
    if pool == "cls" and causal:
        raise ValueError("pool is 'cls' in a causal model, where the first token sees no other: use 'last'")


class TokenEncoder(nnx.Module):
    """Embedding, dropout and the stack of blocks: the shared part of all token models.

    Args:
      vocab_size: token ids are in [0, vocab_size).
      max_len: the largest sequence length.
      mixers: factories of token mixers, called with (features, heads=, head_dim=, causal=, positions=, max_len=,
        dropout=, dtype=, rngs=) and repeated to depth.
      linear: factory of the MLP's linear layers, with the signature of `nnx.Linear`.
      features: width of the tokens.
      layers: number of blocks.
      heads: number of heads of each mixer.
      head_dim: width of a head; None means features // heads.
      mlp_features: width inside the MLPs and inside the head of `Classifier`.
      dropout: dropout rate on the embeddings and on the output of every mixer and MLP.
      positions: position encoding: "learned", "sinusoidal", "rope", "rope2d" or "none".
      norm: normalisation: "layer" or "rms".
      mlp: kind of MLP: "gelu", "gelu_erf" or "swiglu".
      causal: whether token i sees tokens j ≤ i only.
      prefix: number of learnt tokens in front of the sequence.
      epsilon: number added to the variance in the norms.
      segments: number of segments, see `TokenEmbedding`.
      post_norm: whether the norms follow the embeddings and the residual sums, as in BERT, not precede the branches.
      remat: whether to recompute blocks in the backward pass.
      dtype: dtype of the computation; parameters are float32.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_len: int,
        mixers: Sequence[Callable[..., nnx.Module]],
        linear: Callable = nnx.Linear,
        features: int = 64,
        layers: int = 2,
        heads: int = 2,
        head_dim: int | None = None,
        mlp_features: int = 128,
        dropout: float = 0.1,
        positions: str = "learned",
        norm: str = "layer",
        mlp: str = "gelu",
        causal: bool = False,
        prefix: int = 0,
        epsilon: float = 1e-6,
        segments: int = 0,
        post_norm: bool = False,
        remat: bool = False,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.embedding = TokenEmbedding(
            vocab_size,
            features,
            max_len=max_len,
            positions=positions,
            segments=segments,
            norm=make_norm(norm, features, epsilon=epsilon, dtype=dtype, rngs=rngs) if post_norm else None,
            dtype=dtype,
            rngs=rngs,
        )
        self.prefix = nnx.Param(jax.random.normal(rngs.params(), (prefix, features), jnp.float32)) if prefix else None
        sizes = {
            "heads": heads,
            "head_dim": head_dim,
            "causal": causal,
            "positions": positions if positions.startswith("rope") else None,
            "max_len": max_len + prefix,
        }
        self.encoder = Encoder(
            features,
            layers=layers,
            mixers=[partial(mixer, **sizes) for mixer in mixers],
            mlp_features=mlp_features,
            linear=linear,
            mlp=mlp,
            norm=norm,
            norm_epsilon=epsilon,
            dropout=dropout,
            post_norm=post_norm,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
        self.dropout = dropout

    def encode(
        self,
        inputs: jax.Array,
        mask: jax.Array | None,
        key: jax.Array | None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """int `[batch, length]` -> `[batch, prefix + length, features]`, and the mask of that length (or None)."""
        mask = bool_mask(mask)
        x, mask = self.after_prefix(self.embedding(inputs, mask=mask, positions=positions, segments=segments), mask)
        keys = example_keys(key, x.shape[0])
        x = dropout(x, self.dropout, fold(keys, 0))
        return self.encoder(x, mask=mask, key=fold(keys, 1)), mask

    def after_prefix(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Tokens `[batch, length, features]` and their mask with the learnt tokens in front."""
        if self.prefix is None:
            return x, mask
        prefix = jnp.broadcast_to(self.prefix[...].astype(x.dtype), (len(x), *self.prefix.shape))
        mask = None if mask is None else jnp.pad(mask, ((0, 0), (len(self.prefix), 0)), constant_values=True)
        return jnp.concatenate([prefix, x], axis=1), mask

    def init_state(self, batch: int, *, max_len: int | None = None, dtype: jnp.dtype | None = None) -> "TextState":
        """What a decoder knows before the first token of `batch` sequences; see `Mixer.init_state`."""
        blocks = self.encoder.init_state(batch, max_len=self.room(max_len), dtype=dtype)
        if self.prefix is not None:
            nothing = jnp.zeros((batch, 0), jnp.int32)
            _, blocks = self.encoder.prefill(self.after_prefix(self.embedding(nothing), None)[0], state=blocks)
        return TextState(jnp.zeros(batch, jnp.int32), blocks)

    def room(self, max_len: int | None) -> int | None:
        """With the learnt tokens."""
        return max_len if max_len is None or self.prefix is None else max_len + len(self.prefix)

    def prefill(
        self, inputs: jax.Array, *, mask: jax.Array | None = None, state: "TextState | None" = None,
        max_len: int | None = None,
    ) -> tuple[jax.Array, "TextState"]:  # fmt: skip
        """Several tokens of each sequence at once, at evaluation: what the model says of them in a longer text.

        Args:
          inputs: token ids, int `[batch, length]`.
          mask: bool `[batch, length]`, True for real tokens; the others leave the state as it is.
          state: the state after the tokens before; None: these are the first.
          max_len: largest number of tokens, where the state grows with them; None means that of the model.

        Returns:
          The rows of the causal forward pass, `[batch, length, ...]`: of a `TokenClassifier` its logits, of other
          models the vectors of the tokens; anything at masked positions, NaN where there is no room or position left.
          And the next state.

        Raises:
          ValueError: see `Mixer.init_state`; a state of another number of sequences.
        """
        mask = bool_mask(mask)
        count, blocks = (jnp.zeros(len(inputs), jnp.int32), None) if state is None else state
        places = None  # those of the real tokens, from 0 on
        if state is not None and not self.embedding.positions.startswith("rope"):
            places = count[:, None] + token_ranks(mask, *inputs.shape)
        x, real = self.embedding(inputs, mask=mask, positions=places), mask
        if state is None:
            x, real = self.after_prefix(x, mask)
        x, blocks = self.encoder.prefill(x, mask=real, state=blocks, max_len=self.room(max_len))
        new = inputs.shape[1] if mask is None else mask.sum(1, dtype=jnp.int32)
        return self.output(x[:, x.shape[1] - inputs.shape[1] :]), TextState(count + new, blocks)

    def step(self, inputs: jax.Array, state: "TextState") -> tuple[jax.Array, "TextState"]:
        """The next token of each sequence, int `[batch]`: its row, as of `prefill`, and the next state."""
        out, state = self.prefill(inputs[:, None], state=state)
        return out[:, 0], state

    def output(self, x: jax.Array) -> jax.Array:
        """What `prefill` returns for the encoder's `x`, `[batch, length, features]`. By default x."""
        return x


class TextState(NamedTuple):
    """The state of a model of tokens that decodes.

    Attributes:
      count: number of tokens so far, int32 `[batch]`.
      blocks: the states of the blocks, see `Encoder.init_state`.
    """

    count: jax.Array
    blocks: list[Any]


class Classifier(TokenEncoder):
    """A transformer that predicts one label for a sequence of tokens.

    Args:
      num_classes: labels are in [0, num_classes).
      pool: pooling of a sequence to one vector: "mean" over the real tokens, "cls" (a learnt token in front of the
        sequence) or "last" (the last real token).
      **encoder: see `TokenEncoder`.

    Raises:
      ValueError: a name or a size that does not fit; `pool="cls"` in a causal model, where that token sees no other.
    """

    def __init__(self, *, num_classes: int, pool: str = "mean", **encoder: Any):
        check_pool(pool, encoder.get("causal", False))
        super().__init__(prefix=1 if pool == "cls" else 0, **encoder)
        self.pool = pool
        features, hidden = self.encoder.features, self.encoder.mlp_features
        self.head = nnx.Sequential(
            nnx.Linear(features, hidden, rngs=encoder["rngs"]),
            nnx.relu,
            nnx.Linear(hidden, num_classes, rngs=encoder["rngs"]),
        )

    def __call__(
        self,
        inputs: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits, float32 `[batch, num_classes]`.

        Args:
          inputs: token ids, int `[batch, length]`.
          mask: bool `[batch, length]`, True for real tokens; None means all are.
          positions: int `[batch, length]`, see `TokenEmbedding`; None means the ranks of the real tokens.
          key: None at evaluation; in training one key per example `[batch]`, or a single key, folded per example.

        Raises:
          ValueError: see `TokenEmbedding`.
        """
        x, mask = self.encode(inputs, mask, key, positions)
        return self.head(pool_tokens(x, mask, self.pool))


class TokenClassifier(TokenEncoder):
    """A transformer that predicts one label for every token.

    Args:
      num_classes: labels are in [0, num_classes).
      **encoder: see `TokenEncoder`.
    """

    def __init__(self, *, num_classes: int, **encoder: Any):
        super().__init__(**encoder)
        self.head = nnx.Linear(self.encoder.features, num_classes, rngs=encoder["rngs"])

    def __call__(
        self,
        inputs: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits, float32 `[batch, length, num_classes]`; arguments as in `Classifier`."""
        x, _ = self.encode(inputs, mask, key, positions)
        return self.output(x[:, x.shape[1] - inputs.shape[1] :])

    def output(self, x: jax.Array) -> jax.Array:
        """Logits, float32 `[batch, length, num_classes]`, of the encoder's `x`, `[batch, length, features]`."""
        return self.head(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
