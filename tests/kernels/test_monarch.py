"""The Monarch product: all implementations against the dense matrix of the definition, gradients, chunks, errors."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from efficient_tx.kernels import monarch
from efficient_tx.kernels.case import Case, shape
from efficient_tx.kernels.monarch import pallas_gpu, pallas_tpu, xla
from efficient_tx.kernels.verify import accuracy

kernel = importlib.import_module("efficient_tx.kernels.monarch")
layout = importlib.import_module("efficient_tx.kernels.monarch.layout")

# (k, q, p), (l, s, r): square, neither of q and l divides the other, few blocks to many, slices of rank 3.
SHAPES = [((3, 6, 4), (3, 4, 6)), ((3, 4, 5), (2, 7, 6)), ((1, 6, 2), (6, 3, 1)), ((4, 9, 2), (3, 5, 12))]

# From jax 0.11 on, Triton's kernels are lowered where there is a GPU.
ACCELERATORS = ("tpu", "cuda") if jax.__version_info__ < (0, 11) else ("tpu",)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Of 4 to 12 tokens, so that few tokens are several chunks; the second shape is too wide to be computed again."""
    monkeypatch.setattr(layout, "CHUNK", 4)
    monkeypatch.setattr(layout, "NARROW", 4)


def arrays(shapes, tokens, seed=0):
    r = np.random.default_rng(seed)
    (k, _, p), _ = shapes
    return [r.normal(size=shape) for shape in ((tokens, k * p), *shapes)]


def matrix(w1, w2):
    """The weight `[k·p, s·l]` entry by entry, from the definition."""
    (k, q, p), (l, s, _) = w1.shape, w2.shape
    out = np.zeros((k, p, s, l))
    for i, row, column in np.ndindex(k, q, l):
        flat = i * q + row
        if flat % l == column:
            out[i, :, :, column] += np.outer(w1[i, row], w2[column, :, flat // l])
    return out.reshape(k * p, s * l)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_equals_its_dense_matrix_and_so_do_the_gradients(shapes, implementation):
    x, w1, w2 = arrays(shapes, 24)
    with jax.enable_x64(True):
        g = np.random.default_rng(1).normal(size=(24, w2.shape[0] * w2.shape[1]))
        out, pull = jax.vjp(jax.jit(partial(monarch, implementation=implementation)), x, w1, w2)
        d_x, d_w1, d_w2 = pull(g)
    dense = matrix(w1, w2)
    # float64 rounding in all of these.
    np.testing.assert_allclose(out, x @ dense, atol=1e-12)
    np.testing.assert_allclose(d_x, g @ dense.T, atol=1e-12)
    # The matrix is linear in each factor, and its cotangent is x^T g: derivatives along random directions.
    for found, along in ((d_w1, lambda d: matrix(d, w2)), (d_w2, lambda d: matrix(w1, d))):
        direction = np.random.default_rng(2).normal(size=found.shape)
        np.testing.assert_allclose(np.vdot(found, direction), np.vdot(x.T @ g, along(direction)), rtol=1e-12)


@pytest.mark.quick
def test_how_tokens_are_cut():
    """At least CHUNK and the width of a block, less than twice that where a divisor allows, else all at once."""
    assert [layout.chunk_count(tokens, 3) for tokens in (1, 7, 8, 24, 23, 22)] == [1, 1, 2, 6, 1, 1]
    assert [layout.chunk_count(24, width) for width in (5, 12, 13, 100)] == [4, 2, 1, 1]
    assert layout.chunk_count(66, 1) == 11  # of 6 tokens: neither 16 nor 15 to 12 chunks divide them


@pytest.mark.quick
def test_small_inputs_take_the_reference_and_have_forward_mode():
    x, w1, w2 = (jnp.asarray(array, jnp.float32) for array in arrays(SHAPES[0], 24))
    out, tangent = jax.jvp(lambda x: monarch(x, w1, w2), (x,), (x,))
    np.testing.assert_array_equal(out, tangent)  # linear in x: the same program
    with pytest.raises(NotImplementedError, match=r"monarch: forward-mode .* implementation='reference' only"):
        jax.jvp(lambda x: monarch(x, w1, w2, implementation="xla"), (x,), (x,))


@pytest.mark.quick
def test_large_inputs_take_chunks_on_the_cpu_and_kernels_elsewhere(monkeypatch):
    monkeypatch.setattr(kernel, "SMALL", 24 * 12)
    given = [jnp.asarray(array, jnp.float32) for array in arrays(SHAPES[0], 24)]
    program = jax.jit(jax.value_and_grad(lambda *given: monarch(*given).sum(), (0, 1, 2)))
    loops, kernels = {}, {}
    for platform in ("cpu", *ACCELERATORS):
        text = program.trace(*given).lower(lowering_platforms=(platform,)).as_text()
        loops[platform] = text.count("stablehlo.while")
        kernels[platform] = text.count("tpu_custom_call") + text.count("xla.gpu.triton")
    assert loops == {"cpu": 2} | dict.fromkeys(ACCELERATORS, 0)
    # Forward two, backward four, and a chunk's hidden layer again: the blocks are narrow.
    assert kernels == {"cpu": 0} | dict.fromkeys(ACCELERATORS, 7)


@pytest.mark.parametrize("shapes", SHAPES[:2])
@pytest.mark.slow
def test_all_at_once_is_the_same_product(monkeypatch, shapes):
    """What other devices run, on this one, of as many tokens as no other test has: theirs are traced for the CPU."""
    given = arrays(shapes, 28)
    monkeypatch.setattr(xla, "by_platform", lambda alternatives, *args: alternatives["default"](*args))

    def loss(implementation, *given):
        return jnp.sin(monarch(*given, implementation=implementation)).sum()

    with jax.enable_x64(True):
        ours, expected = (
            jax.jit(jax.value_and_grad(partial(loss, name), (0, 1, 2)))(*given) for name in ("xla", "reference")
        )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12), ours, expected)  # float64 rounding


