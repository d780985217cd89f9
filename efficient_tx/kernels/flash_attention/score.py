"""Scores: what the weight of a key for a query is, in a few lines of elementwise JAX."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.checks import OptionError
from efficient_tx.kernels.flash_attention.fields import ArrayFields


@dataclasses.dataclass(frozen=True)
class Score(ArrayFields):
    """A score of one's own is a frozen dataclass that overrides `logits`, `weights` or both.

    Both are elementwise: they see a block of any shape, queries × keys or keys × queries, and what broadcasts to it,
    and must not look at neighbours. Kernels are made of them and of their derivatives, which jax finds.

    Fields that hold arrays `[heads]` (or one number) are parameters: they get gradients, and arrive in `logits` and
    `weights` already taken for the head of the block. All other fields are static; each value is a program of its own.

    Attributes:
      normalise: "softmax": exp(logits) / Σ exp(logits), stable for logits of any size; "sum": weights divided by their
        sum; None: weights as they are.
      needs_norms: whether `logits` looks at the norms.
    """

    normalise: ClassVar[Literal["softmax", "sum"] | None] = "softmax"
    needs_norms: ClassVar[bool] = False

    def logits(
        self, dot: jax.Array, q_norm: jax.Array | None, k_norm: jax.Array | None, i: jax.Array, j: jax.Array,
        head: jax.Array,
    ) -> jax.Array:  # fmt: skip
        """The logits of a block.

        Args:
          dot: scale · q·k + bias, float32 (float64 for float64 inputs).
          q_norm, k_norm: scale · ‖q‖² / 2 and scale · ‖k‖² / 2; None unless `needs_norms`.
          i, j: positions of query and key, int32; the last query stands at the last key, so i = index + keys − queries.
          head: index of the query's head, int32.
        """
        return dot

    def weights(self, logits: jax.Array) -> jax.Array:
        """The weights of a block before its rows are summed; not called where `normalise` is "softmax"."""
        raise NotImplementedError(f"{type(self).__name__} has normalise={self.normalise!r} and must define weights")

    def unsupported(self, platform: str) -> str | None:
        """Why a Pallas kernel for this platform, "tpu" or "cuda", cannot compute the score, or None."""
        return None

    def given(self, *, heads: int, bias: float) -> "Score":
        """The score for a call with that many heads and that bias: fills what is still open."""
        return self


class Softmax(Score):
    """exp(s) / Σ exp(s)."""


class Sigmoid(Score):
    """1 / (1 + exp(−s)), unnormalised (Ramapuram et al. 2024, arXiv 2409.04431)."""

    normalise = None

    def weights(self, logits):
        return jax.nn.sigmoid(logits)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def at_most(x: jax.Array, ceiling: float) -> jax.Array:
    """min(x, ceiling) for what is above only by rounding: the derivative is 1, and costs kernels no comparison."""
    return jnp.minimum(x, ceiling)


@at_most.defjvp
def _derivative(ceiling, primals, tangents):
    return at_most(*primals, ceiling), *tangents


@dataclasses.dataclass(frozen=True)
class Gaussian(Score):
    """exp(bias − scale · ‖q − k‖² / 2), unnormalised (Chen et al. 2021, arXiv 2111.00035)."""

    normalise = None
    needs_norms = True
    ceiling: float = 0.0  # Rounding may make a squared distance negative.

    def logits(self, dot, q_norm, k_norm, i, j, head):
        return at_most(dot - q_norm - k_norm, self.ceiling)

    def weights(self, logits):
        return jnp.exp(logits)

    def given(self, *, heads, bias):
        return dataclasses.replace(self, ceiling=bias)


@dataclasses.dataclass(frozen=True)
class Power(Score):
    """|s|^p / Σ |s|^p, the family of LevAttention (Kannan et al. 2024, arXiv 2410.05462); no power overflows.

    A row of zeros stays zero.
    """

    p: float = 4.0

    def logits(self, dot, q_norm, k_norm, i, j, head):
        return jnp.where(dot == 0, -jnp.inf, self.p * jnp.log(jnp.where(dot == 0, 1, jnp.abs(dot))))


@dataclasses.dataclass(frozen=True)
class SoftCap(Score):
    """Softmax of cap · tanh(s / cap): logits within ±cap."""

    cap: float = 50.0

    def logits(self, dot, q_norm, k_norm, i, j, head):
        return self.cap * jnp.tanh(dot / self.cap)


@dataclasses.dataclass(frozen=True)
class Alibi(Score):
    """Softmax of s − slope · |i − j| (Press et al. 2021, arXiv 2108.12409); one slope a head, None: the paper's."""

    slopes: Any = None

    def logits(self, dot, q_norm, k_norm, i, j, head):
        return dot - self.slopes * jnp.abs(i - j)

    def given(self, *, heads, bias):
        return self if self.slopes is not None else dataclasses.replace(self, slopes=alibi_slopes(heads))


