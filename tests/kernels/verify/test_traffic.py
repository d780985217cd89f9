"""The account of bytes, beside one counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_tx.kernels.verify.traffic import Traffic, traffic


def product(x, w):
    """Grid 3 × 2: rows of x stay while the columns of w change."""

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    return pl.pallas_call(
        kernel, grid=(3, 2), out_shape=jax.ShapeDtypeStruct((24, 256), x.dtype), name="product", interpret=True,
        in_specs=[pl.BlockSpec((8, 16), lambda i, j: (i, 0)), pl.BlockSpec((16, 128), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, j)),
    )(x, w)  # fmt: skip


def test_a_block_is_copied_when_its_index_changes():
    x, w = jnp.zeros((24, 16)), jnp.zeros((16, 256))
    # x once, all of w for each of three rows, the output once; also within jit, and what stands around costs nothing.
    once, again = 4 * (24 * 16 + 16 * 256 + 24 * 256), 4 * 2 * 16 * 256
    (found,) = traffic(jax.jit(lambda x, w: jnp.sin(product(2 * x, w))), x, w)
    assert found == Traffic("product", once + again, once)
    assert found.ratio() == (once + again) / once and found.ratio(least=2 * once) == (once + again) / (2 * once)


def test_indices_from_lists_are_those_of_the_call():
    """Blocks 2, 2, 0 and 1 of a list that the program computes: three copies."""

    def gather(order, x):
        def kernel(order, x, out):
            out[...] = x[...]

        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(4,), out_specs=pl.BlockSpec((8, 128), lambda i, order: (i, 0)),
            in_specs=[pl.BlockSpec((None, 8, 128), lambda i, order: (jnp.minimum(order[i], 2), 0, 0))],
        )  # fmt: skip
        out = jax.ShapeDtypeStruct((32, 128), x.dtype)
        return pl.pallas_call(kernel, grid_spec=spec, out_shape=out, name="gather", interpret=True)(order, x)

    (found,) = traffic(lambda order, x: gather(order + 1, x), jnp.array([1, 9, -1, 0]), jnp.zeros((3, 8, 128)))
    assert found == Traffic("gather", 4 * 8 * 128 * (3 + 4), 4 * 8 * 128 * (3 + 4))


def test_a_grid_that_is_too_large_is_refused():
    call = pl.pallas_call(
        lambda x, out: None, grid=(1 << 23,), out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), interpret=True
    )
    with pytest.raises(ValueError, match="8388608 steps is too large"):
        traffic(call, jnp.zeros((8, 128)))
