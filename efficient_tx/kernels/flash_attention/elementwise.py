"""Whether a Pallas kernel can compute a score and a mask: elementwise primitives only, and no arrays of their own."""

import functools

import jax
import jax.numpy as jnp

from efficient_tx.kernels.flash_attention import block
from efficient_tx.kernels.flash_attention.mask import Mask
from efficient_tx.kernels.flash_attention.score import Score

# What Mosaic (TPU) and Triton (GPU) compute elementwise; tests/kernels/test_flash_pallas.py lowers all of them.
COMMON = frozenset({
    "abs", "add", "add_any", "and", "broadcast_in_dim", "ceil", "clamp", "convert_element_type", "copy", "cos",
    "custom_jvp_call", "div", "eq", "exp", "exp2", "floor", "ge", "gt", "integer_pow", "jit", "le", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or", "pjit", "pow", "rem",
    "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sin",
    "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
})  # fmt: skip
# The sign, of which // is made, is lowered for the TPU that is there: ahead of time `jax.set_mesh` has to name one.
PRIMITIVES = {"tpu": COMMON | {"round", "sign"}, "cuda": COMMON | {"sign"}}


def reason(score: Score, mask: Mask | None, platform: str) -> str | None:
    """Why a kernel for `platform` cannot compute them, or None."""
    numbers = jax.tree_util.tree_flatten_with_path(score)[0]
    for path, x in numbers:
        if x.ndim != 1:
            name = f"{type(score).__name__}{jax.tree_util.keystr(path)}"
            return f"a kernel takes one number a head of a score, {name} has shape {x.shape[1:]}"
    leaves = tuple(jax.ShapeDtypeStruct((), x.dtype) for _, x in numbers)
    return _reason(jax.tree.structure(score), leaves, None if mask is None else jax.tree.structure(mask), platform)


@functools.lru_cache(maxsize=256)
def _reason(score_tree, leaves, mask_tree, platform):
    # A block of two queries and two keys: shapes do not matter to what is elementwise.
    float_, integer = (functools.partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.float32, jnp.int32))
    rows, columns, both = (2, 1), (1, 2), (2, 2)

    def of_score(leaves, dot, q_norm, k_norm, i, j, head, d_out, number):
        score = jax.tree.unflatten(score_tree, leaves)
        norms = (q_norm, k_norm) if score.needs_norms else (None, None)
        return block.cotangents(score, block.Block(dot, *norms, i, j, head), d_out, number, number)

    positions = integer(rows), integer(columns)
    norms = float_(rows), float_(columns)
    checked = [
        ("score", of_score, (leaves, float_(both), *norms, *positions, integer(()), float_(both), float_(rows))),
    ]
    if mask_tree is not None:
        # What the segments are does not matter, only where they stand.
        mask = jax.tree.unflatten(mask_tree, [0] * mask_tree.num_leaves)
        segments = (jax.tree.map(lambda _, s=s: integer(s), of) for of, s in zip(mask.segments, (rows, columns)))
        checked.append(("mask", mask.allowed, (*positions, *segments)))
    for what, function, arguments in checked:
        jaxpr = jax.make_jaxpr(function)(*arguments)
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
