"""gated_linear_attention against the sum over all pairs in NumPy, its gradients, its states and its errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels import gated_linear_attention as uncompiled
from efficient_tx.kernels.gated_linear_attention import pallas_gpu, pallas_tpu
from tests.support.races import races_found, two_cores

STATIC = ("scale", "reverse", "implementation", "interpret", "block_sizes")
gated_linear_attention = jax.jit(uncompiled, static_argnames=STATIC)

LENGTH = 75  # no multiple of a chunk: two chunks of 64, or three of 32
GATES = {
    "none": lambda r: None,
    "constant": lambda r: -r.exponential(0.2, 4),
    "head": lambda r, length=LENGTH, dim=6: -r.exponential(0.3, (2, length, 4)),
    "channel": lambda r, length=LENGTH, dim=6: -r.exponential(0.3, (2, length, 4, dim)),
}


def arrays(seed, length=LENGTH, *, heads=4, groups=2, dim=6, v_dim=3, batch=2):
    r = np.random.default_rng(seed)
    shapes = (batch, length, heads, dim), (batch, length, groups, dim), (batch, length, groups, v_dim)
    return [r.normal(size=shape) for shape in shapes]


def formula(q, k, v, log_decay=None, state=None, mask=None, scale=None):
    """Every pair of tokens by itself, in float64: the output, and the state after the last token."""
    (batch, length, heads, dim), groups = q.shape, k.shape[2]
    decay = np.zeros((batch, length, heads, dim))
    if log_decay is not None:
        decay[:] = log_decay.reshape(log_decay.shape + (1,) * (log_decay.ndim < 4))
    real = np.ones((batch, length), bool) if mask is None else mask
    decay[~real] = 0
    out, end = np.zeros((batch, length, heads, v.shape[-1])), np.zeros((batch, heads, dim, v.shape[-1]))

    def reaches(b, h, i):
        """What of the start and of each token is left after token i."""
        from_start = 0 if state is None else np.exp(decay[b, : i + 1, h].sum(0))[:, None] * state[b, h]
        g = h // (heads // groups)
        return from_start + sum(
            np.outer(np.exp(decay[b, j + 1 : i + 1, h].sum(0)) * k[b, j, g], v[b, j, g])
            for j in range(i + 1) if real[b, j]
        )  # fmt: skip

    for b, h in np.ndindex(batch, heads):
        for i in range(length):
            if real[b, i]:
                out[b, i, h] = (dim**-0.5 if scale is None else scale) * q[b, i, h] @ reaches(b, h, i)
        end[b, h] = reaches(b, h, length - 1)
    return out, end


@pytest.mark.parametrize(
    ("gate", "reverse"), [("constant", False), ("none", False), ("head", True), ("channel", True), ("channel", False)]
)
@pytest.mark.first(1)
def test_equals_the_sum_over_pairs_and_its_gradients(gate, reverse):
    """Values against NumPy, gradients against automatic differentiation of the recurrence, both in float64."""
    r = np.random.default_rng(1)
    q, k, v = arrays(0)
    mask = None if gate == "none" else r.random((2, LENGTH)) < 0.7
    log_decay, start = GATES[gate](r), r.normal(size=(2, 4, 6, 3))
    tokens = [q, k, v, log_decay, mask]
    if reverse:
        tokens = [None if x is None else x[:, ::-1] for x in tokens]
    expected, end = formula(*tokens[:4], start, tokens[4], scale=0.7)
    expected = (expected[:, ::-1] if reverse else expected), end
    w = [r.normal(size=x.shape) for x in expected]

    def loss(inputs, implementation):
        q, k, v, log_decay, start = inputs
        results = gated_linear_attention(
            q, k, v, log_decay=log_decay, initial_state=start, mask=mask, scale=0.7, reverse=reverse,
            implementation=implementation,
        )  # fmt: skip
        return sum(map(jnp.vdot, results, w)), results

    with jax.enable_x64(True):
        inputs = (q, k, v, log_decay, start)
        run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
        (_, ours), gradients = run(inputs, "xla")
        (_, plain), plain_gradients = run(inputs, "reference")
    # Sums of at most 75 · 6 terms of order 1 in float64; the gradient of a constant decay sums 150 of those.
    for result in (ours, plain):
        np.testing.assert_allclose(result[0], expected[0], atol=1e-12)
        np.testing.assert_allclose(result[1], expected[1], atol=1e-12)
    for got, want in zip(*map(jax.tree.leaves, (gradients, plain_gradients))):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_a_sequence_in_pieces_is_the_whole():
    """The second piece is one token: what decoding does at every step."""
    inputs = [*arrays(0), GATES["channel"](np.random.default_rng(1))]
    with jax.enable_x64(True):

        def run(piece, state):
            q, k, v, log_decay = (x[:, piece] for x in inputs)
            return gated_linear_attention(q, k, v, log_decay=log_decay, initial_state=state)

        whole, end = run(slice(None), None)
        parts, state = [], None
        for piece in (slice(0, 37), slice(37, 38), slice(38, None)):
            out, state = run(piece, state)
            parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-13)  # float64 rounding
    np.testing.assert_allclose(state, end, atol=1e-13)


@pytest.mark.parametrize("gate", ["channel", "head"])
@pytest.mark.first(1)
def test_decays_of_any_strength_in_float32(gate):
    """exp of a cumulative sum overflows here, and a difference of two cumulative sums has no digits left."""
    q, k, v = (x.astype(np.float32) for x in arrays(0))
    r = np.random.default_rng(2)
    log_decay = GATES[gate](r)
    # One example of −4 to −11 a token, −480 a chunk; one of mild decays and now and then a very strong one.
    log_decay[0] = -r.uniform(4, 11, log_decay[0].shape)
    hard = r.random(log_decay[1].shape) < 0.1
    log_decay[1] = np.where(hard, r.choice([-300.0, -1e6, -np.inf], hard.shape), log_decay[1])
    log_decay = log_decay.astype(np.float32)
    expected, _ = formula(q, k, v, log_decay)
    w = r.normal(size=expected.shape).astype(np.float32)

    def loss(inputs, w, implementation):
        q, k, v, log_decay = inputs
        out, _ = gated_linear_attention(q, k, v, log_decay=log_decay, implementation=implementation)
        return jnp.vdot(out, w), out

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)
    inputs = (q, k, v, log_decay)
    gradients, out = run(inputs, w, "xla")
    with jax.enable_x64(True):
        exact, _ = run([x.astype(np.float64) for x in inputs], w.astype(np.float64), "reference")
    # Sums of at most 75 · 6 float32 products, which the decays only shorten.
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    for got, want in zip(gradients, exact):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


# Chunks of 16 tokens: the lengths of the tests are no multiple of them, and have several; on TPUs two chunks a block,
# on GPUs several blocks of channels.
PALLAS = {
    "pallas_tpu": pallas_tpu.BlockSizes(chunk=16, tokens=32),
    "pallas_gpu": pallas_gpu.BlockSizes(chunk=16, keys=16, carried=16, values=16),
}
slow = pytest.mark.slow


def operands(gate, length=37, dim=20, v_dim=18):
    """q, k, v, log_decay and the initial state; a tenth of the decays are very strong, also −inf."""
    r = np.random.default_rng(3)
    log_decay = None
    if gate != "none":
        log_decay = GATES[gate](r) if gate == "constant" else GATES[gate](r, length, dim)
        log_decay = np.where(
            r.random(log_decay.shape) < 0.1, r.choice([-300, -1e6, -np.inf], log_decay.shape), log_decay
        )
    return [*arrays(4, length, dim=dim, v_dim=v_dim), log_decay, r.normal(size=(2, 4, dim, v_dim))]


def results_and_gradients(inputs, mask=None, **options):
    """Output, final state and the gradients of a sum of both with fixed weights, for float32 or float64 inputs."""
    r = np.random.default_rng(5)
    q, _, v, *_ = inputs
    w = r.normal(size=(*q.shape[:3], v.shape[3])), r.normal(size=inputs[4].shape)

    def loss(inputs):
        q, k, v, log_decay, state = inputs
        results = uncompiled(q, k, v, log_decay=log_decay, initial_state=state, mask=mask, scale=0.7, **options)
        return sum(jnp.vdot(x.astype(state.dtype), y) for x, y in zip(results, w)), results

    gradients, results = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    return jax.tree.leaves((results, gradients))


def exact(inputs, **options):
    with jax.enable_x64(True):
        inputs = [None if x is None else np.asarray(x, np.float64) for x in inputs]
        return results_and_gradients(inputs, implementation="reference", **options)


@pytest.mark.parametrize("implementation", PALLAS)
@pytest.mark.parametrize(
    ("gate", "reverse", "length"),
    [
        ("channel", True, 37),
        pytest.param("head", False, 37, marks=slow),
        pytest.param("none", True, 37, marks=slow),
        pytest.param("head", True, 5, marks=slow),  # a block has as many places outside as tokens
        pytest.param("channel", False, 1, marks=slow),
    ],
)
@pytest.mark.first(1)
def test_kernels_equal_the_recurrence_and_its_gradients(implementation, gate, reverse, length):
    """In float32 with decays of any strength and one example of padding only."""
    inputs = operands(gate, length)
    mask = np.random.default_rng(6).random((2, length)) < 0.8
    mask[1] = False
    expected = exact(inputs, mask=mask, reverse=reverse)
    inputs = [None if x is None else x.astype(np.float32) for x in inputs]
    got = results_and_gradients(
        inputs, mask, reverse=reverse, implementation=implementation, interpret=True,
        block_sizes=PALLAS[implementation],
    )  # fmt: skip
    for ours, want in zip(got, expected, strict=True):
        # Sums of at most 37 · 20 float32 products, which the decays only shorten.
        np.testing.assert_allclose(ours, want, rtol=0, atol=2e-6 * np.abs(want).max())


@slow
@pytest.mark.parametrize(("implementation", "gate"), [("pallas_tpu", "channel"), ("pallas_gpu", "head")])
def test_kernels_multiply_bfloat16(implementation, gate):
    """Without races on TPUs. The factors of products are rounded, by at most 2⁻⁹ relative."""
    q, k, v, log_decay, state = operands(gate)
    inputs = [*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), *(x.astype(np.float32) for x in (log_decay, state))]
    on_tpu = implementation == "pallas_tpu"
    got = results_and_gradients(
        inputs, implementation=implementation, block_sizes=PALLAS[implementation],
        interpret=two_cores() if on_tpu else True,
    )  # fmt: skip
    assert not on_tpu or not races_found()
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32, *(x.dtype for x in inputs)]
    for ours, want in zip(got, exact(inputs), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), want, rtol=0, atol=2**-7 * np.abs(want).max())


def gradients(q, log_decay, **options):
    """Of the sum of squares of the output, recomputed in the backward pass."""
    run = jax.checkpoint(lambda q, log_decay: uncompiled(q, q, q, log_decay=log_decay, **options)[0])
    return jax.grad(lambda *inputs: jnp.sum(jnp.square(run(*inputs))), (0, 1))(q, log_decay)


def sharded(run, **options):
    """`run` with the batch over two devices."""
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.sharding.PartitionSpec("i")
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(specs, specs), out_specs=(specs, specs), **options))


@slow
@pytest.mark.parametrize("implementation", PALLAS)
def test_kernels_under_transformations(implementation):
    """The gradient of a checkpointed sum is the same mapped by vmap, by shard_map over devices, and by neither."""
    q, _, _, log_decay, _ = (x.astype(np.float32) for x in operands("head", 20, 5))
    run = partial(gradients, implementation=implementation, interpret=True, block_sizes=PALLAS[implementation])
    whole = jax.jit(run)(q, log_decay)
    mapped = jax.jit(jax.vmap(run))(q[:, None], log_decay[:, None])
    parts = sharded(run, check_vma=False)(q, log_decay)  # the loops of jax's interpreter fail the check
    for one, other, third in zip(whole, mapped, parts, strict=True):
        np.testing.assert_allclose(other[:, 0], one, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(third, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", PALLAS)
def test_kernels_are_traced_within_shard_map(implementation):
    """Where jax checks what varies over devices, and with the implementation's own block sizes."""
    arrays = [jax.ShapeDtypeStruct((2, 300, 4, 8), dtype) for dtype in (jnp.bfloat16, jnp.float32)]
    traced = sharded(partial(gradients, implementation=implementation)).trace(*arrays)
    assert "gated_linear_attention_gradients" in str(traced.jaxpr)


