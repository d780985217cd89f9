"""Attention rows: which tokens a query reads, for any mixer that is linear in its values, without an L × L matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.compare.attention.inputs import shared
from efficient_tx.inspect.captured import Call
from efficient_tx.inspect.errors import static

# Queries whose rows are told.
QUERIES = 4
# Tokens that are named.
TOP = 8


def attention_rows(call: Call) -> dict[str, Any] | None:
    """The weights of the first example: of a few queries, and the mean over all queries.

    The output is Σ_j w_ij v_j, so the gradient of its channel 0 at query i by channel 0 of the values is the row w_i:
    one backward pass each, in the memory of the mixer's own.

    Returns:
      {"queries": their positions, "rows": [queries][heads][tokens], "received": [heads][tokens], "top": for each head
      the positions of the most read tokens, first the most read}; None for a mixer without values, or with several.
    """
    if "v" not in call.arrays or any(name.startswith("v") for name in call.arrays.keys() - {"v"}):
        return None
    function = call.variant.function
    arrays = {name: x[:1] if x.shape[0] == len(call.real) else x for name, x in call.arrays.items()}
    values, options = arrays.pop("v"), dict(static(function, call))
    real = np.asarray(call.real[0])
    places = np.flatnonzero(real)
    queries = sorted({int(places[i]) for i in np.linspace(0, len(places) - 1, QUERIES).astype(int)})
    seeds = np.stack([real / max(len(places), 1), *(np.arange(len(real)) == i for i in queries)]).astype(np.float32)

    @jax.jit
    def weights(arrays, values, seeds):
        out, pull = jax.vjp(lambda v: function(**shared(function, {**arrays, "v": v}), **options), values)

        def row(seed):
            return pull(jnp.zeros_like(out).at[0, :, :, 0].set(seed[:, None].astype(out.dtype)))[0][0, :, :, 0].T

        return jax.lax.map(row, seeds)

    received, *rows = np.asarray(weights(arrays, values, seeds), np.float64)
    top = np.argsort(-np.where(real, np.abs(received), -1), axis=-1, kind="stable")[:, : min(TOP, len(places))]
    return {
        "queries": queries,
        "rows": [row.tolist() for row in rows],
        "received": received.tolist(),
        "top": top.tolist(),
    }
