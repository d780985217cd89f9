"""Whether a Pallas kernel can compute a score and a mask: elementwise primitives only, and no arrays of their own."""

import functools

import jax
import jax.numpy as jnp

from efficient_tx.kernels.flash_attention.mask import Mask
from efficient_tx.kernels.flash_attention.score import Score

# What Mosaic (TPU) and Triton (GPU) compute elementwise; tests/kernels/test_ahead_of_time.py compiles each.
COMMON = frozenset({
    "abs", "add", "add_any", "and", "broadcast_in_dim", "ceil", "clamp", "convert_element_type", "copy", "cos",
    "custom_jvp_call", "div", "eq", "exp", "exp2", "floor", "ge", "gt", "integer_pow", "jit", "le", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pjit", "pow", "rem", "round", "rsqrt",
    "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor",
})  # fmt: skip
PRIMITIVES = {"tpu": COMMON, "cuda": COMMON}


def reason(score: Score, mask: Mask | None, platform: str) -> str | None:
    """Why a kernel for `platform` cannot compute them, or None."""
    numbers = jax.tree_util.tree_flatten_with_path(score)[0]
    for path, x in numbers:
        if x.ndim != 1:
            name = f"{type(score).__name__}{jax.tree_util.keystr(path)}"
            return f"a kernel takes one number a head of a score, {name} has shape {x.shape[1:]}"
    leaves = tuple(jax.ShapeDtypeStruct((), x.dtype) for _, x in numbers)
    # The segments' shapes do not matter, nor do those of a mask's arrays.
    segments = None if mask is None else jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.int32), mask.segments)
    shape = None if mask is None else jax.tree.structure(mask)
    return _reason(jax.tree.structure(score), leaves, shape, segments and _Tree.of(segments), platform)


class _Tree(tuple):
    """Leaves and structure of a tree, hashable."""

    @classmethod
    def of(cls, tree):
        leaves, structure = jax.tree.flatten(tree)
        return cls((tuple(leaves), structure))


@functools.lru_cache(maxsize=256)
def _reason(score_tree, leaves, mask_tree, segments, platform):
    number, integer = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)

    def derivatives(leaves, dot, q_norm, k_norm, i, j, head):
        def weights(leaves, dot, q_norm, k_norm):
            score = jax.tree.unflatten(score_tree, leaves)
            norms = (q_norm, k_norm) if score.needs_norms else (None, None)
            logits = score.logits(dot, *norms, i, j, head)
            return logits if score.normalise == "softmax" else score.weights(logits)

        floating = [x if jnp.issubdtype(x.dtype, jnp.floating) else None for x in leaves]
        values, pull = jax.vjp(
            lambda floating, *others: weights([y if x is None else x for x, y in zip(floating, leaves)], *others),
            floating, dot, q_norm, k_norm,
        )  # fmt: skip
        return pull(values)

    checked = [("score", jax.make_jaxpr(derivatives)(leaves, number, number, number, integer, integer, integer))]
    if mask_tree is not None:
        mask = jax.tree.unflatten(mask_tree, [None] * mask_tree.num_leaves)
        segments = jax.tree.unflatten(segments[1], segments[0])
        checked.append(("mask", jax.make_jaxpr(mask.allowed)(integer, integer, *segments)))
    for what, jaxpr in checked:
        if any(jnp.ndim(x) for x in jaxpr.consts):
            return f"the {what} holds an array that is no field of it, which a kernel does not see"
        if unknown := sorted(_primitives(jaxpr.jaxpr) - PRIMITIVES[platform]):
            return f"the {what} needs {', '.join(unknown)}, which a kernel cannot compute"
    return None


def _primitives(jaxpr):
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= _primitives(inner)
    return found
