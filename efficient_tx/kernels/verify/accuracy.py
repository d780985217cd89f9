"""How far a kernel is from its formula in float64, forward and backward, and whether its programs race."""

import contextlib
import io
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from efficient_tx.kernels.case import Case


def exact(case: Case, seed: int) -> Any:
    """Outputs and cotangents of the plain formula in float64, on the host."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        arrays = case.drawn(seed)
        outputs = jax.eval_shape(lambda *arrays: case.function(*arrays, implementation="reference"), *arrays)
        result = jax.jit(case.gradient(implementation="reference"))(arrays, cotangents(outputs, seed))
        return jax.tree.map(np.asarray, result)


def computed(case: Case, seed: int, **keywords: Any) -> Any:
    """The same by an implementation, in the case's own dtypes."""
    arrays = tuple(x.astype(like.dtype) for x, like in zip(case.drawn(seed), case.arrays))
    return jax.jit(case.gradient(**keywords))(arrays, cotangents(case.outputs(), seed))


def cotangents(outputs: Any, seed: int) -> Any:
    """Standard normal, of values that bfloat16 has: the same for every dtype."""
    r = np.random.default_rng(seed + 1)
    bfloat16 = jax.numpy.bfloat16.dtype
    return jax.tree.map(lambda x: r.normal(size=x.shape).astype(bfloat16).astype(x.dtype), outputs)


def errors(case: Case, seed: int, **keywords: Any) -> dict[str, float]:
    """The largest error of an entry of "forward" and "gradient", as a share of the largest entry of its array.

    Args:
      case: of sizes for which the plain formula fits in memory.
      seed: of the arrays.
      **keywords: which implementation, and how.
    """
    found = computed(case, seed, **keywords), exact(case, seed)
    pairs = zip(("forward", "gradient"), *found)
    return {which: max(map(error, jax.tree.leaves(ours), jax.tree.leaves(theirs))) for which, ours, theirs in pairs}


# The largest error of an entry, as a share of the largest entry: float32 rounds 2⁻²⁴ and sums of thousands add up;
# bfloat16 rounds 2⁻⁹, at every intermediate result that an operation has.
MOST_ERROR = {"float32": 1e-4, "bfloat16": 4e-2}


def most(case: Case) -> float:
    """The largest error that is one of rounding: that of its narrowest floating dtype."""
    names = {x.dtype.name for x in case.arrays if jax.numpy.issubdtype(x.dtype, np.inexact)}
    return MOST_ERROR["float32" if names <= {"float32", "float64"} else "bfloat16"]


def error(ours: jax.Array, exact: np.ndarray) -> float:
    """Infinite where one is not finite and the other is. Where the formula is 0 everywhere, the error itself."""
    ours = np.asarray(ours, np.float64)
    finite = np.isfinite(exact)
    if not np.array_equal(ours[~finite], exact[~finite], equal_nan=True) or not np.isfinite(ours[finite]).all():
        return float("inf")
    ours, exact = ours[finite], exact[finite]
    return float(np.abs(ours - exact).max(initial=0) / (np.abs(exact).max(initial=0) or 1.0))


def races(case: Case, seed: int) -> int:
    """The number of races that the TPU interpreter reports of the TPU kernels, run on two cores.

    jax 0.10 prints them all, 0.12 raises at the first one.
    """
    words = io.StringIO()
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    try:
        with contextlib.redirect_stdout(words):
            jax.block_until_ready(computed(case, seed, implementation="pallas_tpu", interpret=interpret))
    except Exception as error:
        pltpu.reset_tpu_interpret_mode_state()
        if RACE not in str(error):
            raise
        return 1
    return words.getvalue().count(RACE)


RACE = "RACE DETECTED"
