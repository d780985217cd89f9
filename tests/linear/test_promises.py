"""Promises of every structured weight, over the table and over awkward sizes."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.config import schema
from efficient_tx.linear import LINEAR, LowRank, structured
from tests.support import multiplications

SIZES = [(13, 7), (1, 5), (40, 6), (6, 40)]  # prime, one, tall, wide
# Fits that end in a local optimum: how far a second projection may move, relative to the weight, by their docstring.
FITTED = {"low_rank_plus_sparse": 0.1, "sum": 0.01}
both = pytest.mark.parametrize("name", LINEAR)
# Compiled programs are of two sizes at once, of all in the slow run.
sizes = [
    SIZES[0],
    *(pytest.param(*size, marks=pytest.mark.slow) for size in SIZES[1:3]),
    SIZES[3],
]


def layer(name, n, m, seed=0, **options):
    return LINEAR[name](n, m, rngs=nnx.Rngs(seed), **options)


def made(name, n, m, **options):
    """The layer, its parameters drawn by one program."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: layer(name, n, m, **options)))
    return nnx.merge(graphdef, jax.jit(lambda: nnx.split(layer(name, n, m, **options))[1])())


def compiled(function):
    """`function` as one program, or by itself where a fit decides in Python when it is done."""

    def run(*args):
        try:
            return jax.jit(function)(*args)
        except jax.errors.TracerBoolConversionError:
            return function(*args)

    return run


@both
@pytest.mark.parametrize(("n", "m"), sizes)
@pytest.mark.first(6)
def test_is_affine_with_its_dense_weight(name, n, m):
    with jax.enable_x64(True):
        x = np.random.default_rng(1).normal(size=(2, 3, n))

        @jax.jit
        def outputs(x):
            made = layer(name, n, m, param_dtype=jnp.float64)
            made.bias[...] = jnp.arange(m, dtype=jnp.float64)
            return made(x), made(jnp.eye(n)), made.to_dense()

        out, of_units, weight = map(np.asarray, outputs(x))
    assert weight.shape == (n, m)
    # float64 rounding, and half a step in every input where a structure rounds its inputs
    step = LINEAR[name].input_step * np.abs(x).max(-1, keepdims=True)
    allowed = 1e-12 + step / 2 * np.abs(weight).sum(0)
    assert (np.abs(out - (x @ weight + np.arange(m))) <= allowed).all()
    np.testing.assert_allclose(of_units, weight + np.arange(m), rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize(("n", "m"), [SIZES[0], *sizes[1:]])
@pytest.mark.first(4)
def test_projection_is_deterministic_idempotent_and_keeps_the_bias(name, n, m):
    @compiled
    def project(kernel, bias):
        projected = LINEAR[name].from_dense(kernel, bias)
        return projected.to_dense(), projected.bias[...], projected(jnp.eye(n))

    kernel, bias = np.random.default_rng(0).normal(size=(n, m)), np.arange(m, dtype=np.float64)
    with jax.enable_x64(True):
        (once, kept, of_units), (again, *_) = (project(jnp.asarray(kernel), jnp.asarray(bias)) for _ in range(2))
        twice, *_ = project(once, jnp.asarray(bias))
    once, again, twice = map(np.asarray, (once, again, twice))
    np.testing.assert_array_equal(once, again)
    tolerance = FITTED.get(name, 1e-12)  # float64 rounding of an SVD
    assert np.linalg.norm(twice - once) <= tolerance * np.linalg.norm(kernel)
    np.testing.assert_array_equal(kept, bias)
    # The weight as a matrix is without the bias, the layer's output with it.
    np.testing.assert_allclose(of_units, once + bias, rtol=1e-12, atol=1e-12)
    # Every multiple of a layer is one of its structure, so what a projection leaves is orthogonal to what it keeps.
    assert abs(np.vdot(kernel - once, once)) <= tolerance * np.vdot(kernel, kernel)


@both
@pytest.mark.first(3)
def test_projection_of_a_layer_of_its_own_is_that_layer(name):
    @compiled
    def there_and_back():
        weight = layer(name, 24, 36, param_dtype=jnp.float64).to_dense()
        return weight, LINEAR[name].from_dense(weight).to_dense()

    with jax.enable_x64(True):
        weight, back = map(np.asarray, there_and_back())
    tolerance = FITTED.get(name, 1e-9)  # what BLAST's fit documents; of the others rounding
    assert np.linalg.norm(back - weight) <= tolerance * np.linalg.norm(weight)


def test_low_rank_projection_is_the_truncated_svd():
    kernel = np.random.default_rng(0).normal(size=(12, 9)).astype(np.float32)
    singular = np.linalg.svd(kernel, compute_uv=False)
    made = LowRank.from_dense(jnp.asarray(kernel), rank=3)
    error = np.linalg.norm(kernel - np.asarray(made.to_dense()))
    assert error == pytest.approx(np.sqrt((singular[3:] ** 2).sum()), rel=1e-5)  # float32


OTHER_STARTS = [
    ("low_rank", 64, 192, {"rank": 1}),
    ("low_rank", 192, 64, {"rank": 48}),
    ("monarch", 64, 192, {"blocks": 8}),
    ("monarch", 192, 64, {"blocks": 13}),
    ("block_diagonal", 64, 192, {"blocks": 13}),
    ("block_diagonal", 192, 64, {"blocks": 2, "shuffle": False}),
    ("block_tensor_train", 64, 192, {"rank": 1}),
    ("block_tensor_train", 192, 64, {"rank": 8}),
    ("blast", 64, 192, {"blocks": 3, "rank": 5}),
    ("blast", 192, 64, {"blocks": 8, "rank": 40}),
    ("kronecker", 64, 192, {"rank": 2}),
    ("kronecker", 192, 64, {"rank": 16}),
]
STARTS = [
    *((name, 130, 515, {}) for name in LINEAR),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHER_STARTS),
]


