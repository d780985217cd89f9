"""Mixer: the contract that every token mixer keeps."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.attention.base.options import check_options, options
from efficient_tx.checks import OptionError
from efficient_tx.numerics.random import check_rate, dropout, example_keys, fold
from efficient_tx.signatures import constructor
from efficient_tx.tokens.mask import compact, spread


class Mixer(nnx.Module):
    """Mixes the tokens of a sequence: everything between the residual branches of a block.

    A subclass writes `mix` and states what it can do; asking for more is a ValueError at construction. Modules hold
    parameters and nothing else.

    Args:
      features: width of the tokens, in and out.
      heads: how many, for mixers that have any. Others take `heads`, `head_dim`, `linear`, `dtype` and `rngs` too,
        since all mixers are made alike, and do nothing with them.
      head_dim: width of a head.
      linear: factory of linear layers with the signature of `nnx.Linear`.
      dropout: rate of the dropout on the mixer's output.
      causal: token i may depend on tokens j ≤ i only.
      positions: None, "rope" or "rope2d": how queries and keys turn with their position.
      max_len: the longest sequence; variants with parameters tied to the length need it.
      dtype: of the computation; None is that of tokens and parameters.
      rngs: source of the initial parameters.
      **options: of the variant's `function`; each becomes an attribute of the mixer.

    Attributes:
      paper: authors, year and arXiv id, or where else it was published.
      computes: what the variant does, in one line.
      cost: time in the length n and the variant's own sizes.
      family: the folder of the variant's file; "own" for a class from elsewhere.
      function: the variant's pure function, whose keyword-only arguments are its options; None where there is none.
      projections: those arguments of `function` that a linear layer each makes of the tokens; none in a mixer whose
        function takes the tokens themselves.
      exact: the function of the same arguments that `function` approximates; None where it approximates nothing.
      near_on: families of inputs (`compare.attention.inputs.FAMILIES`) on which the relative error against `exact` is
        below 0.2 where a query meets a quarter of the keys.
      refuses: uses of `function` without a meaning, and a part of the line that says so: "cross" (queries of other
        tokens than the keys), "decode" (one query, the last) and "rows" (decoding gives no row of the causal form).
      windowed: whether a query of the causal form may see a part of its past only.
      can_be_causal: whether `causal=True` has a meaning.
      has_positions: whether there are queries and keys to turn.
      needs_max_len: whether parameters or constants are tied to the length.
      draws: whether `function` draws with its `key`.
      side_by_side: whether `mix` gets the real tokens in front, side by side, and zeros behind them.
    """

    paper: ClassVar[str] = ""
    computes: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    family: ClassVar[str] = "own"
    function: ClassVar[Callable[..., jax.Array] | None] = None
    projections: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[Callable[..., jax.Array] | None] = None
    near_on: ClassVar[tuple[str, ...]] = ()
    refuses: ClassVar[Mapping[str, str]] = {}
    windowed: ClassVar[bool] = False
    can_be_causal: ClassVar[bool] = True
    has_positions: ClassVar[bool] = True
    needs_max_len: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    side_by_side: bool = False

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The options of `function`, which are attributes and declared there."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        own = options(cls.function)
        cls.__signature__ = constructor(cls, own.values())
        package, _, folder = cls.__module__.rpartition(".")[0].rpartition(".")
        cls.family = folder if package == "efficient_tx.attention" else "own"
        if taken := [name for name in own if hasattr(cls, name)]:
            raise TypeError(f"{cls.__name__}.{taken[0]} is an attribute of all mixers: give that option another name")

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        """Options under which a query meets about `budget` keys, landmarks or features; none where that is fixed."""
        return {}

    @staticmethod
    def measured_with(q: jax.Array, budget: int, rng: np.random.Generator) -> dict[str, Any]:
        """Arguments that `function` needs beside its projections and options, to be measured: arrays and constants.

        Args:
          q: the queries of the measurement, `[batch, length, heads, head_dim]`.
          budget: as of `within`.
          rng: to draw arrays from.
        """
        return {}

    def __init__(
        self,
        features: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        linear: Callable[..., nnx.Module] = nnx.Linear,
        dropout: float = 0.0,
        causal: bool = False,
        positions: str | None = None,
        max_len: int | None = None,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ):
        name = type(self).__name__
        check_rate(dropout)
        if positions not in (None, "rope", "rope2d"):
            raise OptionError("positions", positions, "in a mixer it must be None, 'rope' or 'rope2d'")
        if causal and not self.can_be_causal:
            raise ValueError(f"{name} has no causal form: use causal=False, or another mixer")
        if positions and not self.has_positions:
            raise ValueError(f"{name} has no queries and keys to turn: use other positions than {positions!r}")
        if positions == "rope2d" and max_len is not None and math.isqrt(max_len) ** 2 != max_len:
            raise OptionError("max_len", max_len, f"rope2d needs the tokens of a square image, {max_len} is no square")
        if self.needs_max_len and max_len is None:
            raise ValueError(f"{name} has parameters tied to the length: give max_len")
        self.features = features
        self.dropout = dropout
        self.causal = causal
        self.positions = positions
        self.max_len = max_len
        self._keep(options)

    def _keep(self, given: Mapping[str, Any]) -> None:
        """Makes the options attributes, those of `given` and the defaults of the others, when they are checked."""
        known = options(self.function)
        if unknown := [option for option in given if option not in known]:
            has = ", ".join(known) or "none"
            raise TypeError(f"{type(self).__name__} has no argument {unknown[0]!r}: options of its function are {has}")
        values = {name: given.get(name, parameter.default) for name, parameter in known.items()}
        check_options(self.function, values | {"causal": self.causal, "max_len": self.max_len})
        for name, value in values.items():
            setattr(self, name, value)

    def arguments(self, *, mask: jax.Array | None, key: jax.Array | None) -> dict[str, Any]:
        """The keyword arguments of `function` that the mixer has: its options, and what this call brings of others."""
        given = {"mask": mask, "key": key, "causal": self.causal, "max_len": self.max_len}
        taken = given.keys() & inspect.signature(self.function).parameters.keys()
        return {name: getattr(self, name) for name in options(self.function)} | {name: given[name] for name in taken}

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
        """Mixes `x` `[batch, length, features]`.

        Args:
          x: tokens.
          mask: bool `[batch, length]`, True for real tokens; None means all are.
          key: None at evaluation; in training one key per example `[batch]`, or one key, folded per row.

        Returns:
          `[batch, length, features]`, zero at masked positions.

        Raises:
          ValueError: the mask has another shape, or the sequence is longer than `max_len` in a variant tied to it.
        """
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"mask has shape {mask.shape}: a mixer takes [batch, length], here {x.shape[:2]}")
        if self.needs_max_len and x.shape[1] > self.max_len:
            raise ValueError(f"length is {x.shape[1]}, but {type(self).__name__} was built for max_len={self.max_len}")
        if not x.size:
            return x
        keys = example_keys(key, x.shape[0])
        # Whatever stands at padded positions, NaN included, reaches neither an output nor a gradient.
        x = x if mask is None else jnp.where(mask[..., None], x, 0)
        gathered = self.side_by_side and mask is not None
        tokens, real = (compact(x, mask), compact(mask, mask)) if gathered else (x, mask)
        out = self.mix(tokens, mask=real, key=fold(keys, 0))
        out = spread(out, mask) if gathered else out
        out = dropout(out, self.dropout, fold(keys, 1))
        return out if mask is None else jnp.where(mask[..., None], out, 0)

    def mix(self, x: jax.Array, *, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """The variant itself, before dropout and the final masking: `function` of the tokens, where it takes them.

        `x` is `[batch, length, features]`, zero where `mask` is False; `key` is `[batch]` or None (evaluation).
        """
        if self.function is None:
            raise NotImplementedError(f"{type(self).__name__} writes neither `mix` nor a `function` of the tokens")
        return self.function(x, **self.arguments(mask=mask, key=key))

    def state_bytes(self, length: int) -> int:
        """Bytes, in float32, of what a decoder keeps of `length` tokens of one sequence: the tokens themselves.

        Of a variant that cannot decode it is what a query reads in place of the tokens.
        """
        return 4 * length * self.features
