"""Factorisations against numpy, under vmap and in empty batches; and no program can wait for ever for its threads."""

import ast
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.numerics.factorisations import cholesky, eigh, qr, solve_lower, solve_lower_transposed, svd
from tests.support import ROOT

MODULES = ("jnp.linalg", "jax.numpy.linalg", "lax.linalg", "jax.lax.linalg", "jax.scipy.linalg")


def matrices(*shape):
    return np.random.default_rng(0).normal(size=shape)


def positive(*shape):
    a = matrices(*shape)
    return a @ a.swapaxes(-1, -2) + np.eye(shape[-1])


def product(factorise):
    """The matrix that `factorise` took apart, put together again."""

    def again(a):
        if factorise is cholesky:
            factor = cholesky(a)
            return factor @ factor.mT
        if factorise is eigh:
            values, vectors = eigh(a)
            return vectors * values[..., None, :] @ vectors.mT
        if factorise is qr:
            q, r = qr(a)
            return q @ r
        u, s, v = svd(a)
        return u * s[..., None, :] @ v

    return again


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 5), (0, 5, 5), *(pytest.param(s, marks=pytest.mark.slow) for s in ((5, 5), (3, 5, 5)))]
)
@pytest.mark.parametrize("factorise", [cholesky, eigh, qr, svd], ids=lambda factorise: factorise.__name__)
def test_the_factors_multiply_to_the_matrix(factorise, shape):
    a = positive(*shape) if factorise in (cholesky, eigh) else matrices(*shape)
    with jax.enable_x64(True):
        # Condition numbers of at most 100 times the rounding of float64.
        np.testing.assert_allclose(jax.jit(product(factorise))(a), a, rtol=0, atol=1e-12)
        if a.ndim == 4:
            mapped = jax.jit(jax.vmap(jax.vmap(product(factorise)), in_axes=1, out_axes=1))(a)
            np.testing.assert_allclose(mapped, a, rtol=0, atol=1e-12)


def test_triangular_solves_are_those_of_numpy():
    factor, b = np.linalg.cholesky(positive(3, 5, 5)), matrices(3, 5, 2)
    garbage = factor + np.triu(np.full((5, 5), np.nan), 1)  # above the diagonal nothing is read
    with jax.enable_x64(True):
        for solve, matrix in ((solve_lower, factor), (solve_lower_transposed, factor.swapaxes(-1, -2))):
            expected = np.linalg.solve(matrix, b)
            np.testing.assert_allclose(jax.jit(solve)(garbage, b), expected, rtol=0, atol=1e-12)
            # One right side for all.
            mapped = jax.jit(jax.vmap(solve, in_axes=(0, None)))(factor, b[0])
            np.testing.assert_allclose(mapped, np.linalg.solve(matrix, b[:1]), rtol=0, atol=1e-12)


def test_a_matrix_that_is_not_positive_definite_has_no_factor():
    a = np.stack([np.eye(3, dtype=np.float32), -np.eye(3, dtype=np.float32)])
    factor = cholesky(a)
    np.testing.assert_array_equal(factor[0], np.eye(3))
    assert jnp.isnan(factor[1][np.tril_indices(3)]).all()


def lapack_calls(tree):
    """What a module calls of jax's linear algebra, norms aside: "jnp.linalg.svd"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield node.module
        if isinstance(node, ast.Attribute):
            *module, name = ast.unparse(node).split(".")
            if ".".join(module) in MODULES and name != "norm":
                yield f"{'.'.join(module)}.{name}"


def test_only_this_module_calls_lapack():
    callers = [
        str(path.relative_to(ROOT))
        for folder in ("efficient_tx", "lra")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if any(lapack_calls(ast.parse(path.read_text())))
    ]
    assert callers == ["efficient_tx/numerics/factorisations.py"]


INDEPENDENT = """
import jax, jax.numpy as jnp, numpy as np
from efficient_tx.numerics.factorisations import cholesky, eigh, qr, solve_lower, svd

def program(x):
    a = jnp.broadcast_to(2 * jnp.eye(32) + x, (16, 32, 32))
    solved = [solve_lower(k * a, a) for k in (1, 2, 3)]
    return sum(jax.tree.map(jnp.sum, jax.tree.leaves([solved, cholesky(a), cholesky(2 * a), eigh(a), qr(a), svd(a)])))

step = jax.pmap(program)
for _ in range(30):
    out = step(np.linspace(0, 0.1, jax.device_count()))
print(jax.device_count(), np.isfinite(out).all())
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_independent_solves_on_few_threads_end(devices):
    """With jaxlib 0.10's batched calls two threads wait for ever here, on one device already."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", INDEPENDENT], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "NPROC": "2", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.split() == [str(devices), "True"], done.stderr
