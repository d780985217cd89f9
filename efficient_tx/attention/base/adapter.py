"""as_attention_fn: a variant as the `attention_fn` of flax's own attention modules."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.mixer import Mixer
from efficient_tx.checks import lookup


def adapt(variants: Mapping[str, type[Mixer]], name: str, **options: Any) -> Callable[..., jax.Array]:
    """`variants[name]` as an `attention_fn`: see `efficient_tx.attention.as_attention_fn`."""
    variant = lookup(variants, name, "attention")
    function = variant.function
    check(variant, name, options)
    known = inspect.signature(function).parameters

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
            arguments["causal"] = True
        if "key" in known and dropout_rng is not None:
            typed = jnp.issubdtype(dropout_rng.dtype, jax.dtypes.prng_key)
            arguments["key"] = dropout_rng if typed else jax.random.wrap_key_data(dropout_rng)
        if dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        return function(query, key, value, mask=mask, **arguments)

    return attention_fn


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
