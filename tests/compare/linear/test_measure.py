"""What is measured of a weight structure: sizes at equal bytes, projection errors."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.compare.linear import measure
from efficient_tx.compare.linear.measure import case, describe, equal_bytes, inference, project
from efficient_tx.linear import LINEAR


@pytest.mark.parametrize("name", LINEAR)
def test_every_structure_can_be_timed_and_counted(name):
    for options in LINEAR[name].timed_with(12):
        for packed in {False, hasattr(LINEAR[name], "pack")}:
            made = describe(name, 12, 12, options, packed=packed)

            def forward(x, made=made):
                call, arrays = case(made, x)
                return call(arrays), arrays["state"]

            out, state = jax.eval_shape(forward, jax.ShapeDtypeStruct((5, 12), jnp.float32))
            assert out.shape == (5, 12)
            assert made.stored == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            assert made.parameters == (
                0 if packed else nnx.eval_shape(functools.partial(measure.layer, name, 12, 12, options)).parameters
            )
    if LINEAR[name].sized_by(12, 12):
        assert LINEAR[name].sized_by(12, 12)[0] in inspect.signature(LINEAR[name]).parameters


@pytest.mark.parametrize("name", [name for name in LINEAR if LINEAR[name].sized_by(8, 8)])
@pytest.mark.slow
def test_as_many_bytes_as_allowed(name):
    """One size more would be too much; where even the least is, it is that."""
    option, values = LINEAR[name].sized_by(64, 48)
    sizes = list(values)
    for share in (0.9, 0.5, 0.01):
        at = sizes.index(equal_bytes(name, 64, 48, share)[option])
        stored = [inference(name, 64, 48, {option: size}).stored for size in sizes[at : at + 2]]
        assert at == 0 or stored[0] <= share * 64 * 48 * 4
        assert len(stored) == 1 or stored[1] > share * 64 * 48 * 4


@pytest.mark.slow
def test_projection_errors_are_those_of_the_formula():
    kernel = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
    rows = {made.structure: made for made in project(["dense", "low_rank", "toeplitz", "ternary"], kernel, 0.5)}
    assert list(rows) == ["low_rank", "toeplitz", "ternary"]
    rank = 16 * 12 // 2 // (16 + 12)
    assert rows["low_rank"].options == {"rank": rank}
    singular = np.linalg.svd(kernel, compute_uv=False)
    tail = np.sqrt((singular[rank:] ** 2).sum() / (singular**2).sum())
    means = {d: kernel.diagonal(d).mean() for d in range(-15, 12)}
    toeplitz = np.array([[means[j - i] for j in range(12)] for i in range(16)])
    assert rows["low_rank"].error == pytest.approx(tail, rel=1e-5)  # float32
    assert rows["toeplitz"].error == pytest.approx(np.linalg.norm(kernel - toeplitz) / np.linalg.norm(kernel), rel=1e-5)
    assert (rows["ternary"].name, rows["ternary"].stored) == ("ternary, packed", 4 * 12 + 4)