@pytest.mark.parametrize(("name", "n", "m", "options"), STARTS)
@pytest.mark.slow
def test_output_variance_at_the_start_is_a_dense_layers(name, n, m, options):
    seeds = 24
    x = jax.random.normal(jax.random.key(1), (256, n))

    @jax.jit
    def variance(keys, x):
        return jnp.mean(jax.lax.map(lambda key: jnp.var(layer(name, n, m, key, **options)(x)), keys))

    # A factor's mean square has the relative variance 2 / entries over draws, and so does that of the 256 n inputs.
    factors = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: layer(name, n, m, use_bias=False, **options))))
    deviation = math.sqrt(sum(2 / factor.size for factor in factors if factor.ndim) / seeds + 2 / x.size)
    draws = jax.random.split(jax.random.key(0), seeds)
    assert float(variance(draws, x)) == pytest.approx(1.0, abs=4 * deviation)


# By hand, without bias: 512 × 512 and 768 × 3072.
PARAMETERS = {
    "dense": (512 * 512, 768 * 3072),
    "low_rank": (2 * 512 * 128, (768 + 3072) * 192),
    "monarch": (512 * 512 // 2, 737_280),  # as the published layer
    "block_diagonal": (512 * 512 // 4, 768 * 3072 // 4),
    "block_tensor_train": (4 * (512 * 16 + 512 * 16), 4 * (768 * 48 + 3072 * 24)),
    "blast": (126 * (512 + 512 + 16), 192 * (768 + 3072 + 16)),
    "kronecker": (16 * 16 + 32 * 32, 24 * 48 + 32 * 64),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_at_usual_sizes(name):
    for (n, m), count in zip([(512, 512), (768, 3072)], PARAMETERS[name]):
        for bias in (False, True):
            made = nnx.eval_shape(lambda n=n, m=m, bias=bias: layer(name, n, m, use_bias=bias))
            assert made.parameters == count + bias * m


@both
@pytest.mark.first(5)
def test_multiplies_is_what_the_traced_layer_multiplies(name):
    for n, m in [*SIZES, (512, 512), (130, 515)]:
        made = nnx.eval_shape(lambda n=n, m=m: layer(name, n, m))
        traced = multiplications.per_row(lambda x, n=n, m=m: layer(name, n, m)(x), n)
        zeros = n * m - made.kept if hasattr(made, "kept") else 0  # of a sparse matrix, which XLA multiplies too
        assert made.multiplies == traced - zeros, (n, m)


def test_counts_of_multiplications():
    """The walker itself, on functions whose counts are known."""
    w = jnp.ones((8, 8))
    assert multiplications.per_row(lambda x: x @ w, 8) == 64
    assert multiplications.per_row(lambda x: x @ (w * w) * 2 + x**3, 8) == 64 + 8 + 16
    assert multiplications.per_row(jax.jit(jax.checkpoint(lambda x: jnp.square(x @ w))), 8) == 72
    assert multiplications.per_row(lambda x: jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0], 8) == 3 * 64
    assert multiplications.per_row(lambda x: jax.lax.cond(w[0, 0] > 0, lambda x: x @ w, lambda x: x @ w.T, x), 8) == 64
    convolution = multiplications.per_row(lambda x: jnp.fft.irfft(jnp.fft.rfft(x, 16) * jnp.fft.rfft(w[0], 16)), 8)
    assert convolution == 16 * 4 + 9 * 4 + 16 * 4
    with pytest.raises(AssertionError, match="cannot count while"):
        multiplications.per_row(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: 2 * x, x), 8)


def held_still(monkeypatch):
    """From now on `stop_gradient` gives what it gave in the first call of a function, again in every further call.

    The function then is one whose derivative, in every direction, is what autodiff computes. For a structure that
    rounds straight through, it is the layer with the roundings' errors as constants.

    Returns:
      Tells that a further call begins.
    """
    first, calls = [], []

    def stop_gradient(x):
        if len(calls) <= 1:
            first.append(x)
            return x
        return next(calls[-1])

    monkeypatch.setattr(jax.lax, "stop_gradient", stop_gradient)
    return lambda: calls.append(iter(first))


@both
@pytest.mark.slow
def test_gradient_matches_finite_differences(name, monkeypatch):
    with jax.enable_x64(True):
        graphdef, params = nnx.split(made(name, 6, 9, param_dtype=jnp.float64))
        x = np.random.default_rng(1).normal(size=(2, 6))

        def loss(params, x):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)))

        direction = jax.tree.map(lambda p: np.random.default_rng(2).normal(size=p.shape), params)
        step = 1e-6

        @jax.jit
        def slopes(params, x):
            slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (jax.grad(loss)(params, x), direction))))
            again = held_still(monkeypatch)

            def along(distance):
                again()
                return loss(jax.tree.map(lambda p, d: p + distance * d, params, direction), x)

            along(0)
            return slope, (along(step) - along(-step)) / (2 * step)

        slope, difference = slopes(params, x)
        assert float(slope) == pytest.approx(float(difference), abs=1e-7)  # rounding 1e-15 / step, curvature step²


