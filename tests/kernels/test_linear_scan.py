"""linear_scan against a loop in NumPy, its gradients, its pieces and its errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels import linear_scan as uncompiled
from efficient_tx.kernels.linear_scan import pallas_gpu, pallas_tpu, xla
from tests.support.races import races_found, two_cores

STATIC = ("reverse", "implementation", "interpret", "block_sizes")
linear_scan = jax.jit(uncompiled, static_argnames=STATIC)


def inputs(seed, kind, length=37, dim=5, batch=2):
    """x, log_decay and the initial state; a tenth of the decays forgets everything, or all but everything."""
    r = np.random.default_rng(seed)
    x, state = r.normal(size=(batch, length, dim)), r.normal(size=(batch, dim))
    log_decay = -r.exponential(0.3, x.shape)
    log_decay = np.where(r.random(x.shape) < 0.1, r.choice([-300.0, -1e6, -np.inf], x.shape), log_decay)
    if kind == "complex":
        x, state = x + 1j * r.normal(size=x.shape), state + 1j * r.normal(size=state.shape)
        log_decay = log_decay + 1j * r.uniform(-4, 4, x.shape)
    return x, log_decay, state


def formula(x, log_decay, state, reverse=False):
    states = np.zeros(x.shape, np.result_type(x, log_decay))
    decay = np.exp(log_decay.real) * (np.exp(1j * log_decay.imag) if np.iscomplexobj(log_decay) else 1)
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        state = decay[:, t] * state + x[:, t]
        states[:, t] = state
    return states, state


def value_and_gradients(arrays, weights, run=linear_scan, **options):
    """The results, and the gradients of the real part of their sum with weights."""

    def loss(arrays, weights):
        x, log_decay, state = arrays
        results = run(x, log_decay, initial_state=state, **options)
        return sum(jnp.sum(w * r) for w, r in zip(weights, results)).real, results

    (_, results), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays, weights)
    return results, gradients


@pytest.mark.parametrize(("kind", "reverse"), [("real", False), ("real", True), ("complex", False)])
def test_equals_the_loop_and_its_gradients(kind, reverse):
    """Values against NumPy, gradients against automatic differentiation of the recurrence, both in float64."""
    arrays = inputs(0, kind)
    expected = formula(*arrays, reverse)
    r = np.random.default_rng(1)
    weights = [r.normal(size=x.shape) + (1j * r.normal(size=x.shape) if kind == "complex" else 0) for x in expected]
    with jax.enable_x64(True):
        plain, plain_gradients = value_and_gradients(arrays, weights, implementation="reference", reverse=reverse)
        ours, gradients = value_and_gradients(arrays, weights, implementation="xla", reverse=reverse)
    for results in (plain, ours):
        for got, want in zip(results, expected):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)  # float64 rounding
    for got, want in zip(gradients, plain_gradients):
        assert np.abs(want).max() > 1
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.first(1)
def test_the_associative_scan_of_accelerators_is_the_same(monkeypatch, reverse):
    """It is in no program for a CPU, so it is put there, at a length that no other test has a program of."""
    monkeypatch.setattr(xla, "by_platform", lambda alternatives, *args: alternatives["default"](*args))
    arrays = inputs(2, "complex", length=41)
    with jax.enable_x64(True):
        plain, plain_gradients = value_and_gradients(arrays, [1.0, 2.0], implementation="reference", reverse=reverse)
        ours, gradients = value_and_gradients(arrays, [1.0, 2.0], implementation="xla", reverse=reverse)
    for got, want in zip((*ours, *gradients), (*plain, *plain_gradients)):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)  # float64 rounding


# Blocks of 16 tokens: the lengths of the tests are no multiple of them, and have several.
PALLAS = {
    "pallas_tpu": pallas_tpu.BlockSizes(tokens=16, channels=128),
    "pallas_gpu": pallas_gpu.BlockSizes(tokens=16, together=2, channels=4),
}
slow = pytest.mark.slow


@pytest.mark.parametrize("implementation", PALLAS)
@pytest.mark.parametrize(
    ("kind", "reverse", "shape"),
    [
        ("real", False, (37, 5)),
        pytest.param("real", True, (37, 5), marks=slow),
        pytest.param("real", False, (16, 130), marks=slow),
        pytest.param("real", True, (1, 3), marks=slow),
        pytest.param("complex", False, (37, 5), marks=slow),
        pytest.param("complex", True, (37, 5), marks=slow),
    ],
)
@pytest.mark.first(1)
def test_kernels_equal_the_recurrence_and_its_gradients(implementation, kind, reverse, shape):
    arrays = inputs(6, kind, *shape)
    with jax.enable_x64(True):
        expected = value_and_gradients(arrays, [1.0, 2.0], implementation="reference", reverse=reverse)
    arrays = [x.astype(np.complex64 if kind == "complex" else np.float32) for x in arrays]
    got = value_and_gradients(
        arrays, [1.0, 2.0], implementation=implementation, interpret=True, reverse=reverse,
        block_sizes=PALLAS[implementation],
    )  # fmt: skip
    for ours, exact in zip(*map(jax.tree.leaves, (got, expected))):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)  # float32 rounding, of up to 37 terms of order 1


@pytest.mark.slow
def test_the_tpu_kernel_has_no_race_and_reads_bfloat16():
    """Two cores share the parallel axes; the gradients are rounded to bfloat16, 2⁻⁹ relative."""
    x, log_decay, state = inputs(7, "real", 37, 130)
    x, log_decay = (jnp.asarray(x, jnp.bfloat16) for x in (x, log_decay))
    (states, _), gradients = value_and_gradients(
        (x, log_decay, state.astype(np.float32)), [1.0, 2.0], implementation="pallas_tpu", interpret=two_cores(),
        block_sizes=PALLAS["pallas_tpu"],
    )  # fmt: skip
    assert not races_found()
    with jax.enable_x64(True):
        exact = [np.asarray(x, np.float64) for x in (x, log_decay)]
        (plain, _), plain_gradients = value_and_gradients((*exact, state), [1.0, 2.0], implementation="reference")
    np.testing.assert_allclose(states, plain, rtol=1e-5, atol=1e-5)
    for ours, want in zip(gradients, plain_gradients):
        np.testing.assert_allclose(np.asarray(ours, np.float64), want, rtol=2**-8, atol=1e-4)


def gradients(x, log_decay, **options):
    """Of the sum of squares of the states, recomputed in the backward pass."""
    states = jax.checkpoint(lambda x, log_decay: uncompiled(x, log_decay, **options)[0])
    return jax.grad(lambda *arrays: jnp.sum(jnp.square(states(*arrays))), (0, 1))(x, log_decay)


def sharded(run, constant, **options):
    """`run` with the batch over four devices; the log decay is the same in all of them if it is `constant`."""
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.sharding.PartitionSpec("i"), jax.sharding.PartitionSpec(None if constant else "i")
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs, **options))


@pytest.mark.slow
def test_devices_add_their_gradients_of_what_they_share():
    x, log_decay, _ = (x.astype(np.float32) for x in inputs(8, "real", 20, 3, batch=4))
    whole = jax.jit(gradients)(x, log_decay[0, 0])
    parts = sharded(gradients, True)(x, log_decay[0, 0])
    for one, other in zip(whole, parts):
        np.testing.assert_allclose(other, one, rtol=1e-5)  # float32 sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("implementation", PALLAS)
def test_kernels_under_transformations(implementation):
    """The gradient of a checkpointed sum is the same mapped by vmap, by shard_map over devices, and by neither."""
    arrays = [x.astype(np.float32) for x in inputs(8, "real", 20, 3, batch=4)[:2]]
    run = partial(gradients, implementation=implementation, interpret=True, block_sizes=PALLAS[implementation])
    whole = jax.jit(run)(*arrays)
    mapped = jax.jit(jax.vmap(run))(*(x[:, None] for x in arrays))
    parts = sharded(run, False, check_vma=False)(*arrays)  # the loops of jax's interpreter fail the check
    for one, other, third in zip(whole, mapped, parts):
        np.testing.assert_allclose(other[:, 0], one, rtol=1e-6)
        np.testing.assert_allclose(third, one, rtol=1e-6)


@pytest.mark.parametrize("implementation", PALLAS)
def test_kernels_are_traced_within_shard_map(implementation):
    """Two kernels forward and, with other results, backward: jax checks what varies over devices."""
    arrays = [jax.ShapeDtypeStruct((4, 300, 3), dtype) for dtype in (jnp.bfloat16, jnp.float32)]
    traced = sharded(partial(gradients, implementation=implementation), False).trace(*arrays)
    assert "linear_scan_backward" in str(traced.jaxpr)


def test_a_sequence_in_pieces_is_the_whole():
    """The second piece is one token; the constant decay of all pieces is that of every token."""
    x, _, state = inputs(3, "real")
    log_decay = -np.linspace(0, 2, x.shape[2])
    with jax.enable_x64(True):
        whole, end = linear_scan(x, log_decay, initial_state=state)
        np.testing.assert_allclose(whole, formula(x, np.broadcast_to(log_decay, x.shape), state)[0], atol=1e-13)
        parts = []
        for piece in (slice(0, 20), slice(20, 21), slice(21, None)):
            part, state = linear_scan(x[:, piece], log_decay, initial_state=state)
            parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-13)  # float64 rounding
    np.testing.assert_allclose(state, end, atol=1e-13)


def test_bfloat16_inputs_are_computed_in_float32():
    """Against the loop on the same rounded inputs, with gradients in the dtypes of the inputs."""
    x, log_decay, _ = (jnp.asarray(x, jnp.bfloat16) for x in inputs(4, "real"))
    expected, _ = formula(*(np.asarray(x, np.float64) for x in (x, log_decay)), 0)
    (states, end), gradients = value_and_gradients((x, log_decay, None), [1.0, 1.0])
    assert (states.dtype, end.dtype) == (jnp.float32, jnp.float32)
    assert [g.dtype for g in gradients[:2]] == [jnp.bfloat16, jnp.bfloat16]
    np.testing.assert_allclose(states, expected, rtol=1e-5, atol=1e-5)  # float32 rounding


def test_a_real_input_with_complex_decay_has_a_real_gradient():
    x, log_decay, _ = inputs(5, "complex")
    with jax.enable_x64(True):
        results, gradients = value_and_gradients((x.real, log_decay, None), [1.0, 1.0])
        plain, plain_gradients = value_and_gradients((x.real, log_decay, None), [1.0, 1.0], implementation="reference")
    np.testing.assert_allclose(results[0], plain[0], atol=1e-12)
    assert gradients[0].dtype == np.float64
    np.testing.assert_allclose(gradients[0], plain_gradients[0], atol=1e-12)


@pytest.mark.quick
def test_the_reference_differentiates_forward_and_the_others_refuse():
    x, log_decay, _ = inputs(0, "real", length=4)
    with jax.enable_x64(True):

        def run(x, implementation):
            return uncompiled(x, log_decay, implementation=implementation)[0]

        _, tangent = jax.jvp(lambda x: run(x, "reference"), (x,), (x,))
        np.testing.assert_allclose(tangent, run(x, "reference"), atol=1e-12)  # linear in x
        with pytest.raises(NotImplementedError, match=r"linear_scan: forward-mode.*'reference' only"):
            jax.jvp(lambda x: run(x, "xla"), (x,), (x,))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("x", "log_decay", "options", "message"),
    [
        ((2, 7, 3), (2, 7, 1), {}, r"log_decay has shape \(2, 7, 1\): pass \(2, 7, 3\) or \(3,\)"),
        ((2, 7), (7,), {}, r"x has shape \(2, 7\): pass \[batch, length, dim\]"),
        ((2, 7, 3), (3,), {"initial_state": np.zeros((2, 4))}, r"initial_state has shape \(2, 4\): here it is \(2, 3"),
        ((2, 7, 3), (3,), {"implementation": "triton"}, "linear_scan has no implementation 'triton'"),
        (
            (2, 7, 3),
            (3,),
            {"interpret": True},
            "interpret=True is for Pallas kernels, pass implementation='pallas_tpu'",
        ),
        ((2, 0, 3), (3,), {"implementation": "pallas_tpu"}, "there are no tokens in x"),
        ((2, 7, 3), (3,), {"block_sizes": 3}, "block sizes are those of one implementation"),
    ],
)
def test_what_cannot_be_done_is_one_line(x, log_decay, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        uncompiled(np.zeros(x), np.zeros(log_decay), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.quick
def test_kernels_refuse_what_they_would_round():
    x = np.zeros((2, 7, 3))
    with jax.enable_x64(True), pytest.raises(ValueError, match="it computes in float32, the dtype is float64"):
        uncompiled(x, x, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="TPUs have no float16"):
        uncompiled(x.astype(np.float16), x, implementation="pallas_tpu")
