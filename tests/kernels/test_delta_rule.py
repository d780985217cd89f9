"""delta_rule against a loop in NumPy, its gradients, its states and its errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels import delta_rule as uncompiled
from efficient_tx.kernels import gated_linear_attention
from efficient_tx.kernels.delta_rule import pallas_gpu, pallas_tpu
from tests.support.multiplications import jaxprs_in
from tests.support.races import races_found, two_cores

STATIC = ("scale", "reverse", "implementation", "interpret", "block_sizes")
delta_rule = jax.jit(uncompiled, static_argnames=STATIC)

LENGTH = 75  # no multiple of a chunk: two chunks of 64, or three of 32
GATES = {
    "none": lambda r, length: None,
    "constant": lambda r, length: -r.exponential(0.2, 4),
    "head": lambda r, length: forgetful(r, -r.exponential(0.3, (2, length, 4))),
    "channel": lambda r, length: forgetful(r, -r.exponential(0.3, (2, length, 4, 6))),
}


def forgetful(r, log_decay):
    """Now and then a very strong decay, of which exp of a cumulative sum, or a difference of two, has no digits."""
    return np.where(r.random(log_decay.shape) < 0.1, r.choice([-300.0, -1e6, -np.inf], log_decay.shape), log_decay)


def inputs(seed, gate, length=LENGTH, *, heads=4, groups=2, dim=6, v_dim=3, batch=2):
    """q, k, v, beta, log_decay and the initial state; keys of length 1, beta up to 2, where a step is a reflection."""
    r = np.random.default_rng(seed)
    shapes = (heads, dim), (groups, dim), (groups, v_dim)
    q, k, v = (r.normal(size=(batch, length, *shape)) for shape in shapes)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta, state = r.uniform(0, 2, (batch, length, heads)), r.normal(size=(batch, heads, dim, v_dim))
    return q, k, v, beta, GATES[gate](r, length), state


def call(arrays, run=delta_rule, **options):
    q, k, v, beta, log_decay, state = arrays
    return run(q, k, v, beta=beta, log_decay=log_decay, initial_state=state, **options)


def formula(q, k, v, beta, log_decay, state, mask=None, scale=None):
    """Token by token, in float64: the output, and the state after the last token."""
    (batch, length, heads, dim), groups = q.shape, k.shape[2]
    decay = np.ones((batch, length, heads, dim))
    if log_decay is not None:
        decay[:] = np.exp(log_decay.reshape(log_decay.shape + (1,) * (log_decay.ndim < 4)))
    out = np.zeros((batch, length, heads, v.shape[-1]))
    end = np.zeros((batch, heads, dim, v.shape[-1])) if state is None else state.astype(float)
    for b, h in np.ndindex(batch, heads):
        g = h // (heads // groups)
        for t in range(length):
            if mask is None or mask[b, t]:
                end[b, h] *= decay[b, t, h][:, None]
                end[b, h] += beta[b, t, h] * np.outer(k[b, t, g], v[b, t, g] - k[b, t, g] @ end[b, h])
                out[b, t, h] = (dim**-0.5 if scale is None else scale) * q[b, t, h] @ end[b, h]
    return out, end


def value_and_gradients(arrays, weights, **options):
    """The results, and the gradients of their sum with weights."""

    def loss(arrays, weights):
        results = call(arrays, uncompiled, **options)
        return sum(jnp.sum(w * x) for w, x in zip(weights, results)), results

    (_, results), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays, weights)
    return results, gradients


@pytest.mark.parametrize(
    ("gate", "reverse"), [("channel", False), ("none", False), ("constant", False), ("head", True), ("channel", True)]
)
@pytest.mark.first(1)
def test_equals_the_loop_and_its_gradients(gate, reverse):
    """Values against NumPy, gradients against automatic differentiation of the recurrence, both in float64."""
    arrays, r = inputs(0, gate), np.random.default_rng(1)
    mask = None if gate == "none" else r.random((2, LENGTH)) < 0.7
    tokens = [*arrays[:5], mask]
    if reverse:
        tokens = [None if x is None else x[:, ::-1] for x in tokens]
    expected, end = formula(*tokens[:5], arrays[5], tokens[5], scale=0.7)
    expected = (expected[:, ::-1] if reverse else expected), end
    weights = [r.normal(size=x.shape) for x in expected]
    options = {"mask": mask, "scale": 0.7, "reverse": reverse}
    with jax.enable_x64(True):
        ours, gradients = value_and_gradients(arrays, weights, implementation="xla", **options)
        plain, plain_gradients = value_and_gradients(arrays, weights, implementation="reference", **options)
    # Sums of at most 75 · 6 terms of order 1 in float64; the gradient of a constant decay sums 150 of those.
    for results in (ours, plain):
        for got, want in zip(results, expected):
            np.testing.assert_allclose(got, want, atol=1e-12)
    for got, want in zip(*map(jax.tree.leaves, (gradients, plain_gradients))):
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


# Chunks of 32 tokens: three of them, the last one not full.
PALLAS = {
    "pallas_tpu": pallas_tpu.BlockSizes(chunk=32, tokens=64),
    "pallas_gpu": pallas_gpu.BlockSizes(chunk=32, keys=16, carried=16, values=16),
}


@pytest.mark.parametrize(
    ("implementation", "gate", "reverse", "length"),
    [
        ("pallas_tpu", "head", False, LENGTH),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("pallas_tpu", "channel", True, LENGTH),
                ("pallas_tpu", "none", False, LENGTH),
                ("pallas_gpu", "head", False, LENGTH),
                ("pallas_gpu", "channel", True, LENGTH),
                ("pallas_gpu", "none", False, 1),
            ]
        ),
    ],
)
def test_kernels_equal_the_recurrence_and_its_gradients(implementation, gate, reverse, length):
    """One example is only padding."""
    arrays = inputs(10, gate, length)
    mask = np.broadcast_to([[True], [False]], (2, length))
    with jax.enable_x64(True):
        want = value_and_gradients(arrays, [1.0, 2.0], implementation="reference", reverse=reverse, mask=mask)
    arrays = [None if x is None else x.astype(np.float32) for x in arrays]
    got = value_and_gradients(
        arrays, [1.0, 2.0], implementation=implementation, interpret=True, reverse=reverse, mask=mask,
        block_sizes=PALLAS[implementation],
    )  # fmt: skip
    # Sums of at most 75 · 6 float32 products, which decays and corrections only shorten.
    for ours, plain in zip(*map(jax.tree.leaves, (got, want))):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * max(1, np.abs(plain).max()))


@pytest.mark.parametrize("implementation", PALLAS)
@pytest.mark.parametrize("gate", ["none", "channel"])
def test_errors_are_written_only_where_a_gradient_follows(implementation, gate):
    q, *others = (None if x is None else x.astype(np.float32) for x in inputs(13, gate, 40))
    options = {"implementation": implementation, "interpret": True, "block_sizes": PALLAS[implementation]}
    run = partial(lambda q, **options: call((q, *others), **options), **options)
    kept, _ = jax.vjp(run, q)
    for lean, full, other in zip(run(q), kept, run(q, implementation="xla", interpret=False, block_sizes=None)):
        np.testing.assert_array_equal(lean, full)
        np.testing.assert_allclose(lean, other, atol=1e-5)  # sums of at most 40 · 6 float32 products of order 1
    with_errors, without = (written(jax.make_jaxpr(f)(q).jaxpr) for f in (lambda q: jax.vjp(run, q)[0], run))
    assert len(with_errors) == len(without) + 1


def written(jaxpr):
    """The arrays that the kernels of a jaxpr write."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found += equation.outvars
        else:
            found += [array for inner in jaxprs_in(equation) for array in written(inner)]
    return found


