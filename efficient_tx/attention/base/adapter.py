"""as_attention_fn: a variant as the `attention_fn` of flax's own attention modules."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention.base.mixer import Mixer
from efficient_tx.checks import lookup
from efficient_tx.tokens.mask import zeros_and_ones

# What a sampling variant's keys come from: a function that gives one at each call, or None for the evaluation key.
KeySource = Callable[[], jax.Array | None] | nnx.Rngs | nnx.RngStream


def adapt(
    variants: Mapping[str, type[Mixer]], name: str, key: KeySource | None, options: Mapping[str, Any]
) -> Callable[..., jax.Array]:
    """`variants[name]` as an `attention_fn`: see `efficient_tx.attention.as_attention_fn`."""
    variant = lookup(variants, name, "attention")
    function = variant.function
    check(variant, name, options)
    known = inspect.signature(function).parameters
    stream = key if isinstance(key, (nnx.Rngs, nnx.RngStream)) else None
    draw = None if stream is not None else key
    never_redrawn = variant.draws and key is None

    # All arguments are named: flax.linen passes only those in the signature, flax.nnx passes all of them by keyword.
    def attention_fn(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        dtype: jnp.dtype | None = None,
        precision: jax.lax.PrecisionLike = None,
        module: object = None,
        is_causal: bool = False,
    ) -> jax.Array:
        del broadcast_dropout, deterministic, precision
        if query.ndim != 4:
            raise ValueError(f"query has shape {query.shape}: {name} takes one batch axis, [B, L, heads, head_dim]")
        if module is not None:
            raise ValueError(f"{name} has no attention weights to show: set sow_weights=False")
        if bias is not None:
            raise ValueError(f"{name} takes no bias: leave it None")
        if dropout_rate > 0:
            raise ValueError(f"{name} has no attention dropout: set dropout_rate=0 and drop the output instead")
        arguments = dict(options)
        if is_causal:
            if "causal" not in known:
                raise ValueError(f"{name} has no causal form: set is_causal=False, or choose another variant")
            check_alignment(name, query.shape[1], key.shape[1])
            arguments["causal"] = True
        if dropout_rng is None and draw is not None:
            dropout_rng = draw()
        if dropout_rng is not None and "key" in known:
            typed = jnp.issubdtype(dropout_rng.dtype, jax.dtypes.prng_key)
            arguments["key"] = dropout_rng if typed else jax.random.wrap_key_data(dropout_rng)
        elif dropout_rng is None and never_redrawn:
            value = warned_of_in_training(value, name)
        if dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        mask, meant = read_mask(mask, name)
        out = function(query, key, value, mask=mask, **arguments)
        return out if meant is None else jnp.where(meant, out, jnp.nan)

    return attention_fn if stream is None else Drawing(attention_fn, stream)


class Drawing(nnx.Module):
    """An `attention_fn` with an nnx stream of keys, a part of the module that holds it, as in `nnx.Dropout`.

    Attributes:
      stream: forked from the given one, so that two layers do not draw the same.
      deterministic: whether to leave the stream alone and use the fixed evaluation key; `eval()` and `train()` of the
        model set it.
    """

    def __init__(self, attention_fn: Callable[..., jax.Array], stream: nnx.Rngs | nnx.RngStream):
        self.attention_fn = attention_fn
        self.stream = stream.fork()
        self.deterministic = False

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, *, dropout_rng: jax.Array | None = None, **others: Any
    ) -> jax.Array:
        if dropout_rng is None and not self.deterministic:
            dropout_rng = self.stream()
        return self.attention_fn(query, key, value, dropout_rng=dropout_rng, **others)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Called by `nnx.view`."""
        self.deterministic = self.deterministic if deterministic is None else deterministic


def warned_of_in_training(x: jax.Array, name: str) -> jax.Array:
    """`x`, with a warning when it is differentiated: once for each program that is traced."""

    @jax.custom_jvp
    def mark(x):
        return x

    @mark.defjvp
    def _(primals, tangents):
        warnings.warn(
            f"{name} is trained on what one fixed key draws, the same at every step: give as_attention_fn({name!r}, "
            "key=...) an nnx stream, or a function that returns a key",
            stacklevel=2,
        )
        return primals[0], tangents[0]

    return mark(x)


def check_alignment(name: str, queries: int, keys: int) -> None:
    """Raises ValueError, one line, unless both meanings of a causal call of so many queries and keys are one."""
    if queries not in (1, keys):
        raise ValueError(
            f"{name} has {queries} queries and {keys} keys: our functions align the last query with the last key, "
            "flax's and jax's the first with the first; pass a mask instead of is_causal, or call the function"
        )


def read_mask(mask: jax.Array | None, name: str) -> tuple[jax.Array | None, jax.Array | None]:
    """flax's mask, whose default dtype is float32, as bool; and, if its values are traced, whether all are 0 or 1.

    Raises:
      ValueError: a value is neither.
    """
    if mask is None or not jnp.issubdtype(mask.dtype, jnp.floating):
        return mask, None
    if not zeros_and_ones(mask):
        raise ValueError(
            f"mask has values besides 0.0 and 1.0: {name} adds no mask to logits; pass dtype=bool, True for real tokens"
        )
    meant = jnp.all((mask == 0) | (mask == 1)) if isinstance(mask, jax.core.Tracer) else None
    return mask != 0, meant


def check(variant: type[Mixer], name: str, options: Mapping[str, object]) -> None:
    """Raises ValueError, one line, unless q, k, v and `options` are exactly the arguments that the variant needs."""
    if variant.function is None:
        raise ValueError(f"{name} is no function of queries, keys and values: use the module {variant.__name__}")
    known = inspect.signature(variant.function).parameters
    tokens = [argument for argument in known if known[argument].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if tokens != ["q", "k", "v"]:
        raise ValueError(
            f"{name} is a function of {' and '.join(tokens)}, but flax's modules project q, k and v apart: "
            f"use the module {variant.__name__}"
        )
    choices = [option for option in known if option not in ("q", "k", "v", "mask", "key", "causal")]
    projected = [option for option in choices if option in getattr(variant, "projections", ())]
    if projected:
        raise ValueError(
            f"{name} takes {' and '.join(projected)} of every token too, which flax's modules do not project: "
            f"use the module {variant.__name__}"
        )
    unknown = set(options) - set(choices)
    if unknown:
        raise ValueError(f"{name} has no option {min(unknown)!r}: it has {', '.join(choices) or 'none'}")
    missing = [
        option for option in choices if known[option].default is inspect.Parameter.empty and option not in options
    ]
    if missing:
        raise ValueError(f"{name} has parameters of its own ({', '.join(missing)}): pass them as options")