@both
@pytest.mark.parametrize(("n", "m"), [SIZES[0], *sizes[1:]])
@pytest.mark.first(4)
def test_counts_are_what_is_stored(name, n, m):
    one = nnx.eval_shape(lambda: layer(name, n, m))
    stored = jax.tree.leaves(nnx.state(one))
    if hasattr(one, "kept"):  # a zero of its sparse matrix is not there
        one = made(name, n, m)
        one.bias[...] = np.ones(m, np.float32)
        assert one.parameters == sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(nnx.state(one)))
    else:
        assert one.parameters == sum(leaf.size for leaf in stored)
    assert one.bytes_stored == 4 * sum(leaf.size for leaf in stored)


@both
@pytest.mark.first(1)
def test_a_multiple_of_a_layer_is_a_layer(name):
    @jax.jit
    def weights():
        made = layer(name, 13, 7, param_dtype=jnp.float64)
        made.bias[...] += 1
        before = made.to_dense()
        made.rescale(3)
        return before, made.to_dense(), made.bias[...]

    with jax.enable_x64(True):
        before, after, bias = map(np.asarray, weights())
    np.testing.assert_allclose(after, 3 * before, rtol=1e-12, atol=1e-12 * np.abs(before).max())
    np.testing.assert_array_equal(bias, 1)


@pytest.mark.quick
@both
def test_computes_in_the_dtype_asked_for(name):
    made = nnx.eval_shape(lambda: layer(name, 8, 8, dtype=jnp.bfloat16))
    assert jax.eval_shape(lambda x: layer(name, 8, 8, dtype=jnp.bfloat16)(x), jnp.ones((2, 8))).dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(nnx.state(made))} == {jnp.dtype(jnp.float32)}