@pytest.mark.slow
def test_maps_and_second_derivatives():
    x, w1, w2 = arrays(SHAPES[3], 24)
    call = {name: partial(monarch, implementation=name) for name in ("reference", "xla")}
    with jax.enable_x64(True):
        several = jnp.stack([w1, 2 * w1])
        mapped = jax.vmap(call["xla"], (None, 0, None))(x, several, w2)
        np.testing.assert_allclose(mapped, jnp.stack([x @ matrix(w, w2) for w in several]), atol=1e-11)
        batch = jax.vmap(call["xla"], (0, None, None))(x.reshape(2, 12, -1), w1, w2)
        np.testing.assert_allclose(batch.reshape(24, -1), x @ matrix(w1, w2), atol=1e-11)

        def slope(name, w1):
            return jnp.sin(jax.grad(lambda x: jnp.sin(call[name](x, w1, w2)).sum())(x)).sum()

        second = [jax.jit(jax.grad(partial(slope, name)))(w1) for name in call]
        np.testing.assert_allclose(*second, rtol=1e-9)


def test_bfloat16_gradients_are_summed_in_float32():
    """512 chunks: sums in bfloat16 would stop growing after 256 of them."""
    x, w1, w2 = (jnp.asarray(np.abs(array), jnp.bfloat16) for array in arrays(SHAPES[0], 512 * 6))
    call = jax.jit(jax.grad(lambda *given: monarch(*given, implementation="xla").astype(jnp.float32).sum(), (1, 2)))
    wide = (np.asarray(array, np.float32) for array in (x, w1, w2))
    for ours, exact in zip(call(x, w1, w2), call(*wide)):
        assert ours.dtype == jnp.bfloat16
        # Products and result are rounded to bfloat16.
        np.testing.assert_allclose(np.asarray(ours, np.float32), exact, rtol=0.02)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_dtypes_promote_and_batches_may_be_empty(implementation):
    x, w1, w2 = arrays(SHAPES[0], 24)
    w1, w2 = jnp.asarray(w1, jnp.float32), jnp.asarray(w2, jnp.bfloat16)
    given = jnp.asarray(x, jnp.bfloat16).reshape(2, 3, 4, -1), w1, w2
    out = monarch(*given, implementation=implementation)
    assert (out.shape, out.dtype) == ((2, 3, 4, 12), jnp.float32)
    assert monarch(given[0][:0], *given[1:], implementation=implementation).shape == (0, 3, 4, 12)
    assert monarch(given[0][0, 0, 0], *given[1:], implementation=implementation).shape == (12,)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        (((2, 12), (3, 6), (3, 4, 6)), {}, r"pass \[k, q, p\] and \[l, s, r\]"),
        (((2, 12), (3, 6, 4), (3, 4, 5)), {}, "k·q = 18 and l·r = 15 must be equal"),
        (((2, 13), (3, 6, 4), (3, 4, 6)), {}, "its last axis must be k·p = 12"),
        (
            ((2, 12), (3, 6, 4), (3, 4, 6)),
            {"implementation": "einsum"},
            "choose one of pallas_tpu, pallas_gpu, xla, reference",
        ),
        (((2, 12), (3, 6, 4), (3, 4, 6)), {"interpret": True}, "interpret=True is for Pallas kernels"),
    ],
)
def test_errors_are_one_line(shapes, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        monarch(*map(jnp.zeros, shapes), **options)
    assert "\n" not in str(caught.value)


SMALL_TILES = {"pallas_tpu": pallas_tpu.BlockSizes(16, 3, 4), "pallas_gpu": pallas_gpu.BlockSizes(16, 16, 16)}
PALLAS = sorted(SMALL_TILES)


def small_case(shapes, tokens, dtype="float32"):
    (k, _, p), _ = shapes
    return Case(monarch, (shape(dtype, tokens, k * p), *(shape(dtype, *sizes) for sizes in shapes)))


@pytest.mark.parametrize("implementation", PALLAS)
@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("shapes", "tokens", "dtype", "tiles"),
    [
        (SHAPES[0], 44, "float32", True),  # chunks of 11 tokens, in tiles of 16
        (SHAPES[1], 1, "float32", False),
        (SHAPES[1], 23, "bfloat16", False),
        (SHAPES[2], 24, "float32", False),
        (SHAPES[3], 24, "bfloat16", False),
        (((32, 8, 8), (8, 16, 32)), 200, "float32", False),  # a TPU's program has 32 of 32 blocks
    ],
)
def test_kernels_equal_the_formula_forward_and_backward(shapes, tokens, dtype, tiles, implementation):
    options = {"block_sizes": SMALL_TILES[implementation]} if tiles else {}
    found = accuracy.errors(
        small_case(shapes, tokens, dtype), 0, implementation=implementation, interpret=True, **options
    )
    # Rounding of sums of at most 200 products; the hidden layer and its cotangent are rounded to bfloat16.
    most = 2e-6 if dtype == "float32" else 1e-2
    assert max(found.values()) < most


