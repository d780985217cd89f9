"""The seam of the kernels: which implementation a program gets on which platform, and what is said of the others."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels import delta_rule, gated_linear_attention, linear_scan
from efficient_tx.kernels.op import Op


def times(factor, reason=None):
    """An implementation of x·y with a factor that tells which one ran."""

    def backward(options, sizes, arrays, outputs, saved, cotangents):
        _, y = arrays
        return factor * cotangents * y, None

    return types.SimpleNamespace(
        unsupported=lambda options, *arrays: reason,
        sizes=lambda options, *arrays: None,
        forward=lambda options, sizes, x, y, **interpret: (factor * x * y, None),
        backward=lambda *args, **interpret: backward(*args),
    )


class Factors(Op):
    """An operation of modules that are made here."""

    def module(self, implementation):
        return MODULES[implementation]


MODULES = {
    "pallas_tpu": times(2),
    "pallas_gpu": times(3),
    "xla": times(5),
    "reference": types.SimpleNamespace(unsupported=lambda *_: None, forward=lambda options, x, y: 7 * x * y),
}
OP = Factors("factors", tuple(MODULES))
X, Y = jnp.array([1.0, 2.0]), jnp.array([3, 4])


def constants(function, platform):
    """The program's text on that platform."""
    return jax.jit(function).trace(X).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("platform", "factor"), [("tpu", 2), ("cuda", 3), ("cpu", 5), ("rocm", 5)])
def test_a_program_has_the_implementation_of_its_platform_and_no_other(platform, factor):
    for function in (lambda x: OP(None, "options", x, Y), jax.grad(lambda x: OP(None, "options", x, Y).sum())):
        text = constants(function, platform)
        assert [f for f in (2, 3, 5, 7) if f"dense<{f}.0" in text] == [factor]


def test_it_runs_and_has_the_gradient_of_its_implementation_under_all_transformations():
    def loss(x, implementation=None):
        return OP(implementation, "options", x, Y).sum()

    for implementation, factor in ((None, 5), ("xla", 5), ("reference", 7)):
        np.testing.assert_array_equal(OP(implementation, "options", X, Y), factor * X * Y)
        np.testing.assert_array_equal(jax.grad(loss)(X, implementation), factor * Y)
    rows = jnp.stack([X, 2 * X])
    np.testing.assert_array_equal(jax.vmap(lambda x: OP(None, "options", x, Y))(rows), 5 * rows * Y)
    np.testing.assert_array_equal(jax.vmap(jax.grad(jax.checkpoint(loss)))(rows), [5 * Y, 5 * Y])
    np.testing.assert_array_equal(jax.pmap(jax.grad(loss))(rows), [5 * Y, 5 * Y])
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("devices")
    mapped = jax.shard_map(
        jax.grad(lambda x: OP(None, "options", x, jnp.array(4)).sum()), mesh=mesh, in_specs=spec, out_specs=spec
    )
    np.testing.assert_array_equal(mapped(X), [20, 20])


def test_what_is_named_is_used_or_says_why_not(monkeypatch):
    text = constants(lambda x: OP("pallas_tpu", "options", x, Y), "tpu")
    assert "dense<2.0" in text and "dense<5.0" not in text
    np.testing.assert_array_equal(OP("pallas_tpu", "options", X, Y, interpret=True), 2 * X * Y)

    def named(x):
        return OP("pallas_tpu", "options", x, Y).sum()

    for run, x in ((named, X), (jax.jit(named), X), (jax.grad(named), X), (jax.vmap(named), jnp.ones((3, 2)))):
        with pytest.raises(NotImplementedError, match=r"factors: implementation='pallas_tpu' runs on tpu only"):
            run(x)
    with pytest.raises(ValueError, match="has no implementation 'pallas': choose one of pallas_tpu, pallas_gpu, xla"):
        OP("pallas", "options", X, Y)
    for implementation in (None, "xla", "reference"):
        with pytest.raises(ValueError, match="interpret=True is for Pallas kernels, pass implementation='pallas_tpu'"):
            OP(implementation, "options", X, Y, interpret=True)
    monkeypatch.setitem(MODULES, "pallas_tpu", times(2, "too large"))
    with pytest.raises(ValueError, match="factors cannot use implementation 'pallas_tpu': too large"):
        OP("pallas_tpu", "options", X, Y)
    text = constants(lambda x: OP(None, "options", x, Y), "tpu")
    assert "dense<5.0" in text and "dense<2.0" not in text
    monkeypatch.setitem(MODULES, "xla", times(5, "of pairs"))
    np.testing.assert_array_equal(OP(None, "options", X, Y), 7 * X * Y)


