"""Attention with a score and a mask of one's own, exact and blockwise (Dong et al. 2024, arXiv 2412.05496).

    out_i = Σ_j w_ij v_j,    w_ij = score(q_i·k_j / √K, i, j, head)  for the j that mask(i, j) allows, else 0

A `Score` says in a few lines what a weight is, and whether a query's weights are divided by their sum; a `Mask` says
which keys a query sees. Arrays that a score holds, slopes of the heads or a table of biases, are parameters. Cost n²,
less what the mask leaves out in whole blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.checks import OptionError
from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.flash_attention import SCORES, Mask, Score, padding, reference
from efficient_tx.kernels.flash_attention.options import Options
from efficient_tx.kernels.flash_attention.score import as_score
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import key_mask_or_pairs


def custom(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | Mask | None = None, key: jax.Array | None = None, causal: bool = False,
    score: str | Score = "softmax",
) -> jax.Array:  # fmt: skip
    """Attention with any score, blockwise: memory is linear in the length, forward and backward.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: a Mask, to which `padding(key_mask)` may be joined by `&`. Or a key mask, bool `[batch, keys]` or
        `[batch, 1, 1, keys]`, True for real tokens; or a mask of all pairs, `[batch, heads or 1, queries, keys]`, with
        memory quadratic in the length.
      key: unused, nothing is drawn.
      causal: query i sees keys j ≤ i + keys − queries only.
      score: a name in `kernels.flash_attention.SCORES`, or a Score of one's own; in a config its "module:name".

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for a query without keys. The arithmetic is float32 at
      least.
    """
    check_shapes(q, k, v)
    if not isinstance(mask, Mask):
        mask = key_mask_or_pairs(mask, q, k)
    return flash_attention(q, k, v, score=score, mask=mask, causal=causal)


# Queries whose weights on all keys a decoder holds at once.
QUERIES = 128


class Custom(MultiHead):
    """Multi-head attention with a score and a mask. The arrays of the score are the mixer's parameters, in float32.

    Positions in the score and the mask count each example's real tokens.

    Args:
      mask: which keys a query sees beside its being real; in a config "module:name" or, for instance,
        "window(64) | prefix(4)". None, in a config also "", means all.

    Raises:
      ValueError: what is no score or mask, an array of a score that is not floating, or a mask that holds arrays.
    """

    paper = "Dong et al. 2024, arXiv 2412.05496"
    computes = "softmax, or any score and mask of one's own, exactly"
    cost = "n²"
    function = staticmethod(custom)
    side_by_side = True

    def __init__(self, features: int, *, mask: Mask | None = None, **common: Any):
        given = {"score": common.pop("score")} if "score" in common else {}
        super().__init__(features, **common)
        for score in given.values():
            self.score = with_parameters(score, self.heads)
            # One's own may look at the index of the head, or depend on their number.
            self.heads_alike = isinstance(score, str) or type(score) in SCORES.values()
        self.mask = checked(mask)

    def attend_on(
        self, projected: dict[str, jax.Array], memory: dict[str, jax.Array], after: dict[str, jax.Array],
        mask: jax.Array | None, count: jax.Array,
    ) -> jax.Array:  # fmt: skip
        q, score = projected["q"], nnx.as_pure(self.score)

        def one(of):
            """One query of each example, by its number and itself."""
            n, q = of
            return at((count + n)[:, None], q[:, None], after["k"], after["v"], score, self.mask)[:, 0]

        return jax.lax.map(one, (jnp.arange(q.shape[1]), q.swapaxes(0, 1)), batch_size=QUERIES).swapaxes(0, 1)

    def arguments(self, *, mask: jax.Array | None, key: jax.Array | None) -> dict[str, Any]:
        if self.mask is not None:
            mask = self.mask if mask is None else self.mask & padding(mask)
        return super().arguments(mask=mask, key=key) | {"score": nnx.as_pure(self.score)}


def at(
    positions: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, score: str | Score, mask: Mask | None
) -> jax.Array:  # fmt: skip
    """The plain formula of queries at other positions than the last ones: memory is queries × keys.

    Args:
      positions: of the queries, int32 `[batch, queries]`; a query sees no key after its own.
      q: `[batch, queries, heads, head_dim]`.
      k, v: `[batch, keys, heads, dim]`, of the positions 0, 1, ...
      score: as of `custom`.
      mask: as of `Custom`.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    score = as_score(score, heads=q.shape[2], bias=0.0, dtype=dtype)
    i, j = positions[:, :, None], jnp.arange(k.shape[1])
    keep = j <= i
    if mask is not None:
        keep &= mask.allowed(i, j, *mask.segments)
    options = Options(q.shape[-1] ** -0.5, 0.0, jax.lax.Precision.HIGHEST)
    return reference.formula(options, q, k, v, score, keep[:, None], i, j)[0]


def with_parameters(score: str | Score, heads: int) -> Any:
    """A score whose arrays are parameters; without arrays it stays what it is."""
    made = as_score(score, heads=heads, bias=0.0, dtype=jnp.float32)
    for path, x in jax.tree.leaves_with_path(made):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            field = f"{type(made).__name__}{jax.tree_util.keystr(path)}"
            raise OptionError("score", field, f"it has dtype {x.dtype}, and parameters are floating: hold a tuple")
    return nnx.data(jax.tree.map(nnx.Param, made)) if jax.tree.leaves(made) else score


def checked(mask: Mask | None) -> Mask | None:
    if mask is not None and not isinstance(mask, Mask):
        raise OptionError("mask", type(mask).__name__, "pass a Mask, as window(64) | prefix(4), or None")
    if mask is not None:
        mask.check()
    if jax.tree.leaves(mask):
        raise OptionError("mask", type(mask).__name__, "it holds arrays of tokens: pass these to the function `custom`")
    return mask
