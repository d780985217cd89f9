"""Mega (Ma et al. 2022, arXiv 2209.10655): gated attention of one head behind a damped moving average.

    s_t = (1 − α δ) s_{t−1} + x_t,    x'_t = silu(Σ_n δ_n β_n γ_n s_{n,t} / √N + ω x_t),    α, δ in (0, 1)
    z_t = silu(W_z x'_t),    q_t = γ_q ⊙ z_t + β_q,    k_t = γ_k ⊙ z_t + β_k,    v_t = silu(W_v x_t)
    o = attention(q, k, v),    h_t = silu(W_h x'_t + U (silu(W_r x'_t) ⊙ o_t)),    y_t = σ(W_u x'_t) ⊙ (h_t − x_t)

in every channel N averages, the second direction with its own α, δ, β, γ without `causal`. The weights of the attention
are a softmax, or with `weighting="laplace"` Mega's own function of q·k / number of keys. To the logits a bias is added
that depends on the distance of query and key alone, the inner product of two learnt vectors turned by their positions.
With `chunk` tokens attend within pieces of so many, and the averages carry what is between them: cost n · chunk.

As in the authors' code: N = 16, keys 64 wide, values twice as wide as the tokens, and the initial values of all that is
no matrix. Unlike there: the bias is that of their option "rotary", not a table of the largest length; and x in the last
formula is the input of the mixer, which a pre-norm block has normed, as the block adds its own residual. Apart from
this the authors' module (facebookresearch/mega @aeaa4b4) gives the same numbers, tried with both weightings, in both
directions, with and without chunks: 4e-6 at most.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention.base import cache
from efficient_tx.attention.base.cache import Needed
from efficient_tx.attention.base.multihead import MultiHead, State
from efficient_tx.attention.base.options import checked_by
from efficient_tx.attention.recurrent.base import at_last
from efficient_tx.attention.recurrent.modes import convolve
from efficient_tx.checks import OptionError, at_least
from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.flash_attention import Mask, Score, documents, padding
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.flat import scaled, token_wise
from efficient_tx.tokens.mask import compact, key_mask, repeat_heads, spread
from efficient_tx.tokens.rotary import rotate


class Laplace(Score):
    """Φ((s − √½) / √(1 / 4π)), the distribution function of a normal variable, unnormalised."""

    normalise = None

    def weights(self, logits):
        return (1 + jax.lax.erf((logits - 0.5**0.5) * (2 * jnp.pi) ** 0.5)) / 2


# Wider values are heads of their own, of the same queries and keys: no accelerator's kernel takes them.
WIDEST = 256
SCORES = {"softmax": "softmax", "laplace": Laplace()}


def check_options(*, chunk, weighting):
    """Raises ValueError, one line, for the first option that is out of its range."""
    if chunk is not None:
        at_least(1, chunk=chunk)
    if weighting not in SCORES:
        raise OptionError("weighting", weighting, f"choose one of {', '.join(SCORES)}")


@checked_by(check_options)
def mega(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    alpha: jax.Array | None = None, beta: jax.Array | None = None,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
    chunk: int | None = None, weighting: Literal["softmax", "laplace"] = "softmax",
) -> jax.Array:  # fmt: skip
    """Mega's attention, without averages and gates; memory is linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      alpha, beta: `[head_dim]`, head_dim even: R_i α · R_j β is added to the logits, R the rotations of rotary
        positions. None: no bias.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; with as many queries as keys it marks
        the queries too. Positions and chunks count real tokens.
      key: unused, nothing is drawn.
      causal: query i sees keys j ≤ i only. Only then the numbers of queries and keys may differ: the last query is at
        the last real key.
      chunk: number of tokens that see each other; None means all.
      weighting: "softmax" of q·k / √head_dim + bias; or "laplace" of q·k / n + bias, not normalised, where n is the
        number of keys that the query sees.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero at padding. Statistics are float32 at least.

    Raises:
      ValueError: an option out of its range, shapes that do not fit, or other numbers of queries and keys without
        `causal`.
    """
    check_shapes(q, k, v)
    (batch, keys), queries = k.shape[:2], q.shape[1]
    mask = key_mask(mask, batch, keys)
    if queries != keys:
        given = {"alpha": alpha, "beta": beta, "mask": mask, "causal": True, "chunk": chunk, "weighting": weighting}
        return at_last(lambda q: mega(q, k, v, **given), q, k, mask=mask, causal=causal, name="mega")
    if 0 in (batch, keys):
        return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    size = keys if chunk is None else min(chunk, keys)
    rest = -keys % size
    real = None if mask is None and not rest else jnp.ones((batch, keys), bool) if mask is None else compact(mask, mask)

    def pieces(x):
        """`[batch · chunks, size, ...]`"""
        return jnp.pad(x, ((0, 0), (0, rest), *((0, 0),) * (x.ndim - 2))).reshape(-1, size, *x.shape[2:])

    q, k, v = (pieces(compact(x, mask)) for x in (q, k, v))
    real = None if real is None else pieces(real)
    counts = jnp.asarray(size) if real is None else real.sum(1)[:, None]
    seen = jnp.arange(1, size + 1) if causal else counts
    out = weighed(q, k, v, seen=seen, alpha=alpha, beta=beta, mask=real, causal=causal, weighting=weighting)
    return spread(out.reshape(batch, -1, *out.shape[2:])[:, :keys], mask)


def weighed(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    seen: jax.Array, alpha: jax.Array | None, beta: jax.Array | None, mask: Mask | jax.Array | None,
    causal: bool, weighting: str, real: jax.Array | None = None, before: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Attention with Mega's scores and its bias.

    Args:
      q, k, v: as in `mega`.
      seen: number of keys that a query sees, broadcasts to `[batch, queries]`.
      alpha, beta: as in `mega`.
      mask, causal: as in `flash_attention`.
      weighting: as in `mega`.
      real: bool `[batch, keys]`; a key's position is its rank among them. None: all.
      before: position of the first query, int32 `[batch]`; None: 0.
    """
    scale = jnp.maximum(seen, 1)[..., None, None].astype(q.dtype) if weighting == "laplace" else q.shape[-1] ** 0.5
    q = q / scale
    if alpha is not None:
        q = jnp.concatenate([q, turned(alpha, q, None, before)], axis=-1)
        k = jnp.concatenate([k, turned(beta, k, real, None)], axis=-1)
    wanted, slices = (*q.shape[:3], v.shape[3]), math.ceil(v.shape[3] / WIDEST)
    if slices > 1 and v.shape[3] % slices == 0:
        k, v = (repeat_heads(x, q.shape[2], "k and v") for x in (k, v))
        q, k = (jnp.repeat(x, slices, axis=2) for x in (q, k))
        v = v.reshape(*v.shape[:2], q.shape[2], -1)
    out = flash_attention(q, k, v, score=SCORES[weighting], mask=mask, causal=causal, scale=1.0)
    return out.reshape(wanted)


