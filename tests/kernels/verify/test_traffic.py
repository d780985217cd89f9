"""The account of bytes, beside one counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from efficient_tx.kernels.case import cases_of
from efficient_tx.kernels.verify import loads
from efficient_tx.kernels.verify.traffic import Traffic, account, traffic


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
    (found,) = traffic(jax.jit(lambda x, w: jnp.sin(product(2 * x, w))), x, w, of=account)
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

    (found,) = traffic(
        lambda order, x: gather(order + 1, x), jnp.array([1, 9, -1, 0]), jnp.zeros((3, 8, 128)), of=account
    )
    assert found == Traffic("gather", 4 * 8 * 128 * (3 + 4), 4 * 8 * 128 * (3 + 4))


def test_a_grid_that_is_too_large_is_refused():
    call = pl.pallas_call(
        lambda x, out: None, grid=(1 << 23,), out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), interpret=True
    )
    with pytest.raises(ValueError, match="8388608 steps is too large"):
        traffic(call, jnp.zeros((8, 128)), of=account)


def test_a_gpu_kernel_loads_as_often_as_its_lists_say():
    """Four places of the grid; place i loads the i-th count, so many pieces of 8 numbers, and stores 8."""

    def gather(counts, x):
        def kernel(counts, x, out):
            i = pl.program_id(0)

            def piece(n, total):
                return total + plgpu.load(x.at[pl.ds(8 * n, 8)], mask=jnp.arange(8) < 7, other=0.0)

            total = jax.lax.fori_loop(0, counts[i], piece, jnp.zeros(8))
            # Two more, whatever the list says: a loop of a fixed number of turns.
            out[...] = jax.lax.fori_loop(0, 2, piece, total)

        return pl.pallas_call(
            kernel, grid=(4,), out_shape=jax.ShapeDtypeStruct((32,), x.dtype), name="gather", interpret=True,
            in_specs=[pl.BlockSpec((None, 4), lambda i: (1, 0)), pl.BlockSpec((64,), lambda i: (0,))],
            out_specs=pl.BlockSpec((8,), lambda i: (i,)),
        )(counts, x)  # fmt: skip

    counts = jnp.array([[9, 9, 9, 9], [2, 0, 7, 1]])
    (found,) = traffic(lambda counts, x: gather(counts, 2 * x), counts, jnp.zeros(64), of=loads.account)
    assert found == Traffic("gather", 4 * (4 + 8 * (2 + 0 + 7 + 1) + 4 * 2 * 8 + 4 * 8), 4 * (8 + 64 + 32))


def test_branches_of_a_gpu_kernel_count_where_they_are_taken():
    def halves(x, numbers=False):
        def kernel(x, out):
            i = pl.program_id(0)
            chosen = x[0] > 0 if numbers else i < 1
            value = jax.lax.cond(chosen, lambda: x[...], lambda: jnp.zeros(8, x.dtype))
            out[...] = value

        return pl.pallas_call(
            kernel, grid=(3,), out_shape=jax.ShapeDtypeStruct((24,), x.dtype), name="halves", interpret=True,
            in_specs=[pl.BlockSpec((8,), lambda i: (i,))], out_specs=pl.BlockSpec((8,), lambda i: (i,)),
        )(x)  # fmt: skip

    (known,) = traffic(halves, jnp.zeros(24), of=loads.account)
    assert known.moved == 4 * (8 + 3 * 8)
    (unknown,) = traffic(lambda x: halves(x, numbers=True), jnp.zeros(24), of=loads.account)
    assert unknown.moved == 4 * (3 * (1 + 8) + 3 * 8)  # the dearer branch, everywhere


def test_a_gpu_kernel_whose_loop_depends_on_numbers_has_no_account():
    def kernel(x, out):
        out[...] = jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x[...])

    spec = pl.BlockSpec((8,), lambda i: (i,))
    call = pl.pallas_call(
        kernel, grid=(1,), out_shape=jax.ShapeDtypeStruct((8,), jnp.float32), in_specs=[spec], out_specs=spec,
        interpret=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="a loop turns as often as numbers say"):
        traffic(call, jnp.zeros(8), of=loads.account)


def test_exact_attention_is_compared_with_what_on_chip_memory_forces():
    """8 examples and 2 heads; 1,000 numbers of two bytes on chip."""
    common = {"keys": "all", "heads": "2", "dim": 64, "dtype": "bfloat16", "score": "softmax"}
    case = cases_of("flash_attention").case
    assert case(length=4096, mask="none", **common).traffic(2000) == 8 * 2 * 4096**2 * 64**2 / 1000 * 2
    assert case(length=4096, mask="causal", **common).traffic is None
