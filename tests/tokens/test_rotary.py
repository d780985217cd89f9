"""Rotary positions: rotations, of relative position alone, against complex numbers; on a grid by row and column."""

import jax
import numpy as np
import pytest

from efficient_tx.tokens.rotary import rotate

pytestmark = pytest.mark.quick


def test_rotation_keeps_norms_and_depends_on_distances_only():
    """So inner products and Gaussian kernels alike are functions of the relative position, exactly."""
    with jax.enable_x64(True):
        q, k = (np.random.default_rng(seed).normal(size=(1, 1, 2, 8)) for seed in (0, 1))
        q, k = (np.repeat(x, 9, axis=1) for x in (q, k))
        turned_q, turned_k = rotate(q, None), rotate(k, None)
        np.testing.assert_allclose(np.linalg.norm(turned_q, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-12)
        distance = np.square(turned_q[0, :, None] - turned_k[0, None]).sum(-1)
        for offset in range(-8, 9):
            diagonal = np.diagonal(distance, offset)
            np.testing.assert_allclose(diagonal, diagonal[:, :1].repeat(diagonal.shape[1], 1), rtol=1e-10)


def test_rotation_by_complex_numbers():
    x = np.random.default_rng(0).normal(size=(1, 5, 1, 8)).astype(np.float32)
    pairs = x[..., :4] + 1j * x[..., 4:]
    turned = pairs * np.exp(1j * np.arange(5)[None, :, None, None] * 10000.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(rotate(x, None), np.concatenate([turned.real, turned.imag], -1), atol=1e-6)


def test_two_dimensional_rotation_turns_with_row_and_column():
    """On a 3 × 3 grid: tokens of one row share the row's angles, tokens of one column the column's."""
    x = np.ones((1, 9, 1, 8), np.float32)
    turned = np.asarray(rotate(x, None, layout="rope2d"))[0, :, 0].reshape(3, 3, 2, 4)
    by_row, by_column = turned[..., :2], turned[..., 2:]
    assert (by_row == by_row[:, :1]).all()
    assert (by_column == by_column[:1]).all()
    assert not (by_row == by_row[:1]).all()
    with pytest.raises(ValueError, match="square grid"):
        rotate(np.ones((1, 8, 1, 8)), None, layout="rope2d")
    with pytest.raises(ValueError, match="multiple of 4"):
        rotate(np.ones((1, 9, 1, 6)), None, layout="rope2d")