@pytest.mark.quick
@both
def test_the_signature_shows_all_that_the_class_takes(name):
    """That of `nnx.Linear` with more options, none of them behind `**`; what `sized_by` varies is among them."""
    shown = inspect.signature(LINEAR[name]).parameters
    assert list(shown)[:2] == ["in_features", "out_features"]
    assert {"use_bias", "dtype", "param_dtype", "rngs"} <= shown.keys()
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in shown.values())
    assert shown.keys() >= set(schema.options(LINEAR[name]))
    sized = LINEAR[name].sized_by(64, 64)
    assert sized is None or sized[0] in shown
    for options in LINEAR[name].timed_with(64):
        assert options.keys() <= shown.keys()


@pytest.mark.quick
@both
def test_holds_parameters_only(name):
    variables = [v for _, v in nnx.to_flat_state(nnx.split(nnx.eval_shape(lambda: layer(name, 8, 8)))[1])]
    assert variables
    assert all(type(v) is nnx.Param for v in variables)


@both
@pytest.mark.slow
def test_projected_without_a_bias_has_none(name):
    assert LINEAR[name].from_dense(jnp.ones((4, 4))).bias is None


@pytest.mark.quick
@both
def test_no_tokens_give_no_tokens_and_other_widths_are_refused(name):
    """Nothing is computed: an empty batch and its derivative, one vector, and inputs that padding could hide."""
    made = nnx.eval_shape(lambda: layer(name, 12, 20))
    for shape in ((0, 12), (2, 0, 12), (0, 0, 12), (12,)):

        def output(x):
            return layer(name, 12, 20)(x)

        assert jax.eval_shape(output, jnp.ones(shape)).shape == (*shape[:-1], 20)
        assert jax.eval_shape(jax.grad(lambda x: output(x).sum()), jnp.ones(shape)).shape == shape
    for wrong in ((2, 11), (2, 13), (11,), ()):
        with pytest.raises(ValueError, match=rf"x has shape .*: this {type(made).__name__} takes \[..., in_features\]"):
            made(jnp.ones(wrong))


@pytest.mark.quick
@both
def test_parameters_are_float32_where_floats_are_float64(name):
    with jax.enable_x64(True):
        made = nnx.eval_shape(lambda: layer(name, 12, 20))
    assert {p.dtype for p in jax.tree.leaves(nnx.state(made))} == {jnp.dtype(jnp.float32)}


@pytest.mark.quick
@both
def test_refuses_what_is_no_matrix(name):
    with pytest.raises(ValueError, match="from_dense takes a matrix"):
        LINEAR[name].from_dense(jnp.ones((2, 3, 4)))


@pytest.mark.quick
@both
def test_refuses_sizes_below_one(name):
    for option in {"rank", "blocks"} & set(schema.options(LINEAR[name])):
        with pytest.raises(ValueError, match=f"{option} is 0: it must be at least 1"):
            layer(name, 4, 4, **{option: 0})


def test_tokens_in_chunks_are_tokens_at_once(monkeypatch):
    """Three chunks of 128 tokens, and 383 that no such chunks divide: outputs and gradients of the dense product."""
    made = layer("block_diagonal", 16, 8)
    weight = np.asarray(made.to_dense(), np.float64) + np.zeros(8)
    monkeypatch.setattr(structured, "CHUNK", 16 * 128)
    for tokens, chunks in [((3, 128), 3), ((383,), 0)]:
        x = np.random.default_rng(0).normal(size=(*tokens, 16)).astype(np.float32)

        def output(x):
            return made(x)

        program = str(jax.make_jaxpr(output)(x))
        assert ("scan" in program) is bool(chunks) and (not chunks or f"length={chunks}" in program)
        out, pullback = jax.vjp(output, x)
        np.testing.assert_allclose(out, x @ weight, atol=1e-5)  # float32
        np.testing.assert_allclose(pullback(jnp.ones_like(out))[0], np.ones(out.shape) @ weight.T, atol=1e-5)