@pytest.mark.slow
def test_gpu_kernels_with_several_tiles_of_channels():
    """40 channels of keys, in tiles of 16 and of 32, and 17 of values, in tiles of 16."""
    r = np.random.default_rng(14)
    *arrays, _, state = inputs(14, "none", 40, dim=40, v_dim=17)
    arrays = [*arrays, forgetful(r, -r.exponential(0.3, (2, 40, 4, 40))), state]
    with jax.enable_x64(True):
        want = value_and_gradients(arrays, [1.0, 2.0], implementation="reference")
    sizes = pallas_gpu.BlockSizes(chunk=16, keys=16, carried=32, values=16)
    arrays = [x.astype(np.float32) for x in arrays]
    got = value_and_gradients(arrays, [1.0, 2.0], implementation="pallas_gpu", interpret=True, block_sizes=sizes)
    # Sums of at most 40 · 40 float32 products, which decays and corrections only shorten.
    for ours, plain in zip(*map(jax.tree.leaves, (got, want))):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * max(1, np.abs(plain).max()))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", PALLAS)
def test_kernels_read_bfloat16(implementation):
    """Products of factors that are rounded to 2⁻⁹, a few of them in a row, and sums of up to 75 of those."""
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(11, "head")[:5]]
    got = value_and_gradients(
        (*arrays, None), [1.0, 1.0], implementation=implementation, interpret=True, block_sizes=PALLAS[implementation]
    )
    with jax.enable_x64(True):
        exact = [np.asarray(x, np.float64) for x in arrays]
        want = value_and_gradients((*exact, None), [1.0, 1.0], implementation="reference")
    for ours, plain in zip(*map(jax.tree.leaves, (got, want))):
        np.testing.assert_allclose(np.asarray(ours, np.float64), plain, rtol=0, atol=2**-6 * np.abs(plain).max())


