"""Attention rows: which tokens a query reads, for any mixer that is linear in its values, without an L × L matrix.

And the tokens that a mixer chooses for all queries or keys, by the derivative of what it puts in their place.
"""

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
    """The weights of the longest sequence: of a few queries, and the mean over all queries.

    The output is Σ_j w_ij v_j, so the gradient of its channel 0 at query i by channel 0 of the values is the row w_i:
    one backward pass each, in the memory of the mixer's own.

    Returns:
      All tokens are the real ones, numbered from 0. {"sequence": its row in the batch, "queries": their positions,
      "rows": [queries][heads][tokens], "received": [heads][tokens], "top": for each head the positions of the most read
      tokens, first the most read, "chosen": as `chosen_tokens`}; None for a mixer without values, or with several.
    """
    if "v" not in call.arrays or any(name.startswith("v") for name in call.arrays.keys() - {"v"}):
        return None
    function, options = call.variant.function, dict(static(call.variant.function, call))
    arrays = dict(call.arrays)
    values = arrays.pop("v")
    real = np.asarray(call.real)
    sequence = int(real.sum(1).argmax())
    places = np.flatnonzero(real[sequence])
    queries = sorted({int(i) for i in np.linspace(0, len(places) - 1, QUERIES).astype(int)} if len(places) else ())
    means = real[sequence] / max(len(places), 1)
    seeds = np.stack([means, *(np.arange(len(means)) == places[i] for i in queries)]).astype(np.float32)

    @jax.jit
    def weights(arrays, values, seeds):
        out, pull = jax.vjp(lambda v: function(**shared(function, {**arrays, "v": v}), **options), values)

        def row(seed):
            cotangent = jnp.zeros_like(out).at[sequence, :, :, 0].set(seed[:, None].astype(out.dtype))
            return pull(cotangent)[0][sequence, :, :, 0].T

        return jax.lax.map(row, seeds)

    received, *rows = np.asarray(weights(arrays, values, seeds), np.float64)[..., places]
    top = np.argsort(-np.abs(received), axis=-1, kind="stable")[:, :TOP]
    return {
        "sequence": sequence,
        "queries": queries,
        "rows": [row.tolist() for row in rows],
        "received": received.tolist(),
        "top": top.tolist(),
        "chosen": chosen_tokens(call, sequence, places),
    }


def chosen_tokens(call: Call, sequence: int, places: np.ndarray) -> dict[str, list[list[list[int]]]]:
    """What a mixer chooses in one sequence, at evaluation.

    Args:
      call: one of a mixer.
      sequence: its row in the batch.
      places: where its real tokens are.

    Returns:
      Projection ("q", "k") -> by head, for each landmark or key that comes from it, the numbers of its tokens among the
      real ones: a single one, or those of a mean. Empty if the mixer chooses nothing for all queries.
    """
    function = call.variant.chosen
    if function is None:
        return {}
    given, options = shared(function, call.arrays), dict(static(function, call))
    of = {name: given.pop(name) for name in call.variant.projections if name in given}

    @jax.jit
    def parts(of, given):
        out, pull = jax.vjp(lambda of: function(**of, **given, **options), of)

        def one(seed):
            (by,) = pull(jnp.zeros_like(out).at[sequence, :, :, 0].set(seed[:, None]))
            return {name: x[sequence, :, :, 0] != 0 for name, x in by.items()}

        return jax.lax.map(one, jnp.eye(out.shape[1], dtype=out.dtype))

    # [landmarks, tokens, heads]
    within = {name: np.asarray(x)[:, places] for name, x in parts(of, given).items()}
    found = {
        name: [[np.flatnonzero(token).tolist() for token in head if token.any()] for head in x.transpose(2, 0, 1)]
        for name, x in ((name, within[name]) for name in of)
    }
    return {name: heads for name, heads in found.items() if any(heads)}
