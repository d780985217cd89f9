"""Mixer: the base class and interface of every token mixer."""

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.attention.base.options import check_options, options
from efficient_tx.checks import OptionError, at_least
from efficient_tx.numerics.random import check_rate, dropout, example_keys, fold
from efficient_tx.signatures import constructor
from efficient_tx.tokens.mask import bool_mask, compact, spread


class Mixer(nnx.Module):
    """Mixes the tokens of a sequence: the branch of a residual block that connects tokens.

    A subclass implements `mix` and declares what it supports; the constructor raises ValueError for other requests.
    Modules hold only parameters.

    Args:
      features: width of the input and output tokens.
      heads: number of heads. Mixers without heads accept `heads`, `head_dim`, `linear`, `dtype` and `rngs` as well and
        ignore them.
      head_dim: width of a head.
      linear: factory of the linear layers, with the signature of `nnx.Linear`.
      dropout: dropout rate on the mixer's output.
      causal: whether token i depends on tokens j ≤ i only.
      positions: rotary positions of queries and keys: None, "rope" or "rope2d".
      max_len: the largest sequence length; required by variants with parameters tied to the length.
      dtype: dtype of the computation; None means the promoted dtype of tokens and parameters.
      rngs: source of the initial parameters.
      **options: options of the variant's `function`; each becomes an attribute of the mixer.

    Attributes:
      paper: authors, year and arXiv id, or another place of publication.
      computes: the variant's computation, in one line.
      cost: time as a function of the length n and the variant's own sizes.
      family: the folder of the variant's file; "own" for a class from elsewhere.
      function: the variant's pure function, whose keyword-only arguments are its options; None if there is none.
      projections: the arguments of `function` that are linear projections of the tokens, one layer each; empty if the
        function takes the tokens themselves.
      exact: the function, with the same arguments, that `function` approximates; None if it approximates nothing.
      chosen: the function, with arguments of `function`, of what stands for all queries or keys at evaluation: some of
        them or means of some, `[batch, count, heads, head_dim]`, zero where there are fewer. Its derivative by the
        projections tells which tokens are in them. None: nothing is chosen, or another choice for each query.
      near_on: families of inputs (`compare.attention.inputs.FAMILIES`) on which the relative error against `exact` is
        below 0.2 with a budget of a quarter of the keys.
      refuses: uses that `function` does not support -> a part of the error message. Keys: "cross" (queries from other
        tokens than the keys), "decode" (one query, the last) and "rows" (decoding does not give a row of the causal
        form).
      can_decode: whether a causal mixer has `init_state`, `step` and `prefill`; default: whether the class writes
        `advance` and `refuses` has no "rows".
      windowed: whether a query of the causal form may see only a part of its past.
      can_be_causal: whether `causal=True` is supported; default: whether `function` has the argument `causal`.
      has_positions: whether the mixer has queries and keys that can be rotated by their positions.
      needs_max_len: whether parameters or constants are tied to the length.
      draws: whether `function` samples with its `key`.
      formerly: option -> its value in a run that was stored before this was an option (`config.stored`).
      one_by_one: why an accelerator's program nevertheless has a loop over heads, examples or tokens; empty: it has
        none (`kernels.verify`).
      side_by_side: whether `mix` gets the real tokens first, without gaps, and then zeros.
    """

    paper: ClassVar[str] = ""
    computes: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    family: ClassVar[str] = "own"
    function: ClassVar[Callable[..., jax.Array] | None] = None
    projections: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[Callable[..., jax.Array] | None] = None
    chosen: ClassVar[Callable[..., jax.Array] | None] = None
    near_on: ClassVar[tuple[str, ...]] = ()
    refuses: ClassVar[Mapping[str, str]] = {}
    windowed: ClassVar[bool] = False
    can_be_causal: ClassVar[bool] = True
    can_decode: ClassVar[bool] = False
    has_positions: ClassVar[bool] = True
    needs_max_len: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    formerly: ClassVar[Mapping[str, Any]] = {}
    one_by_one: ClassVar[str] = ""
    side_by_side: bool = False

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Declares the options of `function`, which are attributes, to type checkers."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "function" in vars(cls) and cls.function is not None:
            cls._adopt(cls.function)
        if "can_decode" not in vars(cls):
            cls.can_decode = cls.can_be_causal and cls.advance is not Mixer.advance and "rows" not in cls.refuses
        own = options(cls.function)
        cls.__signature__ = constructor(cls, own.values())
        package, _, folder = cls.__module__.rpartition(".")[0].rpartition(".")
        cls.family = folder if package == "efficient_tx.attention" else "own"
        if taken := [name for name in own if hasattr(cls, name)]:
            raise TypeError(f"{cls.__name__}.{taken[0]} is an attribute of all mixers: give that option another name")

    @classmethod
    def _adopt(cls, function: Callable[..., jax.Array]) -> None:
        """Makes `function` a static method, and sets `can_be_causal` from its arguments unless the class sets it.

        Raises:
          TypeError: the function has no argument `mask`, so it would see the padding.
        """
        parameters = inspect.signature(function).parameters
        if "mask" not in parameters:
            raise TypeError(f"{cls.__name__}.function takes no argument `mask`: it would see the padding")
        cls.function = staticmethod(function)
        if "can_be_causal" not in vars(cls):
            cls.can_be_causal = "causal" in parameters

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        """Options with which a query uses about `budget` keys, landmarks or features; empty if that number is fixed."""
        return {}

    @staticmethod
    def measured_with(q: jax.Array, budget: int, rng: np.random.Generator) -> dict[str, Any]:
        """Arrays and constants that `function` needs in a measurement, besides projections and options.

        Args:
          q: queries of the measurement, `[batch, length, heads, head_dim]`.
          budget: number of keys, landmarks or features per query, as in `within`.
          rng: generator for random arrays.
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
        """Checks the options and stores them as attributes: those in `given` and the defaults of the others."""
        known = options(self.function)
        if unknown := [option for option in given if option not in known]:
            has = ", ".join(known) or "none"
            raise TypeError(f"{type(self).__name__} has no argument {unknown[0]!r}: options of its function are {has}")
        values = {name: given.get(name, parameter.default) for name, parameter in known.items()}
        check_options(self.function, values | {"causal": self.causal, "max_len": self.max_len})
        for name, value in values.items():
            setattr(self, name, value)

    def arguments(self, *, mask: jax.Array | None, key: jax.Array | None) -> dict[str, Any]:
        """The keyword arguments of `function`: the mixer's options, and of mask, key etc. those that it takes."""
        given = {"mask": mask, "key": key, "causal": self.causal, "max_len": self.max_len}
        taken = given.keys() & inspect.signature(self.function).parameters.keys()
        return {name: getattr(self, name) for name in options(self.function)} | {name: given[name] for name in taken}

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
        """Mixes `x` `[batch, length, features]`.

        Args:
          x: tokens.
          mask: bool `[batch, length]`, True for real tokens; None means all are.
          key: None at evaluation; in training one key per example `[batch]`, or a single key, folded per example.

        Returns:
          `[batch, length, features]`, zero at masked positions.

        Raises:
          ValueError: x or the mask has another shape, the mask is none (see `bool_mask`), or the sequence is longer
            than `max_len` in a variant that needs it.
        """
        mask = self._checked(x, mask)
        if not x.size:
            return x
        keys = example_keys(key, x.shape[0])
        # Values at padded positions, NaN included, reach neither an output nor a gradient.
        x = x if mask is None else jnp.where(mask[..., None], x, 0)
        gathered = self.side_by_side and mask is not None
        tokens, real = (compact(x, mask), compact(mask, mask)) if gathered else (x, mask)
        out = self.mix(tokens, mask=real, key=fold(keys, 0))
        if out.shape != x.shape:
            raise ValueError(f"{type(self).__name__}.mix gave the shape {out.shape}: the tokens have {x.shape}")
        out = spread(out, mask) if gathered else out
        out = dropout(out, self.dropout, fold(keys, 1))
        return out if mask is None else jnp.where(mask[..., None], out, 0)

    def _checked(self, x: jax.Array, mask: jax.Array | None) -> jax.Array | None:
        """The mask of the tokens `x` as bool `[batch, length]` or None, after checks of both shapes and the length."""
        if x.ndim != 3 or x.shape[2] != self.features:
            wanted = f"{type(self).__name__} takes [batch, length, features] with {self.features} features"
            raise ValueError(f"x has shape {x.shape}: {wanted}")
        mask = bool_mask(mask)
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"mask has shape {mask.shape}: a mixer takes [batch, length], here {x.shape[:2]}")
        self._check_length(x.shape[1])
        return mask

    def _check_length(self, length: int) -> None:
        if self.needs_max_len and length > self.max_len:
            raise ValueError(f"length is {length}, but {type(self).__name__} was built for max_len={self.max_len}")

    def mix(self, x: jax.Array, *, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """The variant itself, before dropout and the final mask. By default: `function` of the tokens.

        `x` is `[batch, length, features]`, zero where `mask` is False; `key` is `[batch]` or None (evaluation).
        """
        if self.function is None:
            raise NotImplementedError(f"{type(self).__name__} writes neither `mix` nor a `function` of the tokens")
        return self.function(x, **self.arguments(mask=mask, key=key))

    def state_bytes(self, length: int) -> int:
        """Bytes, in float32, of a decoder's state after `length` tokens of one sequence. By default: all tokens.

        For a variant that cannot decode: the bytes that a query reads instead of the tokens.
        """
        return 4 * length * self.features

    def init_state(self, batch: int, *, max_len: int | None = None, dtype: jnp.dtype | None = None) -> Any:
        """The state before the first token of `batch` sequences: a tree of arrays with a leading batch axis.

        Args:
          batch: number of sequences.
          max_len: largest number of tokens, where the state grows with them; None means that of the mixer.
          dtype: of stored tokens; None means the mixer's, or float32. Sums and recurrent states are float32 at least.

        Raises:
          ValueError: the mixer cannot decode, with the reason; its state grows and there is no `max_len`; or `max_len`
            is no integer of at least 1, or above that of a mixer with parameters or constants tied to it.
        """
        if reason := self.not_decoding():
            raise ValueError(f"{type(self).__name__} cannot decode: {reason}")
        if max_len is not None and not isinstance(max_len, Integral):
            raise OptionError("max_len", max_len, "it is a number of tokens, an integer")
        at_least(1, max_len=max_len)
        self._check_length(0 if max_len is None else max_len)
        return self.empty(batch, self.max_len if max_len is None else max_len, dtype)

    def step(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """The next token of each sequence, at evaluation: its row of the causal forward pass.

        Args:
          x: `[batch, features]`.
          state: the state after the tokens before, from `init_state`, `prefill` or the last step.

        Returns:
          `[batch, features]`, NaN for a token for which the state has no room, and the next state.
        """
        if x.ndim != 2 or x.shape[1] != self.features:
            wanted = f"a step of {type(self).__name__} takes [batch, features] with {self.features} features"
            raise ValueError(f"x has shape {x.shape}: {wanted}")
        self._check_batch(x, state)
        out, state = self.advance(x[:, None], state, mask=None, first=False)
        return out[:, 0], state

    def prefill(
        self, x: jax.Array, *, mask: jax.Array | None = None, state: Any = None, max_len: int | None = None
    ) -> tuple[jax.Array, Any]:
        """Several tokens of each sequence at once, at evaluation: their rows of the causal forward pass.

        Args:
          x: `[batch, length, features]`.
          mask: bool `[batch, length]`, True for real tokens; the others leave the state as it is.
          state: the state after the tokens before; None: these are the first.
          max_len: as in `init_state`, for a state that is made here.

        Returns:
          `[batch, length, features]`, zero at masked positions and NaN where the state has no room, and the next state.
        """
        mask, first = self._checked(x, mask), state is None
        if first:
            # As wide as the computation; no narrower than float32 unless the mixer is.
            dtype = getattr(self, "dtype", None) or jnp.promote_types(x.dtype, jnp.float32)
            state = self.init_state(len(x), max_len=max_len, dtype=dtype)
        else:
            self._check_batch(x, state)
        if not x.size:
            return x, state
        tokens = compact(x, mask)
        out, state = self.advance(tokens, state, mask=None if mask is None else compact(mask, mask), first=first)
        return spread(out, mask), state

    def _check_batch(self, x: jax.Array, state: Any) -> None:
        """Raises ValueError, one line, for a state of another number of sequences than `x` has."""
        for leaf in jax.tree.leaves(state)[:1]:
            if len(leaf) != len(x):
                raise ValueError(
                    f"x has shape {x.shape}, and the state is of {len(leaf)} sequences: give one of {len(x)}"
                )

    def not_decoding(self) -> str | None:
        """Why this mixer cannot decode, or None."""
        if not self.can_be_causal:
            return "it has no causal form"
        if "rows" in self.refuses:
            return self.refuses["rows"]
        if not self.can_decode:
            return "it has no form that takes token after token"
        if not self.causal:
            return "it is not causal, build it with causal=True"
        if self.positions == "rope2d":
            return "positions='rope2d' depend on the number of tokens, use 'rope'"
        return None

    def empty(self, batch: int, max_len: int | None, dtype: jnp.dtype | None) -> Any:
        """The state of `init_state`, of a class that has `advance`."""
        raise NotImplementedError(f"{type(self).__name__} writes no `empty`")

    def advance(self, x: jax.Array, state: Any, *, mask: jax.Array | None, first: bool) -> tuple[jax.Array, Any]:
        """The tokens `x` `[batch, length, features]` after those of the state, at evaluation.

        Args:
          x: tokens, the real ones first.
          state: the state before them.
          mask: bool `[batch, length]`, or None: all are real.
          first: whether the state is empty.

        Returns:
          `[batch, length, features]`, anything at other than real tokens, and the next state.
        """
        raise NotImplementedError(f"{type(self).__name__} writes no `advance`")