@pytest.mark.quick
def test_kernels_say_what_they_cannot_do():
    q, k, v = (jnp.zeros((2, 7, 4, dim), jnp.float16) for dim in (300, 300, 8))
    with pytest.raises(ValueError, match="cannot use implementation 'pallas_tpu': dtype float16"):
        uncompiled(q, k, v, implementation="pallas_tpu")
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    with pytest.raises(ValueError, match="'pallas_tpu': head_dim 300: tiles of at most 256 fit"):
        uncompiled(q, k, v.astype(jnp.float32), implementation="pallas_tpu")
    with pytest.raises(ValueError, match="'pallas_gpu': precision F32_F32_F32"):
        uncompiled(q, k, v, implementation="pallas_gpu", precision=jax.lax.DotAlgorithmPreset.F32_F32_F32)


@pytest.mark.quick
def test_without_decay_it_is_causal_linear_attention():
    q, k, v = arrays(0, groups=4)
    weights = np.tril(np.einsum("bihk,bjhk->bhij", q, k))
    with jax.enable_x64(True):
        out, state = gated_linear_attention(q, k, v, scale=1.0)
    np.testing.assert_allclose(out, np.einsum("bhij,bjhv->bihv", weights, v), atol=1e-12)
    np.testing.assert_allclose(state, np.einsum("bjhk,bjhv->bhkv", k, v), atol=1e-12)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_padding_is_an_identity_step_whatever_it_holds(implementation):
    mask = np.arange(LENGTH) % 3 > 0
    tokens = [x.astype(np.float32) for x in (*arrays(0), GATES["channel"](np.random.default_rng(1)))]
    mask = np.broadcast_to(mask, (2, LENGTH)).copy()
    mask[1] = False
    hostile = [np.where(mask[..., None, None], x, np.nan) for x in tokens]

    def loss(tokens):
        q, k, v, log_decay = tokens
        out, state = gated_linear_attention(q, k, v, log_decay=log_decay, mask=mask, implementation=implementation)
        return out.sum() + state.sum(), (out, state)

    gradients, (out, state) = jax.jit(jax.grad(loss, has_aux=True))(hostile)
    q, k, v, log_decay = (x[:1, mask[0]] for x in tokens)
    alone, alone_state = gated_linear_attention(q, k, v, log_decay=log_decay)
    np.testing.assert_allclose(out[:1, mask[0]], alone, atol=1e-5)  # float32 sums in other groups
    np.testing.assert_allclose(state[:1], alone_state, atol=1e-5)
    assert (np.asarray(out)[~mask] == 0).all()
    assert (state[1] == 0).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient)[~mask] == 0).all()


