"""Profiles of what a model holds: singular values, ranks, leverage scores, Matrix Nuclear-Norm. Nothing is L × L."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.compare.attention.inputs import shared
from efficient_tx.compression.model import kernel_of, linear_layers
from efficient_tx.inspect.captured import Call
from efficient_tx.inspect.errors import SKETCH, exact_of, static
from efficient_tx.numerics.leverage import leverage_scores
from efficient_tx.numerics.rank_measures import matrix_nuclear_norm, residual_errors

# Columns of the sketch of an attention matrix.
SKETCHED = 256


def logits_profile(call: Call) -> list[list[float]] | None:
    """Singular values of Q Kᵀ by head, largest first, each over the root of their sum of squares; mean over examples.

    From QR of Q and of K: those of R_q R_kᵀ. None for a mixer without queries and keys.
    """
    if not {"q", "k"} <= call.arrays.keys():
        return None
    real = np.asarray(call.real)[..., None, None]
    # [batch, heads, length, dim]
    q, k = (np.where(real, np.asarray(call.arrays[name], np.float64), 0).swapaxes(1, 2) for name in "qk")
    r_q, r_k = (np.linalg.qr(x, mode="r") for x in (q, k))
    values = np.linalg.svd(r_q @ r_k.swapaxes(-1, -2), compute_uv=False)
    norms = np.sqrt((values**2).sum(-1, keepdims=True))
    return (values / np.where(norms > 0, norms, 1)).mean(0).tolist()


def weight_profiles(model: nnx.Module) -> dict[str, list[float]]:
    """Singular values of every linear layer by its name, largest first."""
    return {layer.name: np.linalg.svd(kernel_of(layer.module), compute_uv=False).tolist() for layer in
            linear_layers(model)}  # fmt: skip


def rank_within(values: Sequence[float], target: float) -> int:
    """The smallest k whose first k singular values leave at most `target` of the Frobenius norm."""
    squares = np.asarray(values) ** 2
    left = np.sqrt(
        np.maximum(squares.sum() - np.concatenate([[0], np.cumsum(squares)]), 0) / max(squares.sum(), 1e-300)
    )
    return int(np.argmax(left <= target + 1e-7))


def leverage_profile(call: Call) -> dict[str, Any] | None:
    """The share of the keys' leverage scores that the 1, 2, 4, ... keys of the highest scores have, by head.

    Returns:
      {"keys": [1, 2, ...], "share": one list for each head}, means over examples; None for a mixer without keys.
    """
    if "k" not in call.arrays:
        return None
    keys = call.arrays["k"].swapaxes(1, 2)
    scores = np.asarray(leverage_scores(keys, mask=call.real[:, None]), np.float64)
    shares = np.cumsum(-np.sort(-scores, axis=-1), axis=-1)
    shares = (shares / np.maximum(shares[..., -1:], 1e-300)).mean(0)
    counts = [2**i for i in range(keys.shape[2].bit_length())]
    return {"keys": counts, "share": [[float(head[n - 1]) for n in counts] for head in shares]}


def nuclear_norms(states: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Matrix Nuclear-Norm of the real tokens of all examples after each block, over their number."""
    return {name: float(matrix_nuclear_norm(jnp.asarray(x, jnp.float32))) / len(x) for name, x in states.items()}


def least_ranks(call: Call, targets: Sequence[float]) -> dict[float, list[int | None]] | None:
    """The rank that any low-rank attention needs to be within each target of the exact matrix A, by head.

    The smallest k with ‖A − A_k‖_F ≤ target ‖A‖_F, means over examples, from a sketch of A that its products with
    `SKETCHED` vectors give. Estimates are for k up to a `SKETCH`-th of these: there they are at most a third too high,
    and too low where the singular values decay slowly (`residual_errors`). None: more than that.
    """
    exact = exact_of(call)
    if exact is None or not {"q", "k", "v"} <= call.arrays.keys():
        return None
    batch, length, heads = call.arrays["q"].shape[:3]
    size = min(SKETCHED, length)
    others = shared(exact, {name: array for name, array in call.arrays.items() if name not in ("q", "k", "v", "mask")})
    if others:
        return None
    options = dict(static(exact, call))

    @jax.jit
    def curves(q, k, real):
        def one(given):
            q, k, real, key = given

            def times(x):
                out = exact(q[None, :, None], k[None, :, None], x[None, :, None], mask=real[None], **options)[0, :, 0]
                return jnp.where(real[:, None], out, 0)

            return residual_errors(times, (length, length), size, key=key)

        flat = [x.swapaxes(1, 2).reshape(-1, length, x.shape[-1]).astype(jnp.float32) for x in (q, k)]
        keys = jax.random.split(jax.random.key(0), batch * heads)
        return jax.lax.map(one, (*flat, jnp.repeat(real, heads, axis=0), keys)).reshape(batch, heads, size)

    found = np.asarray(curves(call.arrays["q"], call.arrays["k"], call.real), np.float64)[..., : size // SKETCH + 1]
    left = (found / np.maximum(found[..., :1], 1e-300)).mean(0)
    return {target: [first_within(head, target) for head in left] for target in targets}


def first_within(curve: np.ndarray, target: float) -> int | None:
    """The first place of a curve that is at most the target, or None."""
    return int(np.argmax(curve <= target)) if (curve <= target).any() else None