@pytest.mark.slow
def test_the_tpu_kernels_have_no_race():
    """Two cores share the parallel axes, examples and heads."""
    arrays = [x.astype(np.float32) for x in inputs(12, "channel", 20)]
    options = {"implementation": "pallas_tpu", "block_sizes": pallas_tpu.BlockSizes(chunk=16, tokens=16)}
    got = value_and_gradients(arrays, [1.0, 1.0], interpret=two_cores(), **options)
    assert not races_found()
    want = value_and_gradients(arrays, [1.0, 1.0], implementation="xla")
    for ours, plain in zip(*map(jax.tree.leaves, (got, want))):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * max(1, np.abs(plain).max()))


def gradients(q, k, v, beta, log_decay, **options):
    """Of the sum of squares of the output, recomputed in the backward pass."""
    out = jax.checkpoint(lambda *arrays: call((*arrays, None), uncompiled, **options)[0])
    arrays = q, k, v, beta, log_decay
    return jax.grad(lambda *arrays: jnp.sum(jnp.square(out(*arrays))), tuple(range(5)))(*arrays)


def sharded(run, **options):
    """`run` with the batch over two devices."""
    mesh = jax.make_mesh((2,), ("i",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, **options))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", PALLAS)
def test_kernels_under_transformations(implementation):
    """The gradient of a checkpointed sum is the same mapped by vmap, by shard_map over devices, and by neither."""
    arrays = [x.astype(np.float32) for x in inputs(13, "head", 20)[:5]]
    run = partial(gradients, implementation=implementation, interpret=True, block_sizes=PALLAS[implementation])
    whole = jax.jit(run)(*arrays)
    mapped = jax.jit(jax.vmap(run))(*(x[:, None] for x in arrays))
    parts = sharded(run, check_vma=False)(*arrays)  # the loops of jax's interpreter fail the check
    for one, other, third in zip(whole, mapped, parts):
        np.testing.assert_allclose(other[:, 0], one, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(third, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", PALLAS)
def test_kernels_are_traced_within_shard_map(implementation):
    """jax checks what varies over devices, also of the initial state, which is the same in all."""
    shapes = [(2, 300, 2, 64)] * 3 + [(2, 300, 2)] * 2
    traced = sharded(partial(gradients, implementation=implementation)).trace(
        *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    )
    assert "delta_rule_gradients" in str(traced.jaxpr)


def test_a_sequence_in_pieces_is_the_whole():
    """The second piece is one token: what decoding does at every step."""
    *tokens, state = inputs(2, "channel")
    with jax.enable_x64(True):
        whole, end = call((*tokens, state))
        parts = []
        for piece in (slice(0, 37), slice(37, 38), slice(38, None)):
            out, state = call((*(x[:, piece] for x in tokens), state))
            parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-13)  # float64 rounding
    np.testing.assert_allclose(state, end, atol=1e-13)


@pytest.mark.parametrize("gate", ["channel", "head"])
@pytest.mark.first(1)
def test_decays_of_any_strength_in_float32(gate):
    """exp of a cumulative sum overflows here, and a difference of two cumulative sums has no digits left."""
    arrays = list(inputs(3, gate))
    arrays[4][0] = -np.random.default_rng(4).uniform(4, 11, arrays[4][0].shape)  # −480 a chunk
    arrays = [x.astype(np.float32) for x in arrays]
    got = value_and_gradients(arrays, [1.0, 1.0], implementation="xla")
    with jax.enable_x64(True):
        exact = [x.astype(np.float64) for x in arrays]
        want = value_and_gradients(exact, [1.0, 1.0], implementation="reference")
    np.testing.assert_allclose(want[0][0], formula(*exact)[0], atol=1e-12)
    # Sums of at most 75 · 6 float32 products, which the decays only shorten.
    for ours, plain in zip(*map(jax.tree.leaves, (got, want))):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * max(1, np.abs(plain).max()))


def test_keys_that_are_all_alike_lose_no_digits():
    """Powers of the matrix of a chunk have binomial coefficients here; what is stored is always the last value."""
    _, k, v, *_ = inputs(5, "none", groups=4)
    k[:] = k[:, :1]
    arrays = [x.astype(np.float32) for x in (k, k, v, np.ones((2, LENGTH, 4)))]
    out, _ = delta_rule(*arrays[:3], beta=arrays[3], scale=1.0, implementation="xla")
    np.testing.assert_allclose(out, arrays[2], atol=1e-5)  # float32 rounding