def test_bfloat16_inputs_are_computed_in_float32():
    """Against the formula on the same rounded inputs: what is left is the rounding of the result, 2⁻⁹ relative."""
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in (*arrays(0), GATES["head"](np.random.default_rng(1)))]
    expected, expected_state = formula(*(np.asarray(x, np.float64) for x in inputs))
    out, state = gated_linear_attention(*inputs[:3], log_decay=inputs[3])
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(state, expected_state, atol=1e-5)


@pytest.mark.quick
def test_the_reference_differentiates_forward_and_the_others_refuse():
    q, k, v = arrays(0, 5)
    with jax.enable_x64(True):

        def run(q, implementation):
            return uncompiled(q, k, v, implementation=implementation)[0]

        _, tangent = jax.jvp(lambda q: run(q, "reference"), (q,), (q,))
        np.testing.assert_allclose(tangent, run(q, "reference"), atol=1e-12)  # linear in q
        with pytest.raises(NotImplementedError, match=r"gated_linear_attention: forward-mode.*'reference' only"):
            jax.jvp(lambda q: run(q, "xla"), (q,), (q,))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"implementation": "triton"},
            "gated_linear_attention has no implementation 'triton': choose one of pallas_tpu,",
        ),
        ({"interpret": True}, "interpret=True is for Pallas kernels"),
        ({"mask": np.ones((2, 8), bool)}, r"mask has shape \(2, 8\).*\(2, 7\)"),
        ({"log_decay": np.zeros((2, 7))}, r"log_decay has shape \(2, 7\): pass \(2, 7, 4, 6\), \(2, 7, 4\), \(4,\) or"),
        ({"initial_state": np.zeros((2, 4, 3, 6))}, r"initial_state has shape.*here it is \(2, 4, 6, 3\)"),
    ],
)
def test_what_cannot_be_done_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        uncompiled(*arrays(0, 7), **options)
    assert "\n" not in str(raised.value)


def test_shapes_that_do_not_fit_are_named():
    q, k, v = arrays(0, 7)
    for wrong in ((q[:, :, :3], k, v), (q[..., :4], k, v), (q[:, :6], k, v), (q, k, v[:, :6]), (q[0], k[0], v[0])):
        with pytest.raises(ValueError, match="shape"):
            uncompiled(*wrong)
