"""The choice of a function by platform: whose program it is in, what is traced, and that it is differentiated."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels.platform import by_platform, portable

X = jnp.array([[1.0, 2.0], [3.0, 4.0]])


def times(factor, traced):
    def function(x, pair):
        traced.append(factor)
        return {"product": factor * x**2 * pair[0], "none": None, "index": pair[1]}

    return function


def chosen(traced):
    alternatives = {"tpu": times(2.0, traced), "cuda": times(3.0, traced), "default": times(5.0, traced)}
    return lambda x: by_platform(alternatives, x, (jnp.float32(1), 7))


@pytest.mark.parametrize("platforms", [("tpu",), ("cuda",), ("cpu",), ("rocm",), ("cpu", "tpu")])
def test_a_program_has_the_function_of_its_platform_and_others_are_not_traced(platforms):
    traced = []
    lowered = jax.jit(chosen(traced)).trace(X).lower(lowering_platforms=platforms)
    own = {{"tpu": 2.0, "cuda": 3.0}.get(platform, 5.0) for platform in platforms}
    assert {f for f in (2.0, 3.0, 5.0) if f"dense<{f:e}>" in lowered.as_text()} == own
    # The default's for the shapes.
    assert sorted(traced) == sorted({5.0} | own)


def test_a_portable_program_has_no_kernel_of_an_accelerator():
    """What is chosen between a CPU and others stays chosen, inside of another choice too."""

    def inner(x):
        return by_platform({"cpu": lambda x: 7 * x, "default": lambda x: 11 * x}, x)

    def run(x):
        return by_platform({"tpu": lambda x: 2 * x, "cuda": lambda x: 3 * x, "default": inner}, x)

    def factors(platforms):
        text = jax.jit(lambda x: run(x)).trace(X).lower(lowering_platforms=platforms).as_text()
        return {f for f in (2.0, 3.0, 7.0, 11.0) if f"dense<{f:e}>" in text}

    with portable():
        assert [factors((platform,)) for platform in ("cpu", "cuda", "tpu")] == [{7.0}, {11.0}, {11.0}]
        assert factors(("cpu", "cuda", "tpu")) == {7.0, 11.0}
    assert factors(("cpu", "cuda", "tpu")) == {2.0, 3.0, 7.0}


def test_it_runs_under_all_transformations():
    run = chosen([])
    for function in (run, jax.jit(run)):
        result = function(X)
        np.testing.assert_array_equal(result["product"], 5 * X**2)
        assert result["none"] is None and result["index"] == 7
    for axis in (0, 1):
        np.testing.assert_array_equal(jax.vmap(run, axis)(X)["product"], 5 * jnp.moveaxis(X, axis, 0) ** 2)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(run))(X)["product"], 5 * X**2)
    np.testing.assert_array_equal(jax.pmap(run)(X)["product"], 5 * X**2)


def test_derivatives_of_any_order_are_those_of_the_function():
    def of(x, scale=1.0):
        return by_platform({"tpu": times(2.0, []), "default": times(5.0, [])}, x, (scale, 7))["product"]

    def formula(x, scale=1.0):
        return 5 * x**2 * scale

    for derive in (
        lambda f: jax.jvp(f, [X], [2 * X]),
        lambda f: jax.grad(lambda x, scale: f(x, scale).sum(), (0, 1))(X, jnp.float32(3)),
        lambda f: jax.hessian(lambda x: (f(x) ** 2).sum())(X),
        lambda f: jax.vmap(jax.grad(lambda x: f(x).sum()))(X),
        lambda f: jax.grad(lambda x: jax.checkpoint(f)(x).sum())(X),
    ):
        jax.tree.map(np.testing.assert_array_equal, derive(of), derive(formula))


def test_shapes_are_known_before_there_is_a_device():
    """A run of several processes checks its config and joins the others before jax's backend starts."""
    lines = [
        "import jax, jax.numpy as jnp",
        "from efficient_tx.kernels import flash_attention",
        "x = jax.ShapeDtypeStruct((1, 8, 2, 4), jnp.float32)",
        "assert jax.eval_shape(lambda x: flash_attention(x, x, x), x) == x",
        "jax.config.update('jax_num_cpu_devices', 3)  # refused once the backend has started",
        "assert jax.device_count() == 3",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_a_platform_without_a_function_is_told_when_it_is_lowered():
    def run(x):
        return by_platform({"tpu": lambda x: 2 * x}, x, missing="for TPUs only")

    traced = jax.jit(run).trace(X)
    assert "stablehlo.multiply" in traced.lower(lowering_platforms=("tpu",)).as_text()
    for function in (run, jax.vmap(run), jax.grad(lambda x: run(x).sum())):
        with pytest.raises(NotImplementedError, match="for TPUs only"):
            function(X)
