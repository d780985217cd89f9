"""The promises of every token mixer, over the table ATTENTION: a new row is covered on arrival."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION, MultiHead
from efficient_tx.tokens.rotary import rotate

FEATURES, HEADS, SHORT, LONG = 16, 2, 24, 40
LENGTHS = (24, 11, 0)  # real tokens of the three examples: full, padded, nothing but padding
BUDGET = 8  # below SHORT, so that the methods approximate
# A query sees some tokens of its past, not all of them.
WINDOWED = {"pool", "lev", "hyper", "tensor", "local", "longformer", "bigbird", "sparse"}

every = pytest.mark.parametrize("name", ATTENTION)
causal_ones = pytest.mark.parametrize("name", [name for name in ATTENTION if ATTENTION[name].can_be_causal])


def mixer(name, *, features=FEATURES, max_len=LONG, **sizes):
    options = {"heads": HEADS, "max_len": max_len, "rngs": nnx.Rngs(0)} | ATTENTION[name].within(BUDGET) | sizes
    return ATTENTION[name](features, **options)


@cache
def program(name, causal=False, **sizes):
    """The mixer's parameters, and its compiled forward pass (params, x, mask, key) -> out."""
    graphdef, params = nnx.split(mixer(name, causal=causal, **sizes))
    forward = jax.jit(lambda params, x, mask, key: nnx.merge(graphdef, params)(x, mask=mask, key=key))
    return params, forward


@cache
def gradient(name, causal=False):
    """Compiled in float64: (params, x, mask, cotangent) -> gradients by params and x of Σ out · cotangent."""
    params, forward = program(name, causal)
    loss = jax.grad(lambda params, x, mask, w: jnp.vdot(forward(params, x, mask, None), w), argnums=(0, 1))
    return params, jax.jit(loss)