def turned(vector: jax.Array, x: jax.Array, real: jax.Array | None, before: jax.Array | None) -> jax.Array:
    """`vector` turned by the positions of `x`, in its shape but for the last axis."""
    batch = 1 if real is None and before is None else len(x)
    same = jnp.broadcast_to(vector, (batch, *x.shape[1:3], len(vector)))
    return jnp.broadcast_to(rotate(same, real, before=before), (*x.shape[:3], len(vector))).astype(x.dtype)


class Mega(MultiHead):
    """The whole layer of Mega; options as in `mega`, other arguments as in `MultiHead`.

    Args:
      heads, head_dim: ignored, there is one head.
      key_dim: width of queries and keys, even.
      expand: width of the values divided by that of the tokens.
      averages: N, the number of averages of each channel.
    """

    paper = "Ma et al. 2022, arXiv 2209.10655"
    computes = "damped averages, then gated softmax of one head, of all tokens or within chunks"
    cost = "n², or n·w in chunks"
    function = staticmethod(mega)
    refuses: ClassVar = {"cross": "it needs positions"}
    has_positions = False
    side_by_side = True

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"chunk": budget}

    def __init__(
        self, features: int, *,
        heads: int = 1, head_dim: int | None = None, key_dim: int = 64, expand: float = 2.0, averages: int = 16,
        linear: Callable[..., nnx.Module] = nnx.Linear, dtype: jnp.dtype | None = None, rngs: nnx.Rngs, **common: Any,
    ):  # fmt: skip
        at_least(1, averages=averages)
        if key_dim < 2 or key_dim % 2:
            raise OptionError("key_dim", key_dim, "pairs of channels turn: an even number, at least 2")
        if not features * expand >= 1:
            raise OptionError("expand", expand, f"with {features} features it must be at least {1 / features:g}")
        self.key_dim, self.averages = key_dim, averages
        own = {"linear": linear, "dtype": dtype, "rngs": rngs}
        super().__init__(features, heads=1, head_dim=round(expand * features), **own, **common)
        # What follows the averages: u, z, r and the input of h, in one product.
        self.base = linear(features, 2 * features + key_dim + self.head_dim, dtype=dtype, rngs=rngs)

        def normal(shape, deviation, mean=0.0):
            return nnx.Param(mean + deviation * jax.random.normal(rngs.params(), shape, jnp.float32))

        modes = (1 if self.causal else 2, features, averages)
        self.damping, self.decay = normal(modes, 0.2), normal(modes, 0.2)
        # "[1, -1, 1, -1, ...] seems more stable", as the authors write.
        self.entering = normal(modes, 0.02, (-1.0) ** jnp.arange(averages, dtype=jnp.float32))
        self.leaving = normal(modes, 1.0)
        self.skip = normal((features,), 1.0)
        self.affine = normal((2, key_dim), 0.02)
        self.shift = nnx.Param(jnp.zeros((2, key_dim), jnp.float32))
        self.turning = normal((2, key_dim), 0.02)

    def widths(self) -> dict[str, int]:
        return {"v": self.head_dim}

    def mix(self, x: jax.Array, *, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        moved, _ = self.averaged(x)
        update, z, read, inner = self.split(moved)
        projected, _ = self.placed(self.heads_of(x, z), mask)
        heads = self.attend(*projected.values(), mask=mask, key=key)
        return self.gated(x, heads, update, read, inner)

    def averaged(
        self, x: jax.Array, state: jax.Array | None = None, count: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """x' of the tokens `[batch, length, features]`, zeros where there are none, and the averages after `count`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        share = jax.nn.sigmoid(self.damping[...])
        lost = share * jax.nn.sigmoid(self.decay[...])
        # The logarithm of a share of nothing has no derivative.
        log_decay = jnp.log1p(-jnp.minimum(lost, 1 - jnp.finfo(lost.dtype).eps))
        weight = share * self.entering[...] * self.leaving[...] * self.averages**-0.5
        y, state = convolve(wide, log_decay[0], weight[0], state=state, count=count)
        if not self.causal:
            y += convolve(wide[:, ::-1], log_decay[1], weight[1])[0][:, ::-1]
        return jax.nn.silu(y + scaled(wide, self.skip[...])).astype(x.dtype), state

    def split(self, moved: jax.Array) -> tuple[jax.Array, ...]:
        """u, z, r and the input of h, `[batch, length, width]` each, of x'."""
        widths = (self.features, self.key_dim, self.head_dim, self.features)
        ends = [sum(widths[: i + 1]) for i in range(3)]
        out = self.base(moved.reshape(-1, self.features)).reshape(*moved.shape[:2], -1)
        update, z, read, inner = jnp.split(out, ends, axis=-1)
        return jax.nn.sigmoid(update), jax.nn.silu(z), jax.nn.silu(read), inner

    def heads_of(self, x: jax.Array, z: jax.Array) -> dict[str, jax.Array]:
        """q, k and v of the one head."""
        q, k = (token_wise(lambda x, a=a, b=b: x * a + b, z) for a, b in zip(self.affine[...], self.shift[...]))
        v = self.v(x.reshape(-1, self.features)).reshape(*x.shape[:2], -1)
        return {"q": q[:, :, None], "k": k[:, :, None], "v": jax.nn.silu(v)[:, :, None]}

    def attend(
        self, *projected: jax.Array, mask: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:  # fmt: skip
        alpha, beta = self.turning[...]
        return super().attend(*projected, mask=mask, key=key, alpha=alpha, beta=beta)

    def gated(
        self, x: jax.Array, heads: jax.Array, update: jax.Array, read: jax.Array, inner: jax.Array
    ) -> jax.Array:  # fmt: skip
        out = self.out((heads[:, :, 0] * read).reshape(-1, self.head_dim)).reshape(x.shape)
        return update * (jax.nn.silu(inner + out) - x)

    def stored(self) -> dict[str, Needed]:
        return dict.fromkeys("kv", Needed(last=self.chunk))

    def stored_widths(self) -> dict[str, int]:
        return {"k": self.key_dim, "v": self.head_dim}

    def state_numbers(self, length: int) -> int:
        return super().state_numbers(length) + self.features * self.averages

    def empty_memory(self, batch: int, max_len: int | None, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """The averages `[batch, features, averages]`, and the caches of keys and values."""
        wide = jnp.promote_types(dtype, jnp.float32)
        averages = jnp.zeros((batch, self.features, self.averages), wide)
        return super().empty_memory(batch, max_len, dtype) | {"averages": averages}

    def advance(
        self, x: jax.Array, state: State, *, mask: jax.Array | None, first: bool
    ) -> tuple[jax.Array, State]:  # fmt: skip
        new = None if mask is None else mask.sum(1, dtype=jnp.int32)
        moved, averages = self.averaged(x, state.memory["averages"], new)
        update, z, read, inner = self.split(moved)
        projected, convolved = self.placed(self.heads_of(x, z), mask, state)
        heads, caches = self.remember(projected, state.memory, mask=mask, count=state.count, first=first)
        count = state.count + (x.shape[1] if new is None else new)
        return self.gated(x, heads, update, read, inner), State(count, convolved, caches | {"averages": averages})

    def attend_on(
        self, projected: dict[str, jax.Array], memory: dict[str, jax.Array], after: dict[str, jax.Array],
        mask: jax.Array | None, count: jax.Array,
    ) -> jax.Array:  # fmt: skip
        stored, length = self.stored(), projected["q"].shape[1]
        kept, there = stored["k"].tokens(memory["k"].shape[1], count)
        seen, _ = cache.views(stored, memory, count)
        own = jnp.ones((len(count), length), bool) if mask is None else mask
        # The real ones of the new tokens at the end, where `flash_attention` has its last query.
        back = None if mask is None else length - mask.sum(1)
        new = {name: cache.moved(part, back) for name, part in projected.items()}
        at = cache.moved(count[:, None] + jnp.arange(length), back)
        real = jnp.concatenate([there, cache.moved(own, back)], axis=1)
        sees: Mask = padding(real)
        if self.chunk is not None:
            sees &= documents(at // self.chunk, jnp.concatenate([kept, at], axis=1) // self.chunk)
        k, v = (jnp.concatenate([seen[name], new[name].astype(seen[name].dtype)], axis=1) for name in "kv")
        alpha, beta = self.turning[...]
        heads = weighed(
            new["q"], k, v, seen=(at if self.chunk is None else at % self.chunk) + 1, alpha=alpha, beta=beta, mask=sees,
            causal=True, weighting=self.weighting, real=real, before=there.sum(1) - (0 if back is None else back),
        )  # fmt: skip
        return cache.moved(heads, None if back is None else -back)
