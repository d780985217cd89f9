"""The facts of a compiled program, of a small kernel whose figures are known (`pytest -m aot`)."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from efficient_tx.kernels.verify.program import compiled, digest, lowered
from efficient_tx.kernels.verify.targets import TARGETS

pytestmark = pytest.mark.aot


def product(x, y, *, platform, precision=None, block=64):
    """x `[n, block]` times y `[block, block]`, by blocks of rows."""

    def kernel(x, y, out):
        out[...] = jax.lax.dot_general(
            x[...], y[...], (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // block,),
        in_specs=[pl.BlockSpec((block, block), lambda i: (i, 0)), pl.BlockSpec((block, block), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((block, block), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1) if platform == "cuda" else None,
        name="small_product",
    )(x, y)


def shapes(dtype, block=64, rows=1024):
    return jax.ShapeDtypeStruct((rows, block), dtype), jax.ShapeDtypeStruct((block, block), dtype)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_the_kernel_and_its_figures(name):
    target = TARGETS[name]
    found = compiled(
        lambda x, y: jnp.tanh(product(x, y, platform=target.platform)).sum(1), *shapes(jnp.bfloat16), target=target
    )
    (kernel,) = found.kernels
    assert kernel.name == "small_product"
    # A TPU's memory has rows of 128 numbers.
    assert (1024 + 64) * 64 * 2 <= found.arguments <= (1024 + 64) * 128 * 2
    assert (found.outputs, found.loops) == (4096, 0)
    assert kernel.instructions > 20 and kernel.spills == 0
    if target.platform == "cuda":
        assert 16 <= kernel.registers <= 255 and kernel.tf32 == 0


def test_what_stands_around_a_kernel_is_counted():
    _, y = shapes(jnp.float32)
    found = compiled(lambda x: jax.lax.fori_loop(0, 9, lambda i, x: x @ x, x) + 1, y, target=TARGETS["v5e"])
    assert found.kernels == () and found.loops == 1


def test_float32_products_are_whole_only_if_asked_for():
    counts = [
        compiled(
            lambda x, y, precision=precision: product(x, y, platform="cuda", precision=precision, block=32),
            *shapes(jnp.float32, 32), target=TARGETS["h100"],
        ).kernels[0].tf32
        for precision in (jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST)
    ]  # fmt: skip
    assert counts[0] > 0 and counts[1] == 0


def test_memory_on_chip_and_spills_are_those_of_the_compilers():
    found = compiled(
        lambda x, y: product(x, y, platform="tpu", block=256), *shapes(jnp.float32, 256), target=TARGETS["v5e"]
    )
    # While one block is worked on, the next one of x is read and the last output written.
    assert found.kernels[0].on_chip >= 5 * 256 * 256 * 4
    spilled = compiled(
        lambda x, y: product(x, y, platform="cuda", block=128), *shapes(jnp.bfloat16, 128), target=TARGETS["a100"]
    )
    assert spilled.kernels[0].spills > 0 and spilled.kernels[0].registers == 255


def test_the_digest_is_that_of_the_program():
    def of(factor, target="v5e"):
        return digest(
            lowered(lambda x, y: factor * product(x, y, platform="tpu"), *shapes(jnp.float32), target=TARGETS[target])
        )

    assert of(2.0) == of(2.0) and len({of(2.0), of(3.0)}) == 2
