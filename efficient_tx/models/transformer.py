"""The shared transformer: Mlp, Block and Encoder. Mixers and linear layers are passed as factories, not as names."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.checks import OptionError, at_least
from efficient_tx.numerics.random import check_rate, dropout, example_keys, fold
from efficient_tx.tokens.flat import token_wise

NORMS: dict[str, Callable] = {"layer": nnx.LayerNorm, "rms": nnx.RMSNorm}
MLPS = ("gelu", "gelu_erf", "swiglu")


def make_norm(
    name: str, features: int, *, epsilon: float = 1e-6, dtype: jnp.dtype | None, rngs: nnx.Rngs
) -> nnx.Module:
    """LayerNorm ("layer") or RMSNorm ("rms") over the last axis; statistics are float32."""
    if not 0 < epsilon < float("inf"):
        raise OptionError("norm_epsilon", epsilon, "it must be a positive number")
    if name not in NORMS:
        raise OptionError("norm", name, f"choose one of {', '.join(NORMS)}")
    return NORMS[name](features, epsilon=epsilon, dtype=dtype, rngs=rngs)


def drop_path(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zeroes whole examples of a residual branch `x` `[batch, length, features]` with probability `rate`.

    The others are scaled by 1/(1 − rate) (stochastic depth, Huang et al. 2016, arXiv 1603.09382). `keys` are `[batch]`;
    None means evaluation and returns `x` itself.
    """
    if rate == 0.0 or keys is None:
        return x
    return x * dropout(jnp.ones((x.shape[0], 1, 1), x.dtype), rate, keys)


