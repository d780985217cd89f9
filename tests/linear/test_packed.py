"""Packed forms: the output of the trained layer, bytes by hand, and planes of bits against NumPy's packing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.linear import (
    LINEAR,
    BlockDiagonal,
    Dense,
    DenseShift,
    Form,
    Integer,
    LowRank,
    LowRankPlusSparse,
    Monarch,
    Sparse,
    Sum,
    Ternary,
)
from efficient_tx.linear.bit_planes import from_planes, to_planes

quick = pytest.mark.quick
FORMS = [
    *(Form(structure) for structure in LINEAR.values() if hasattr(structure, "pack")),
    Form(Sparse, pattern="2:4"),
    Form(DenseShift, bits=2),
    Form(DenseShift, bits=5),
    Form(Integer, bits=4, group=10),
    Form(LowRankPlusSparse, pattern="top", density=0.3),
    Form(Sum, first=Form(DenseShift), second=Form(LowRank, rank=2)),
    Form(Sum, first=Form(Dense), second=Form(Ternary)),
]
forms = pytest.mark.parametrize("form", FORMS, ids=str)


def made(form, n, m, seed=0, **common):
    """A layer of a form, drawn by one program, with a bias that is not zero."""

    def draw():
        layer = form(n, m, rngs=nnx.Rngs(seed), **common)
        if layer.bias is not None:
            layer.bias[...] = jnp.linspace(-1, 1, m, dtype=layer.param_dtype)
        return layer

    graphdef, _ = nnx.split(nnx.eval_shape(draw))
    return nnx.merge(graphdef, jax.jit(lambda: nnx.split(draw())[1])())


def held(layer):
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(nnx.state(layer)))


@forms
@pytest.mark.parametrize(
    "common",
    [
        {"use_bias": False},
        {"param_dtype": jnp.bfloat16},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"dtype": jnp.bfloat16}, marks=pytest.mark.slow),
    ],
    ids=["no_bias", "parameters_of_bfloat16", "float32", "computes_in_bfloat16"],
)
@pytest.mark.parametrize(("n", "m"), [(26, 7), pytest.param(1, 5, marks=pytest.mark.slow)])
@pytest.mark.first(2)
def test_the_output_is_that_of_the_trained_layer(form, common, n, m):
    """26 inputs are three bytes and a quarter of bits."""
    layer = made(form, n, m, **common)
    packed, x = layer.pack(), np.random.default_rng(0).normal(size=(2, 3, n))
    x = jnp.asarray(x, common.get("param_dtype", jnp.float32))
    both = jax.jit(lambda layer, packed, x: (layer(x), packed(x), layer.to_dense(), packed.to_dense()))
    out, again, weight, unpacked = both(layer, packed, x)
    assert again.dtype == out.dtype and unpacked.dtype == weight.dtype
    np.testing.assert_array_equal(unpacked, weight)
    eps = float(jnp.finfo(out.dtype).eps)
    out, again = np.asarray(out, np.float32), np.asarray(again, np.float32)
    # The sum with the bias, or of two parts, may be rounded once or twice.
    allowed = (np.abs(out).max() + 1) * eps if layer.bias is not None or form.structure is Sum else 0
    assert np.abs(again - out).max() <= allowed


@quick
@forms
def test_nothing_is_trained_and_the_layer_stays_as_it_is(form):
    layer = made(form, 26, 7)
    packed = layer.pack()
    assert not jax.tree.leaves(nnx.state(packed, nnx.Param))
    assert packed.bytes_stored == held(packed)
    # No part of the default sum can be packed.
    assert packed.bytes_stored < layer.bytes_stored or (form == Form(Sum) and packed.bytes_stored == layer.bytes_stored)
    assert {type(v) for _, v in nnx.to_flat_state(nnx.split(layer)[1])} == {nnx.Param}
    with pytest.raises(ValueError, match=r"takes \[..., in_features\], here 26"):
        packed(jnp.ones((2, 25)))


BYTES = [
    (Form(DenseShift), lambda size: 3 * 4 * 7 + 4),  # three planes of ⌈26 / 8⌉ × 7, a scale of float32
    (Form(DenseShift, bits=5), lambda size: 5 * 4 * 7 + 4),
    # A byte, or three bits, of each weight, and one or ⌈26 / 10⌉ scales of each output.
    (Form(Integer), lambda size: 26 * 7 + 7 * size),
    (Form(Integer, bits=3, group=10), lambda size: 3 * 4 * 7 + 3 * 7 * size),
    (Form(LowRankPlusSparse, rank=2), lambda size: (26 * 2 + 2 * 7 + (6 * 2 + 2) * 7) * size + 4 * 7),
    (Form(LowRankPlusSparse, rank=1, pattern="top", density=0.1), lambda size: (26 + 7 + 18) * size + 4 * 7),
    (
        Form(Sum, first=Form(DenseShift), second=Form(LowRank, rank=2)),
        lambda size: 3 * 4 * 7 + 4 + (26 * 2 + 2 * 7) * size,
    ),
    # Four levels a byte and a scale; a tenth of the entries and a bit for each.
    (
        Form(Sum, first=Form(Ternary), second=Form(Sparse, density=0.1)),
        lambda size: math.ceil(26 / 4) * 7 + 4 + 18 * size + 4 * 7,
    ),
    # Two blocks of 13 × 4, 7 outputs padded to 8; no part can be packed.
    (
        Form(Sum, first=Form(BlockDiagonal, blocks=2), second=Form(LowRank, rank=1)),
        lambda size: (2 * 13 * 4 + 26 + 7) * size,
    ),
]


@quick
@pytest.mark.parametrize(("form", "count"), BYTES, ids=lambda value: str(value) if isinstance(value, Form) else "")
def test_bytes_by_hand(form, count):
    for dtype, size in {jnp.float32: 4, jnp.bfloat16: 2}.items():
        for bias in (False, True):

            def pack(dtype=dtype, bias=bias):
                return form(26, 7, use_bias=bias, param_dtype=dtype, rngs=nnx.Rngs(0)).pack()

            assert nnx.eval_shape(pack).bytes_stored == count(size) + bias * 7 * size


@quick
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_planes_are_numpys_packed_bits(bits):
    for n in (1, 8, 21):
        codes = np.random.default_rng(n).integers(0, 2**bits, size=(n, 3), dtype=np.uint8)
        planes = to_planes(jnp.asarray(codes), bits)
        rows = -(-n // 8)
        # NumPy packs neighbours, so the numbers of a byte are brought side by side: i, i + rows, i + 2 rows ...
        side = np.pad(codes, [(0, 8 * rows - n), (0, 0)]).reshape(8, rows, 3)
        expected = [np.packbits(side >> bit & 1, axis=0, bitorder="little")[0] for bit in range(bits)]
        np.testing.assert_array_equal(planes, expected)
        assert planes.dtype == jnp.uint8 and planes.nbytes == bits * rows * 3
        np.testing.assert_array_equal(from_planes(planes, n), codes)


@quick
def test_planes_of_dense_shift_hold_its_codes():
    """By hand: nine weights in one column, so two bytes a plane; the last plane is the sign."""
    kernel = np.array([[1, 2, 4, 8, -1, -2, -4, -8, 1]], np.float32).T
    packed = DenseShift.from_dense(jnp.asarray(kernel)).pack()
    # Two rows: weights 0, 2, 4, 6, 8 are bits 0 to 4 of row 0, the others bits 0 to 3 of row 1.
    np.testing.assert_array_equal(packed.planes[..., 0], [[0, 0b1111], [0b01010, 0b1010], [0b01100, 0b1100]])
    np.testing.assert_allclose(packed.to_dense(), kernel, rtol=1e-6)  # float32


@quick
def test_a_sparse_part_that_its_pattern_cannot_hold_is_not_packed():
    for form in (Form(LowRankPlusSparse), Form(Sum, first=Form(Sparse, density=0.5), second=Form(Monarch, blocks=2))):
        layer = made(form, 8, 4)
        (layer.first if form.structure is Sum else layer).sparse[...] = np.ones((8, 4), np.float32)
        with pytest.raises(ValueError, match="the weight has 32 nonzero entries, and its pattern keeps 16"):
            layer.pack()