@pytest.mark.slow
def test_the_tpu_kernels_do_not_race():
    assert accuracy.races(small_case(SHAPES[0], 44), 0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("implementation", PALLAS)
def test_kernels_map_rematerialise_and_run_in_shards(implementation):
    x, w1, w2 = (jnp.asarray(array, jnp.float32) for array in arrays(SHAPES[0], 8))
    call = partial(monarch, implementation=implementation, interpret=True)

    def slopes(function):
        return jax.jit(jax.grad(lambda *given: jnp.sin(function(*given)).sum(), (0, 1, 2)))(x, w1, w2)

    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec("devices"), PartitionSpec(), PartitionSpec()
    # The interpreter's own loops do not pass the check of what varies; programs for accelerators do: see below.
    sharded = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    expected = slopes(monarch)
    for function in (jax.vmap(call, (0, None, None)), jax.checkpoint(call), sharded):
        # float32 rounding; sin is no more than the identity at its steepest.
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-5), slopes(function), expected)


@pytest.mark.quick
def test_what_kernels_refuse_is_said_in_one_line():
    x, w1, w2 = map(jnp.zeros, ((2, 15), (3, 4, 5), (6, 7, 2)))
    with pytest.raises(ValueError, match="4 hidden channels cannot be dealt to 6 output groups"):
        monarch(x, w1, w2, implementation="pallas_tpu", interpret=True)
    with pytest.raises(ValueError, match="there are no tokens"):
        monarch(x[:0], w1, w2, implementation="pallas_gpu", interpret=True)
    with pytest.raises(ValueError, match="not float16"):
        monarch(*(array.astype(jnp.float16) for array in (x, w1, w2)), implementation="pallas_tpu")
    large = [shape("bfloat16", *sizes) for sizes in ((128, 32768), (2, 16384, 16384), (2, 16384, 16384))]
    with pytest.raises(ValueError, match="MiB of on-chip memory"):
        jax.eval_shape(partial(monarch, implementation="pallas_tpu"), *large)
    with pytest.raises(ValueError, match="block sizes are those of one implementation"):
        monarch(x, w1, w2, block_sizes=pallas_gpu.BlockSizes())


@pytest.mark.slow
@pytest.mark.parametrize("platform", ACCELERATORS)
def test_kernels_know_what_varies_over_shards(platform):
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec("devices"), PartitionSpec(), PartitionSpec()
    implementation = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}[platform]
    call = partial(monarch, implementation=implementation)
    sharded = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=True)
    program = jax.jit(jax.grad(lambda *given: sharded(*given).sum(), (0, 1, 2)))
    shapes = [jax.ShapeDtypeStruct(sizes, jnp.float32) for sizes in ((256, 512), (4, 128, 128), (4, 128, 128))]
    text = program.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert "tpu_custom_call" in text or "xla.gpu.triton" in text