class Mlp(nnx.Module):
    """The token-wise network of a block: `[..., features]` -> the same.

    Args:
      features: width of input and output.
      hidden: inner width of the GELU network.
      kind: "gelu": W₂ gelu(W₁ x) with the tanh form of GELU; "gelu_erf": the same with the error function, as in torch
        models; or "swiglu": W₃ (silu(W₁ x) ⊙ W₂ x) (Shazeer 2020, arXiv 2002.05202), whose inner width ⌊2/3 hidden⌉
        gives the same number of parameters.
      linear: factory of the linear layers, with the signature of `nnx.Linear`.
      dtype: dtype of the computation; parameters are float32.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        kind: str = "gelu",
        linear: Callable = nnx.Linear,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        if kind not in MLPS:
            raise OptionError("mlp", kind, f"choose one of {', '.join(MLPS)}")
        inner = round(2 * hidden / 3) if kind == "swiglu" else hidden
        self.up = linear(features, inner, dtype=dtype, rngs=rngs)
        self.gate = linear(features, inner, dtype=dtype, rngs=rngs) if kind == "swiglu" else None
        self.down = linear(inner, features, dtype=dtype, rngs=rngs)
        self.exact = kind == "gelu_erf"

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.gate is None:
            return self.down(nnx.gelu(self.up(x), approximate=not self.exact))
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """A residual block: x + mixer(norm x), then x + mlp(norm x); post-norm: norm(x + mixer x), then norm(x + mlp x).

    Args:
      features: width of the tokens.
      mixer: factory of the token mixer, called with (features, dropout=, dtype=, rngs=).
      mlp_features: width inside the MLP.
      linear: factory of the MLP's layers, with the signature of `nnx.Linear`.
      mlp: kind of MLP: "gelu", "gelu_erf" or "swiglu".
      norm: normalisation: "layer" or "rms".
      norm_epsilon: number added to the variance in the norms.
      dropout: dropout rate on the output of mixer and MLP.
      drop_path: rate at which an example skips the mixer and, separately, the MLP.
      layer_scale: initial value of a learnt factor per channel of both branches; None means no factor. LayerScale is
        from Touvron et al. 2021, arXiv 2103.17239.
      post_norm: whether the norms follow the residual sums, as in Vaswani et al. 2017 (arXiv 1706.03762) and BERT.
      dtype: dtype of the computation; parameters are float32.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        features: int,
        *,
        mixer: Callable[..., nnx.Module],
        mlp_features: int,
        linear: Callable = nnx.Linear,
        mlp: str = "gelu",
        norm: str = "layer",
        norm_epsilon: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        post_norm: bool = False,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        check_rate(drop_path, "drop_path")
        if layer_scale is not None and not 0 < layer_scale < float("inf"):
            raise OptionError("layer_scale", layer_scale, "it must be a positive number, or left out")
        self.mixer_norm = make_norm(norm, features, epsilon=norm_epsilon, dtype=dtype, rngs=rngs)
        self.mixer = mixer(features, dropout=dropout, dtype=dtype, rngs=rngs)
        self.mlp_norm = make_norm(norm, features, epsilon=norm_epsilon, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(features, mlp_features, kind=mlp, linear=linear, dtype=dtype, rngs=rngs)
        self.mixer_scale, self.mlp_scale = (
            None if layer_scale is None else nnx.Param(jnp.full(features, layer_scale, jnp.float32)) for _ in range(2)
        )
        self.dropout = dropout
        self.drop_path = drop_path
        self.post_norm = post_norm

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
        """`x` `[batch, length, features]`, `mask` bool `[batch, length]`, `key` `[batch]` or None -> the shape of x."""
        mixed = self.mixer(self._before(x), mask=mask, key=fold(key, 0))
        return self._after(mixed, x, key)

    def init_state(self, batch: int, *, max_len: int | None = None, dtype: jnp.dtype | None = None) -> Any:
        """The state of the mixer before the first token; see `Mixer.init_state`."""
        return self.mixer.init_state(batch, max_len=max_len, dtype=dtype)

    def step(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """One token of each sequence, `[batch, features]`, at evaluation, and the next state; see `Mixer.step`."""
        mixed, state = self.mixer.step(self._before(x), state)
        return self._after(mixed, x, None), state

    def prefill(
        self, x: jax.Array, *, mask: jax.Array | None = None, state: Any = None, max_len: int | None = None
    ) -> tuple[jax.Array, Any]:
        """Several tokens, `[batch, length, features]`, at evaluation, and the next state; see `Mixer.prefill`."""
        mixed, state = self.mixer.prefill(self._before(x), mask=mask, state=state, max_len=max_len)
        return self._after(mixed, x, None), state

    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one sequence, in float32, after `length` tokens."""
        return self.mixer.state_bytes(length)

    def _before(self, x: jax.Array) -> jax.Array:
        """The input of the mixer for that of the block, `[..., features]`."""
        return x if self.post_norm else token_wise(self.mixer_norm, x)

    def _after(self, mixed: jax.Array, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """The output of the block for that of the mixer, and its input `[..., features]`."""
        x = x + self._branch(mixed, self.mixer_scale, fold(key, 2))
        if self.post_norm:
            x = token_wise(self.mixer_norm, x)
            hidden = token_wise(self.mlp, x)
        else:
            hidden = token_wise(lambda tokens: self.mlp(self.mlp_norm(tokens)), x)
        x = x + self._branch(dropout(hidden, self.dropout, fold(key, 1)), self.mlp_scale, fold(key, 3))
        return token_wise(self.mlp_norm, x) if self.post_norm else x

    def _branch(self, x: jax.Array, scale: nnx.Param | None, key: jax.Array | None) -> jax.Array:
        """The output of a branch, scaled per channel and dropped per example."""
        return drop_path(x if scale is None else x * scale[...].astype(x.dtype), self.drop_path, key)


class Encoder(nnx.Module):
    """A stack of blocks and, unless they end with a norm themselves (post-norm), a final norm.

    Args:
      features: width of the tokens.
      layers: number of blocks.
      mixers: mixer factories, repeated to depth: block i gets mixers[i mod len(mixers)].
      mlp_features: width inside the MLPs.
      remat: whether to recompute each block in the backward pass instead of storing its activations.
      norm: normalisation of the blocks and after them: "layer" or "rms".
      norm_epsilon: number added to the variance in the norms.
      drop_path: rate of `Block` in the last block; it increases linearly from 0 in the first block.
      post_norm: see `Block`.
      dtype: dtype of the computation; parameters are float32.
      rngs: source of the initial parameters.
      **block: the remaining arguments of `Block`.
    """

    def __init__(
        self,
        features: int,
        *,
        layers: int,
        mixers: Sequence[Callable[..., nnx.Module]],
        mlp_features: int,
        remat: bool = False,
        norm: str = "layer",
        norm_epsilon: float = 1e-6,
        drop_path: float = 0.0,
        post_norm: bool = False,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        at_least(1, layers=layers)
        check_rate(drop_path, "drop_path")
        self.blocks = nnx.List(
            Block(
                features,
                mixer=mixers[i % len(mixers)],
                mlp_features=mlp_features,
                norm=norm,
                norm_epsilon=norm_epsilon,
                drop_path=drop_path * i / max(layers - 1, 1),
                post_norm=post_norm,
                dtype=dtype,
                rngs=rngs,
                **block,
            )
            for i in range(layers)
        )
        self.norm = None if post_norm else make_norm(norm, features, epsilon=norm_epsilon, dtype=dtype, rngs=rngs)
        self.features = features
        self.mlp_features = mlp_features
        self.remat = remat

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
        """`x` `[batch, length, features]` -> the same shape, normalised.

        `mask` is bool `[batch, length]`; `key` is None at evaluation, in training one key per example or a single key.
        """
        x = run_blocks(self.blocks, x, mask=mask, keys=example_keys(key, x.shape[0]), remat=self.remat)
        return self._last(x)

    def init_state(self, batch: int, *, max_len: int | None = None, dtype: jnp.dtype | None = None) -> list[Any]:
        """The states of all blocks before the first token of `batch` sequences; see `Mixer.init_state`."""
        return [block.init_state(batch, max_len=max_len, dtype=dtype) for block in self.blocks]

    def step(self, x: jax.Array, state: Sequence[Any]) -> tuple[jax.Array, list[Any]]:
        """One token of each sequence, `[batch, features]`, at evaluation: its row of the causal forward pass.

        Also returns the next state. See `Mixer.step`.
        """
        after = []
        for block, own in zip(self.blocks, state, strict=True):
            x, own = block.step(x, own)
            after.append(own)
        return self._last(x), after

    def prefill(
        self, x: jax.Array, *, mask: jax.Array | None = None, state: Sequence[Any] | None = None,
        max_len: int | None = None,
    ) -> tuple[jax.Array, list[Any]]:  # fmt: skip
        """Several tokens, `[batch, length, features]`, at evaluation: their rows of the causal forward pass.

        Also returns the next state. See `Mixer.prefill`.
        """
        after = []
        for block, own in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, own = block.prefill(x, mask=mask, state=own, max_len=max_len)
            after.append(own)
        return self._last(x), after

    def state_bytes(self, length: int) -> int:
        """Bytes of the states of one sequence, in float32, after `length` tokens."""
        return sum(block.state_bytes(length) for block in self.blocks)

    def _last(self, x: jax.Array) -> jax.Array:
        """The output for that of the last block, `[..., features]`."""
        return x if self.norm is None else token_wise(self.norm, x)


def run_blocks(
    blocks: Sequence[Block], x: jax.Array, *, mask: jax.Array | None = None, keys: jax.Array | None, remat: bool
) -> jax.Array:
    """Applies the blocks to `x` `[batch, length, features]` in turn; `keys` are `[batch]` or None (evaluation)."""
    for i, block in enumerate(blocks):
        graphdef, params = nnx.split(block)

        def run(params, x, mask, key, graphdef=graphdef):
            return nnx.merge(graphdef, params)(x, mask=mask, key=key)

        x = (jax.checkpoint(run) if remat else run)(params, x, mask, fold(keys, i))
    return x