@pytest.mark.quick
def test_orthonormal_keys_are_recalled():
    """After six keys at right angles, written with beta 1, each query that is a key reads its value."""
    r = np.random.default_rng(6)
    k = np.linalg.qr(r.normal(size=(2, 4, 6, 6)))[0].swapaxes(1, 2)
    v, beta = r.normal(size=(2, 6, 4, 3)), np.ones((2, 6, 4))
    with jax.enable_x64(True):
        _, state = delta_rule(k, k, v, beta=beta)
    np.testing.assert_allclose(np.einsum("blhk,bhkv->blhv", k, state), v, atol=1e-12)


@pytest.mark.quick
def test_keys_at_right_angles_need_no_correction():
    """Where nothing is stored of a key it is gated linear attention with the values β v."""
    q, _, v, beta, _, _ = inputs(7, "none", 6, groups=4)
    k = np.broadcast_to(np.eye(6)[None, :, None], q.shape)
    with jax.enable_x64(True):
        out, state = delta_rule(q, k, v, beta=beta, scale=1.0)
        plain, plain_state = gated_linear_attention(q, k, v * beta[..., None], scale=1.0)
    np.testing.assert_allclose(out, plain, atol=1e-12)
    np.testing.assert_allclose(state, plain_state, atol=1e-12)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_padding_is_an_identity_step_whatever_it_holds(implementation):
    mask = np.broadcast_to(np.arange(LENGTH) % 3 > 0, (2, LENGTH)).copy()
    mask[1] = False
    tokens = [x.astype(np.float32) for x in inputs(8, "channel")[:5]]
    hostile = [np.where(mask.reshape(2, LENGTH, *(1,) * (x.ndim - 2)), x, np.nan) for x in tokens]

    def loss(tokens):
        out, state = call((*tokens, None), uncompiled, mask=mask, implementation=implementation)
        return out.sum() + state.sum(), (out, state)

    gradients, (out, state) = jax.jit(jax.grad(loss, has_aux=True))(hostile)
    alone, alone_state = call((*(x[:1, mask[0]] for x in tokens), None))
    np.testing.assert_allclose(out[:1, mask[0]], alone, atol=1e-5)  # float32 sums in other groups
    np.testing.assert_allclose(state[:1], alone_state, atol=1e-5)
    assert (np.asarray(out)[~mask] == 0).all()
    assert (state[1] == 0).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient)[~mask] == 0).all()


def test_bfloat16_inputs_are_computed_in_float32():
    """Against the formula on the same rounded inputs: what is left is the rounding of the result, 2⁻⁹ relative."""
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(9, "head")[:5]]
    expected, expected_state = formula(*(np.asarray(x, np.float64) for x in arrays), None)
    out, state = call((*arrays, None), implementation="xla")
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(state, expected_state, atol=1e-5)


@pytest.mark.quick
def test_the_reference_differentiates_forward_and_the_others_refuse():
    arrays = inputs(0, "none", 5)
    with jax.enable_x64(True):

        def run(q, implementation):
            return call((q, *arrays[1:]), uncompiled, implementation=implementation)[0]

        _, tangent = jax.jvp(lambda q: run(q, "reference"), (arrays[0],), (arrays[0],))
        np.testing.assert_allclose(tangent, run(arrays[0], "reference"), atol=1e-12)  # linear in q
        with pytest.raises(NotImplementedError, match=r"delta_rule: forward-mode.*'reference' only"):
            jax.jvp(lambda q: run(q, "xla"), (arrays[0],), (arrays[0],))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "triton"}, "delta_rule has no implementation 'triton': choose one of"),
        ({"interpret": True}, "interpret=True is for Pallas kernels"),
        ({"mask": np.ones((2, 8), bool)}, r"mask has shape \(2, 8\).*\(2, 7\)"),
        ({"beta": np.ones((2, 7, 2))}, r"beta has shape \(2, 7, 2\): pass \[batch, length, heads\], here \(2, 7, 4\)"),
        ({"log_decay": np.zeros((2, 7))}, r"log_decay has shape \(2, 7\): pass \(2, 7, 4, 6\), \(2, 7, 4\), \(4,\) or"),
        ({"initial_state": np.zeros((2, 4, 3, 6))}, r"initial_state has shape.*here it is \(2, 4, 6, 3\)"),
    ],
)
def test_what_cannot_be_done_is_one_line(options, message):
    q, k, v, beta, _, _ = inputs(0, "none", 7)
    with pytest.raises(ValueError, match=message) as raised:
        uncompiled(q, k, v, **{"beta": beta} | options)
    assert "\n" not in str(raised.value)