def test_forward_mode_is_the_references():
    np.testing.assert_array_equal(jax.jvp(lambda x: OP("reference", "options", x, Y), [X], [X])[1], 7 * X * Y)
    with pytest.raises(NotImplementedError, match="factors: forward-mode"):
        jax.jvp(lambda x: OP("xla", "options", x, Y), [X], [X])


def test_a_shape_is_traced_once(monkeypatch):
    traced = []
    counted = times(5)
    forward = counted.forward
    counted.forward = lambda *args: traced.append(args) or forward(*args)
    monkeypatch.setitem(MODULES, "xla", counted)
    x = jnp.ones(17)

    def layers(x):
        for _ in range(4):
            x = OP(None, "options", x, jnp.arange(17))
        return x.sum()

    jax.jit(jax.value_and_grad(layers)).lower(x)
    assert len(traced) == 1


def test_without_a_gradient_nothing_is_saved_for_one(monkeypatch):
    """The outputs of `primal` are others here, so that one sees which of the two ran."""
    lean = times(2)
    lean.primal = lambda options, sizes, x, y, **interpret: 9 * x * y
    monkeypatch.setitem(MODULES, "pallas_tpu", lean)
    op = Factors("lean", tuple(MODULES))  # programs of the other one are traced already
    value = lambda x: op(None, "options", x, Y).sum()  # noqa: E731
    for function, platform, factor in (
        (value, "tpu", 9), (jax.grad(value), "tpu", 2), (jax.grad(jax.checkpoint(value)), "tpu", 2),
        (lambda x: jax.vmap(value)(x[None]), "tpu", 9), (value, "cuda", 3), (value, "cpu", 5),
    ):  # fmt: skip
        text = constants(function, platform)
        assert [f for f in (2, 3, 5, 9) if f"dense<{f}.0" in text] == [factor]
    named = lambda x: op("pallas_tpu", "options", x, Y, interpret=True)  # noqa: E731
    np.testing.assert_array_equal(named(X), 9 * X * Y)
    np.testing.assert_array_equal(jax.vjp(named, X)[0], 2 * X * Y)


@pytest.mark.parametrize("shape", [(2, 0, 4, 6), (0, 3, 4, 6)])
def test_without_entries_a_recurrence_is_the_references_and_ends_where_it_starts(shape):
    x, draws = jnp.zeros(shape), np.random.default_rng(0)
    matrices, numbers = (jnp.asarray(draws.normal(size=(shape[0], *size)), jnp.float32) for size in ((4, 6, 6), (6,)))
    for run, start in (
        (lambda state, **by: gated_linear_attention(x, x, x, log_decay=x, initial_state=state, **by), matrices),
        (lambda state, **by: delta_rule(x, x, x, beta=x[..., 0], initial_state=state, **by), matrices),
        (lambda state, **by: linear_scan(x[:, :, 0], x[:, :, 0], initial_state=state, **by), numbers),
    ):
        out, end = run(start)
        assert out.shape[:2] == shape[:2]
        np.testing.assert_array_equal(end, start)
        np.testing.assert_array_equal(jax.grad(lambda state, run=run: run(state)[1].sum())(start), jnp.ones_like(start))
        with pytest.raises(ValueError, match=r"cannot use implementation 'xla': .* there is nothing to compute"):
            run(start, implementation="xla")