def tokens(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def right_padded(lengths, length):
    return np.arange(length) < np.asarray(lengths)[:, None]


def assert_same(ours, theirs):
    """Equal up to float32 rounding: sums over other paddings may be grouped otherwise."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max(initial=1.0))


@every
def test_padding_and_other_examples_change_nothing(name):
    params, forward = program(name)
    x, mask = tokens(0, 3, SHORT, FEATURES), right_padded(LENGTHS, SHORT)
    out = np.asarray(forward(params, x, mask, None))
    assert np.isfinite(out).all()
    assert (out[~mask] == 0).all()
    assert np.abs(out[mask]).max() > 1e-3

    for other in (100 * tokens(1, *x.shape), np.nan):
        other_contents = np.where(mask[..., None], x, other).astype(np.float32)
        assert_same(forward(params, other_contents, mask, None)[mask], out[mask])

    longer = np.concatenate([x, tokens(2, 3, LONG - SHORT, FEATURES)], axis=1)
    longer_mask = right_padded(LENGTHS, LONG)
    assert_same(np.asarray(forward(params, longer, longer_mask, None))[:, :SHORT][mask], out[mask])

    other_examples = np.stack([x[1], 10 * tokens(3, SHORT, FEATURES), x[0]])
    swapped = np.asarray(forward(params, other_examples, mask[[1, 0, 0]], None))
    assert_same(swapped[0], out[1])
    assert_same(swapped[2], out[0])


@every
def test_a_mask_may_have_any_pattern(name):
    """Real tokens scattered among padding give what they give side by side."""
    params, forward = program(name)
    x = tokens(0, 3, SHORT, FEATURES)
    side_by_side = np.asarray(forward(params, x, right_padded(LENGTHS, SHORT), None))
    assert_same_scattered(params, forward, x, side_by_side)


def assert_same_scattered(params, forward, x, side_by_side):
    scattered, mask = 50 * tokens(1, 3, LONG, FEATURES), np.zeros((3, LONG), bool)
    for b, n in enumerate(LENGTHS):
        places = np.sort(np.random.default_rng(b).choice(LONG, n, replace=False))
        scattered[b, places], mask[b, places] = x[b, :n], True
    out = np.asarray(forward(params, scattered, mask, None))
    for b, n in enumerate(LENGTHS):
        assert_same(out[b][mask[b]], side_by_side[b, :n])


@every
def test_nothing_comes_of_nothing(name):
    assert mixer(name)(jnp.zeros((2, 0, FEATURES)), mask=jnp.zeros((2, 0), bool)).shape == (2, 0, FEATURES)


@every
def test_without_mask_all_tokens_are_real(name):
    params, forward = program(name)
    x = tokens(0, 3, SHORT, FEATURES)
    assert_same(forward(params, x, None, None), forward(params, x, np.ones((3, SHORT), bool), None))


@every
def test_gradients_are_finite_even_for_nothing_but_padding(name):
    with jax.enable_x64(True):
        params, grad = gradient(name)
        x, mask = tokens(0, 3, SHORT, FEATURES).astype(np.float64), right_padded(LENGTHS, SHORT)
        by_params, by_x = grad(params, x, mask, np.ones_like(x))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(by_params))
        assert np.isfinite(by_x).all()
        assert (np.asarray(by_x)[~mask] == 0).all()
        assert np.abs(np.asarray(by_x)[mask]).max() > 1e-6
        hostile = np.where(mask[..., None], x, np.nan)
        for ours, theirs in zip(
            *map(jax.tree.leaves, (grad(params, hostile, mask, np.ones_like(x)), (by_params, by_x)))
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@causal_ones
def test_causal_means_zero_jacobian_above_the_diagonal(name):
    with jax.enable_x64(True):
        params, grad = gradient(name, causal=True)
        x, mask = tokens(0, 3, SHORT, FEATURES).astype(np.float64), right_padded(LENGTHS, SHORT)
        for i in (0, 7, SHORT - 1):
            cotangent = np.zeros_like(x)
            cotangent[:, i] = 1 + tokens(i, 3, FEATURES)
            by_x = np.asarray(grad(params, x, mask, cotangent)[1])
            assert (by_x[:, i + 1 :] == 0).all()
            if name not in WINDOWED:
                assert np.abs(by_x[0, : i + 1]).max(axis=1).min() > 0


@causal_ones
def test_later_tokens_change_nothing_however_large(name):
    """Nor through a choice, an order, a stabiliser or a rounding, which no Jacobian sees."""
    params, forward = program(name, causal=True)
    x, mask = tokens(0, 3, SHORT, FEATURES), right_padded(LENGTHS, SHORT)
    out = np.asarray(forward(params, x, mask, None))
    for i in (4, 12):
        later = np.where(np.arange(SHORT)[:, None] > i, 1e3 * tokens(1, *x.shape), x)
        assert_same(np.asarray(forward(params, later, mask, None))[:, : i + 1], out[:, : i + 1])


# Options that take other ways through the code than the defaults do.
# The convolution is MultiHead's: those that project otherwise, and one for each number of projections.
CONVOLVED = [name for name, m in ATTENTION.items() if issubclass(m, MultiHead) and m.mix is not MultiHead.mix]
CONVOLVED += ["softmax", "soft", "tensor", "vmean"]

MODES = [
    ("softmax", {"positions": "rope"}),
    ("softmax", {"positions": "rope2d", "max_len": 49}),
    ("sigmoid", {"qk_norm": True, "layer_scale": 0.1}),
    ("skyformer", {"choice": "kmeans"}),
    ("skyformer", {"choice": "leverage", "inverse": "iteration"}),
    ("skyformer", {"accumulate": 2}),
    ("soft", {"grid": True, "landmarks": 64, "value_conv": 3}),
    ("soft", {"bottleneck": "convolution", "symmetric_norm": True, "inverse": "iteration"}),
    ("lev", {"attention": "polynomial"}),
    ("lev", {"attention": "polynomial", "causal": True}),
    ("lev", {"p": 3.0, "heads": 1}),
    ("longformer", {"global_projections": True}),
    ("sparse", {"pattern": "fixed"}),
    ("pool", {"grid": True, "kind": "max"}),
    ("softmax", {"positions": "rope", "conv": 3}),
    *((name, {"conv": 4, "causal": ATTENTION[name].can_be_causal}) for name in CONVOLVED),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), MODES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)))
def test_modes_keep_the_promises_about_padding(name, mode):
    params, forward = program(name, **mode)
    x, mask = tokens(0, 3, SHORT, FEATURES), right_padded(LENGTHS, SHORT)
    out = np.asarray(forward(params, x, mask, None))
    assert (out[~mask] == 0).all()
    longer = np.concatenate([x, np.full((3, LONG - SHORT, FEATURES), np.nan, np.float32)], axis=1)
    assert_same(np.asarray(forward(params, longer, right_padded(LENGTHS, LONG), None))[:, :SHORT][mask], out[mask])
    assert_same_scattered(params, forward, x, out)
    assert_same(forward(params, x[[1, 0, 0]], mask[[1, 0, 0]], None)[0], out[1])
    if mode.get("causal"):
        later = np.where(np.arange(SHORT)[:, None] > 12, 1e3 * tokens(1, *x.shape), x)
        assert_same(np.asarray(forward(params, later, mask, None))[:, :13], out[:, :13])


@causal_ones
def test_causal_keeps_the_promises_about_padding(name):
    params, forward = program(name, causal=True)
    x, mask = tokens(0, 3, SHORT, FEATURES), right_padded(LENGTHS, SHORT)
    out = np.asarray(forward(params, x, mask, None))
    longer = np.concatenate([x, tokens(2, 3, LONG - SHORT, FEATURES)], axis=1)
    assert_same(np.asarray(forward(params, longer, right_padded(LENGTHS, LONG), None))[:, :SHORT][mask], out[mask])


@pytest.mark.parametrize("name", [name for name in ATTENTION if not ATTENTION[name].can_be_causal])
def test_what_has_no_causal_form_refuses_at_construction(name):
    with pytest.raises(ValueError, match="causal"):
        mixer(name, causal=True)


@pytest.mark.parametrize("name", [name for name in ATTENTION if ATTENTION[name].needs_max_len])
def test_what_is_tied_to_the_length_says_so(name):
    with pytest.raises(ValueError, match="give max_len"):
        mixer(name, max_len=None)
    with pytest.raises(ValueError, match=f"length is {SHORT + 1}.*max_len={SHORT}"):
        mixer(name, max_len=SHORT)(jnp.zeros((1, SHORT + 1, FEATURES)))


@every
def test_randomness_is_an_argument_of_the_example(name):
    params, forward = program(name)
    x, mask = tokens(0, 3, SHORT, FEATURES), np.ones((3, SHORT), bool)
    keys, others = (jax.random.split(jax.random.key(seed), 3) for seed in (1, 2))
    sampled = np.asarray(forward(params, x, mask, keys))
    drawn = not np.allclose(sampled, forward(params, x, mask, others), rtol=1e-3, atol=1e-5)
    assert drawn == ATTENTION[name].samples

    x = np.repeat(tokens(0, 1, SHORT, FEATURES), 3, axis=0)
    evaluated = np.asarray(forward(params, x, mask, None))
    assert_same(evaluated[1], evaluated[0])  # one fixed key for every example
    np.testing.assert_array_equal(forward(params, x, mask, None), evaluated)

    params, forward = program(name, dropout=0.5)
    trained = np.asarray(forward(params, x, mask, keys))
    assert (trained[0] == 0).mean() == pytest.approx(0.5, abs=0.1)  # 384 entries: sd 0.026
    assert not np.array_equal(trained[0], trained[1])
    assert_same(forward(params, x, mask, keys[::-1])[2], trained[0])


def test_a_scalar_key_is_folded_per_row():
    params, forward = program("skyformer", dropout=0.5)
    x, mask = tokens(0, 3, SHORT, FEATURES), np.ones((3, SHORT), bool)
    rows = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(3))
    assert_same(forward(params, x, mask, jax.random.key(5)), forward(params, x, mask, rows))


@every
def test_draws_do_not_depend_on_the_padded_length(name):
    params, forward = program(name, dropout=0.5)  # compiled by the test above
    keys = jax.random.split(jax.random.key(1), 3)
    x, mask = tokens(0, 3, SHORT, FEATURES), right_padded(LENGTHS, SHORT)
    out = np.asarray(forward(params, x, mask, keys))
    longer = np.concatenate([x, np.zeros((3, LONG - SHORT, FEATURES), np.float32)], axis=1)
    longer_out = np.asarray(forward(params, longer, right_padded(LENGTHS, LONG), keys))
    assert_same(longer_out[:, :SHORT][mask], out[mask])


@every
def test_bfloat16_stays_near_float32(name):
    x, mask = tokens(0, 3, SHORT, FEATURES), right_padded(LENGTHS, SHORT)
    full = np.asarray(program(name)[1](program(name)[0], x, mask, None))
    params, forward = program(name, dtype=jnp.bfloat16)
    half = forward(params, jnp.asarray(x, jnp.bfloat16), mask, None)
    assert half.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(half, np.float32) - full) / np.linalg.norm(full)
    assert error < 0.03  # 8 bits of mantissa, 0.4 % an operation, a handful of operations


@every
def test_holds_parameters_only(name):
    variables = [variable for _, variable in nnx.to_flat_state(nnx.split(mixer(name))[1])]
    assert all(type(variable) is nnx.Param for variable in variables)
    assert all(jnp.issubdtype(variable.dtype, jnp.floating) for variable in variables)


def shapes_in(jaxpr):
    """The shapes of all values of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


@every
def test_no_array_is_quadratic_in_the_length(name):
    """Forward and backward, exact variants included: no value has two axes of the length, or as many elements."""
    length = 1536  # longer than any block
    for causal in (False, True)[: 1 + ATTENTION[name].can_be_causal]:
        graphdef, params = nnx.split(mixer(name, max_len=length, causal=causal))
        loss = jax.grad(lambda params, x, mask, graphdef=graphdef: nnx.merge(graphdef, params)(x, mask=mask).sum())
        x, mask = jnp.zeros((1, length, FEATURES)), jnp.ones((1, length), bool)
        shapes = list(shapes_in(jax.make_jaxpr(loss)(params, x, mask).jaxpr))
        assert len(shapes) > 10
        assert not [shape for shape in shapes if sum(size >= length for size in shape) > 1]
        assert max(map(math.prod, shapes)) < length**2 // 2


def test_the_search_for_quadratic_arrays_finds_them():
    found = shapes_in(jax.make_jaxpr(jax.jit(lambda x: (x @ x.T).sum()))(jnp.zeros((64, 3))).jaxpr)
    assert (64, 64) in list(found)


@pytest.mark.parametrize("name", [name for name in ATTENTION if ATTENTION[name].has_positions])
def test_rotary_positions_and_other_head_widths(name):
    """The same weights give another output when queries and keys turn; a head may be wider than features // heads."""
    params, plain = program(name, head_dim=16)
    _, turned = program(name, positions="rope", head_dim=16)
    x = tokens(0, 3, SHORT, FEATURES)
    outputs = [np.asarray(forward(params, x, None, None)) for forward in (plain, turned)]
    assert outputs[0].shape == x.shape
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


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
    x = tokens(0, 1, 5, 1, 8)
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