@dataclasses.dataclass(frozen=True)
class Relative(Score):
    """Softmax of s + table[j − i], distances beyond the table's ends being its last ones.

    `table` is `[heads, 2 · distance + 1]`; None: zeros, for distances up to `distance`.
    """

    table: Any = None
    distance: int = 128

    def logits(self, dot, q_norm, k_norm, i, j, head):
        last = self.table.shape[-1] // 2
        return dot + self.table[jnp.clip(j - i, -last, last) + last]

    def unsupported(self, platform):
        return "a relative bias is looked up in a table, which Pallas kernels cannot"

    def given(self, *, heads, bias):
        zeros = np.zeros((heads, 2 * self.distance + 1), np.float32)
        return self if self.table is not None else dataclasses.replace(self, table=zeros)


class Relu2(Score):
    """max(s, 0)², unnormalised."""

    normalise = None

    def weights(self, logits):
        return jnp.square(jnp.maximum(logits, 0))


SCORES: dict[str, type[Score]] = {
    "softmax": Softmax,
    "sigmoid": Sigmoid,
    "gaussian": Gaussian,
    "power": Power,
    "soft_cap": SoftCap,
    "alibi": Alibi,
    "relative": Relative,
    "relu2": Relu2,
}


def as_score(score: str | Score, *, heads: int, bias: float, dtype: jnp.dtype) -> Score:
    """The score object for a call, with its parameters `[heads, ...]`, the floating ones in `dtype`.

    Raises:
      OptionError: an unknown name, something that is no score, or a parameter whose first axis is not heads.
      TypeError: a score that is no frozen dataclass, has a field that is neither an array nor hashable, or gives other
        than floats of the block's shape.
    """
    if isinstance(score, str):
        if score not in SCORES:
            raise OptionError("score", score, f"choose one of {', '.join(SCORES)}, or pass a Score")
        score = SCORES[score]()
    name = score.__name__ if isinstance(score, type) else type(score).__name__
    if not isinstance(score, Score):
        value, own = (name, f"the object {name}()") if isinstance(score, type) else (score, "an instance of a Score")
        raise OptionError("score", value, f"choose one of {', '.join(SCORES)}, or pass {own}")
    score.check()
    if score.normalise not in ("softmax", "sum", None):
        raise OptionError("score", name, f"its normalise is {score.normalise!r}: choose 'softmax', 'sum' or None")
    score = score.given(heads=heads, bias=bias)
    if not isinstance(score, Score):
        raise OptionError("score", name, f"its given() made a {type(score).__name__}: return a Score")

    def of_heads(path, x):
        if jnp.ndim(x) and x.shape[0] != heads:
            field = f"{name}{jax.tree_util.keystr(path)}"
            raise OptionError("score", field, f"its shape is {x.shape}: pass one number or [heads, ...], here {heads}")
        x = jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
        return x if x.ndim else jnp.broadcast_to(x, heads)

    score = jax.tree_util.tree_map_with_path(of_heads, score)
    leaves, tree = jax.tree.flatten(score)
    check_elementwise(tree, tuple(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in leaves), jnp.dtype(dtype))
    return score


@functools.lru_cache(maxsize=256)
def check_elementwise(tree: Any, leaves: tuple[jax.ShapeDtypeStruct, ...], dtype: jnp.dtype) -> None:
    """Raises TypeError, one line, where a score of one head does not give a block of floats for a block."""
    dot, q_norm, k_norm = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((3, 2), (3, 1), (1, 2)))
    i, j, head = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3, 1), (1, 2), ()))

    score = jax.tree.unflatten(tree, leaves)
    kind, needs_norms = type(score).__name__, score.needs_norms

    def run(with_norms, leaves, dot, q_norm, k_norm, i, j, head):
        score = jax.tree.unflatten(tree, leaves)
        logits = score.logits(dot, *((q_norm, k_norm) if with_norms else (None, None)), i, j, head)
        return {"logits": logits} | ({} if score.normalise == "softmax" else {"weights": score.weights(logits)})

    block = (leaves, dot, q_norm, k_norm, i, j, head)
    try:
        found = jax.eval_shape(functools.partial(run, needs_norms), *block)
    except (TypeError, ValueError):
        if needs_norms or not evaluates(functools.partial(run, True), *block):
            return  # An implementation says why it cannot compute the score.
        raise TypeError(f"{kind}.logits looks at q_norm or k_norm: give {kind} the line needs_norms = True") from None
    for method, x in found.items():
        if getattr(x, "shape", None) != (3, 2) or not jnp.issubdtype(x.dtype, jnp.floating):
            gave = f"{x.dtype} {x.shape}" if hasattr(x, "dtype") else f"a {type(x).__name__}"
            wanted = "it must be of floats, of the block's shape"
            raise TypeError(f"{kind}.{method} gave {gave} for a block {dtype} (3, 2): {wanted}")


def evaluates(function: Callable, *arrays: Any) -> bool:
    try:
        jax.eval_shape(function, *arrays)
    except (TypeError, ValueError):
        return False
    return True


def alibi_slopes(heads: int) -> np.ndarray:
    """The paper's slopes `[heads]`, 2^(−8 (h + 1) / heads).

    Where heads is no power of two: those of the power below, then every second one of the power above.
    """
    power = 1 << (heads.bit_length() - 1)
    below = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    above = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([below, above[: heads - power]]).astype(np.float32)
