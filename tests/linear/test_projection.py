"""Nearest layers: against their definitions, against alternating least squares, and which structure contains which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.linear import Blast, BlockDiagonal, BlockTensorTrain, Kronecker, LowRank, Monarch
from tests.support.packages import installed

# The weight as a sum over its factors, rows before columns, and the sizes of the indices.
FORMULAS = {
    "low_rank": (LowRank, {"rank": 3}, "rn,rm->nm", {"n": 12, "m": 9, "r": 3}),
    "monarch": (Monarch, {"blocks": 2}, "krlp,lskr->kpsl", {"k": 2, "l": 2, "p": 6, "s": 4, "r": 2}),
    "block_tensor_train": (BlockTensorTrain, {"rank": 2}, "krlp,lskr->kpsl", {"k": 3, "l": 4, "p": 4, "s": 4, "r": 2}),
    "blast": (Blast, {"blocks": 2, "rank": 3}, "jpr,ijr,iqr->jpiq", {"i": 2, "j": 2, "p": 6, "q": 8, "r": 3}),
    "kronecker": (Kronecker, {"rank": 2}, "tac,tbd->abcd", {"a": 3, "b": 4, "c": 4, "d": 4, "t": 2}),
}


def shape(letters, sizes):
    return tuple(sizes[letter] for letter in letters)


def random_kernel(formula, sizes):
    out = shape(formula.split("->")[1], sizes)
    half = len(out) // 2
    return np.random.default_rng(0).normal(size=(np.prod(out[:half]), np.prod(out[half:])))


def alternating_least_squares(kernel, formula, sizes, seed, sweeps=30):
    """The error from random factors, in float64: every factor in turn becomes the solution of its linear problem."""
    inputs, out = formula.split("->")
    inputs = inputs.split(",")
    rng = np.random.default_rng(seed)
    factors = [rng.normal(size=shape(letters, sizes)) for letters in inputs]
    for _ in range(sweeps):
        for i, letters in enumerate(inputs):
            units = np.eye(factors[i].size).reshape(-1, *factors[i].shape)
            terms = ",".join([*inputs[:i], f"z{letters}", *inputs[i + 1 :]])
            design = np.einsum(f"{terms}->{out}z", *factors[:i], units, *factors[i + 1 :], optimize=True)
            solution = np.linalg.lstsq(design.reshape(kernel.size, -1), kernel.ravel(), rcond=None)[0]
            factors[i] = solution.reshape(factors[i].shape)
    return np.linalg.norm(kernel.ravel() - np.einsum(formula, *factors, optimize=True).ravel())


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.slow
def test_projection_is_never_worse_than_ten_random_restarts(name):
    cls, options, formula, sizes = FORMULAS[name]
    kernel = random_kernel(formula, sizes)
    with jax.enable_x64(True):
        made = cls.from_dense(jnp.asarray(kernel), **options)
        factors = [getattr(made, factor)[...] for factor in made.factors()]
        arrays = [f.reshape(shape(i, sizes)) for f, i in zip(factors, formula.split("->")[0].split(","), strict=True)]
        # The formula that is fitted below is the layer's.
        np.testing.assert_allclose(np.einsum(formula, *arrays).reshape(kernel.shape), made.to_dense(), atol=1e-12)
        error = np.linalg.norm(kernel - np.asarray(made.to_dense()))
    best = min(alternating_least_squares(kernel, formula, sizes, seed) for seed in range(10))
    if name == "blast":  # no closed form: what its fit documents
        assert error < 1.02 * best
    else:
        assert error < best * (1 + 1e-9)
        assert best < 1.01 * error  # the restarts are worth comparing with


def member(cls, n, m, **options):
    return cls(n, m, use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options).to_dense()


@pytest.mark.slow
def test_kronecker_is_a_monarch_and_monarch_a_block_tensor_train_matrix():
    def error(weight, cls, **options):
        return np.linalg.norm(cls.from_dense(weight, **options).to_dense() - weight) / np.linalg.norm(weight)

    with jax.enable_x64(True):
        kronecker, monarch = member(Kronecker, 36, 36), member(Monarch, 36, 36, blocks=6)
        train = member(BlockTensorTrain, 36, 36, rank=2)
        assert error(kronecker, Monarch, blocks=6) < 1e-12
        assert error(monarch, BlockTensorTrain, rank=1) < 1e-12
        assert error(monarch, BlockTensorTrain, rank=2) < 1e-12
        # And no way back.
        assert error(monarch, Kronecker) > 0.5
        assert error(train, Monarch, blocks=6) > 0.1


def test_kronecker_is_numpys():
    with jax.enable_x64(True):
        made = Kronecker(12, 10, rank=2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        left, right = np.asarray(made.left[...]), np.asarray(made.right[...])
        np.testing.assert_allclose(made.to_dense(), sum(map(np.kron, left, right)), atol=1e-14)


@pytest.mark.quick
def test_kronecker_of_many_terms_multiplies_their_sum():
    """As its W does, also where few vectors are multiplied term by term."""
    with jax.enable_x64(True):
        made = Kronecker(36, 36, rank=20, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        assert made.multiplies == 36 * 36 < made.multiplies_by_terms
        weight = sum(map(np.kron, np.asarray(made.left[...]), np.asarray(made.right[...])))
        x = np.random.default_rng(0).normal(size=(100, 36))
        for rows in (x[:1], x):
            np.testing.assert_allclose(made(rows), rows @ weight, rtol=1e-12, atol=1e-12)


def test_kronecker_without_divisors_is_dense():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(13, 7)), jnp.float32)
    np.testing.assert_allclose(Kronecker.from_dense(kernel).to_dense(), kernel, rtol=1e-6)


# Of 12 channels in 3 groups of 4: the order in which ShuffleNet's transposition leaves them.
SHUFFLED = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


@pytest.mark.parametrize(
    ("options", "block_of"),
    [
        ({}, np.argsort(SHUFFLED) // 4),
        ({"order": "inverse"}, np.arange(12) % 3),
        ({"shuffle": False}, np.arange(12) // 4),
    ],
    ids=["shufflenet", "inverse", "none"],
)
def test_block_diagonal_keeps_the_entries_of_its_blocks(options, block_of):
    """Also where the last block is cut: 11 inputs and 7 outputs in 3 blocks."""
    kernel = np.random.default_rng(0).normal(size=(11, 7)).astype(np.float32)
    kept = np.where(block_of[:11, None] == np.arange(7) // 3, kernel, 0)
    made = BlockDiagonal.from_dense(jnp.asarray(kernel), blocks=3, **options)
    np.testing.assert_array_equal(made.to_dense(), kept)


@pytest.mark.quick
def test_stacked_block_diagonals_mix_their_blocks_only_with_the_shuffle():
    with jax.enable_x64(True):
        for options in ({}, {"order": "inverse"}, {"shuffle": False}):
            weight = member(BlockDiagonal, 16, 16, **options)
            assert bool((weight @ weight == 0).any()) is ("shuffle" in options)


@pytest.mark.quick
def test_orders_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="order is 'shuffle': choose one of shufflenet, inverse"):
        BlockDiagonal(12, 8, order="shuffle", rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.torch
def test_block_diagonal_is_torchs_channel_shuffle_and_grouped_linear():
    """As in the authors' code: rearrange "(group c) -> (c group)", then one product for each block."""
    torch = installed("torch")
    made = BlockDiagonal(12, 8, blocks=4, use_bias=False, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    shuffled = torch.nn.functional.channel_shuffle(torch.tensor(x)[:, :, None, None], 4)[:, :, 0]
    weight = torch.tensor(np.asarray(made.weight[...]).reshape(8, 3, 1))
    expected = torch.nn.functional.conv1d(shuffled, weight, groups=4)[:, :, 0]
    np.testing.assert_allclose(made(x), expected, rtol=1e-5, atol=1e-6)  # float32 rounding


def test_blast_blocks_are_its_definition():
    """Cut to 11 × 7: A_ij = U_i diag(s_ij) V_jᵀ in the paper's orientation, whose matrices are ours transposed."""
    with jax.enable_x64(True):
        made = Blast(11, 7, blocks=3, rank=2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        u, s, v = (np.asarray(getattr(made, name)[...]) for name in "usv")
        dense = np.block([[u[i] @ np.diag(s[i, j]) @ v[j].T for j in range(3)] for i in range(3)])
        np.testing.assert_allclose(made.to_dense().T, dense[:7, :11], atol=1e-14)


@pytest.mark.slow
def test_blast_fit_of_a_blast_matrix_in_float32():
    """Of a rank up to the side of its blocks; the tolerance is the documented one."""
    weight = np.asarray(Blast(64, 64, rank=16, rngs=nnx.Rngs(3)).to_dense())
    back = np.asarray(Blast.from_dense(jnp.asarray(weight), rank=16).to_dense())
    assert np.linalg.norm(back - weight) < 1e-4 * np.linalg.norm(weight)


@pytest.mark.slow
def test_blast_fit_is_better_than_low_rank_and_block_diagonal():
    """Both are BLAST matrices, of about the same number of parameters."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
    made, low_rank = Blast.from_dense(kernel, rank=16), LowRank.from_dense(kernel, rank=16)
    blocks = BlockDiagonal.from_dense(kernel, shuffle=False)
    ours, theirs, others = (float(jnp.linalg.norm(kernel - one.to_dense())) for one in (made, low_rank, blocks))
    assert ours < 0.85 * theirs < 0.85 * others


@pytest.mark.slow
def test_blast_fit_of_degenerate_matrices_is_finite_and_exact():
    """Cores that have no inverse, Gram matrices of zeros: a zero, a block-diagonal and two low-rank matrices."""
    blocks = np.kron(np.eye(4), np.add.outer(np.arange(16), np.arange(16)))
    for weight in (np.zeros((64, 64)), blocks, np.ones((64, 64)), np.outer(np.arange(64) == 0, np.arange(64) == 1)):
        made = Blast.from_dense(jnp.asarray(weight, jnp.float32), rank=16)
        np.testing.assert_allclose(made.to_dense(), weight, atol=1e-5 * max(1, np.abs(weight).max()))
