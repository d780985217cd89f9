"""SOFT against NumPy: the exact limit, the published algorithm, bottleneck tokens, convolutions, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import Soft
from efficient_tx.attention import soft as uncompiled
from efficient_tx.attention.low_rank.soft import Bottleneck, gaussian_self_attention
from tests.support.samples import clusters

OPTIONS = ("landmarks", "grid", "ridge", "inverse", "iterations", "symmetric_norm")
soft = jax.jit(uncompiled, static_argnames=OPTIONS)


def gaussian(x, y):
    """exp(−‖x_i − y_j‖² / (2√K)), differences taken one by one."""
    return np.exp(-np.square(x[:, None] - y[None]).sum(-1) / (2 * x.shape[-1] ** 0.5))


def segments(x, count):
    """Means of the tokens `[n, dim]` whose ⌊i · count / n⌋ agree."""
    label = np.arange(len(x)) * count // max(len(x), 1)
    return np.array([x[label == s].mean(0) for s in range(count) if (label == s).any()])


def formula(q, v, z, ridge=0.01, symmetric_norm=False):
    """One head: q and z `[tokens, dim]`, v `[tokens, v_dim]`."""
    core, cross = gaussian(z, z), gaussian(q, z)
    d = core.sum(1, keepdims=True) ** -0.5 if symmetric_norm else 1
    return cross @ (d * np.linalg.solve(core + ridge * np.eye(len(z)), d * (cross.T @ v)))


def published(q, v, count):
    """As fudan-zvg/SOFT computes it, with average pooling: 20 Newton-Raphson iterations."""
    z = segments(q, count)
    core = gaussian(z, z)
    alpha = 0.9 * 2 / core.sum(1).max() ** 2
    core = core + 0.01 * np.eye(count)
    inverse = alpha * core
    for _ in range(20):
        inverse = 2 * inverse - inverse @ core @ inverse
    return gaussian(q, z) @ (inverse @ (gaussian(z, q) @ v))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("grid", (False, True))
def test_all_tokens_and_no_ridge_are_gaussian_self_attention(grid):
    """The exact limit; ridge 1e-12 leaves an error of that order times the condition of the kernel."""
    q, v = normal(0, 3, 25, 4, 8), normal(1, 3, 25, 2, 5)
    mask = np.stack([np.ones(25, bool), np.random.default_rng(2).random(25) < 0.6, np.zeros(25, bool)])
    with jax.enable_x64(True):
        ours = soft(q, v, mask=mask, landmarks=30, grid=grid, ridge=1e-12)
        exact = np.asarray(jax.jit(gaussian_self_attention)(q, v, mask=mask))
    for b, h in np.ndindex(3, 4):
        x, y = q[b, mask[b], h], v[b, mask[b], h // 2]
        np.testing.assert_allclose(exact[b, mask[b], h], gaussian(x, x) @ y, atol=1e-12)
    np.testing.assert_allclose(ours[mask[..., None, None] & np.ones((4, 5), bool)].ravel(),
                               exact[mask].ravel(), rtol=0, atol=1e-10)  # fmt: skip
    assert (np.asarray(ours)[2] == 0).all()


@pytest.mark.parametrize(("inverse", "symmetric_norm"), [("cholesky", False), ("iteration", True)])
@pytest.mark.first(1)
def test_output_and_gradient_are_those_of_the_formula(inverse, symmetric_norm):
    """With means of segments: automatic differentiation of the plain formula, forward and backward, in float64."""
    q, v, w = (normal(i, 2, 14, 1, 4) for i in range(3))
    mask = np.arange(14) < np.array([[14], [9]])
    q[~mask] = np.nan  # reaches nothing

    def kernel(x, y):
        return jnp.exp(-jnp.square(x[:, None] - y[None]).sum(-1) / 4)

    def plain(q, v):
        out = 0.0
        for b in range(2):
            x, y = q[b, mask[b], 0], v[b, mask[b], 0]
            label = np.arange(len(x)) * 5 // len(x)
            z = jnp.stack([x[label == s].mean(0) for s in range(5)])
            core = kernel(z, z)
            d = core.sum(1, keepdims=True) ** -0.5 if symmetric_norm else 1.0
            weights = d * jnp.linalg.solve(core + 0.01 * jnp.eye(5), d * (kernel(z, x) @ y))
            out += jnp.vdot(kernel(x, z) @ weights, w[b, mask[b], 0])
        return out

    def ours(q, v):
        options = {"inverse": inverse, "iterations": 40, "symmetric_norm": symmetric_norm}
        return jnp.where(mask[..., None, None], soft(q, v, mask=mask, landmarks=5, **options) * w, 0).sum()

    with jax.enable_x64(True):
        expected, wanted = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(q, v)
        value, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(q, v)
    np.testing.assert_allclose(value, expected, rtol=1e-10)  # float64 rounding times the condition of the core
    for got, want in zip(grads, wanted):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


def walk(r, count, dim):
    """A stationary process whose neighbours correlate by 0.99."""
    steps = r.normal(size=(count, dim))
    for t in range(1, count):
        steps[t] = 0.99 * steps[t - 1] + (1 - 0.99**2) ** 0.5 * steps[t]
    return steps


# The relative error of the output at length 384, heads of 32, for 16, 128 and 384 segment means.
KINDS = {
    "concentrated": lambda r: 0.3 * r.normal(size=(384, 32)),  # 0.068, 0.010, 0.0007
    "random": lambda r: r.normal(size=(384, 32)),  # 0.95, 0.90, 0.0095
    "smooth": lambda r: walk(r, 384, 32),  # 0.18, 0.011, 0.0018
    "clustered": lambda r: clusters(r, (384, 32), [1 / 8] * 8, 0.3),  # 1.00, 0.80, 0.0023
    "imbalanced": lambda r: clusters(r, (384, 32), [0.96] + [0.01] * 4, 0.2),  # 0.044, 0.029, 0.0004
}


@pytest.mark.slow
def test_the_error_falls_with_the_budget_and_is_at_most_the_published_one():
    """Means of consecutive tokens say little of tokens in no order, and much of smooth sequences."""
    r = np.random.default_rng(0)
    q, v = np.stack([make(r) for make in KINDS.values()]), r.normal(size=(384, 32))
    exact = [gaussian(x, x) @ v for x in q]

    def error(out):
        return np.array([np.linalg.norm(o - e) / np.linalg.norm(e) for o, e in zip(out, exact)])

    arrays = q[:, :, None].astype(np.float32), np.broadcast_to(v, q.shape)[:, :, None].astype(np.float32)
    errors = []
    for count in (16, 128, 384):
        errors.append(error(np.asarray(soft(*arrays, landmarks=count))[:, :, 0]))
        # Equal where their iteration converges, up to float32 rounding; far lower where not.
        assert (errors[-1] <= 1.001 * error([published(x, v, count) for x in q])).all()
    errors = np.array(errors)
    assert (np.diff(errors, axis=0) < 0).all()
    assert (errors[-1] < 0.01).all()  # the ridge alone is left
    assert errors[1, list(KINDS).index("smooth")] < 0.02


@pytest.mark.slow
def test_bfloat16_inputs_are_computed_in_float32():
    q, v = (normal(i, 2, 12, 2, 4).astype(jnp.bfloat16) for i in range(2))
    out = soft(q, v, landmarks=8, inverse="iteration", symmetric_norm=True)
    assert out.dtype == jnp.bfloat16
    full = soft(q.astype(np.float32), v.astype(np.float32), landmarks=8, inverse="iteration", symmetric_norm=True)
    np.testing.assert_allclose(out.astype(np.float32), full, rtol=2**-8, atol=1e-6)  # one rounding to 8 bits


@pytest.mark.slow
def test_an_example_ignores_the_others():
    """The published SOFT++ starts its iteration from one maximum over the batch."""
    q, v = (normal(i, 2, 12, 2, 4).astype(np.float32) for i in range(2))
    q[0] = q[0, :1]  # all tokens in one point: the largest row sums there can be
    options = {"inverse": "iteration", "symmetric_norm": True, "landmarks": 8}
    together, alone = (np.asarray(soft(q[i:], v[i:], **options)) for i in range(2))
    np.testing.assert_allclose(together[1:], alone, rtol=1e-5, atol=1e-5)  # float32 rounding


def gelu(x):
    return x * (1 + np.vectorize(jax.scipy.special.erf)(x / 2**0.5)) / 2


def image(x):
    """Tokens `[n, ...]` as the square image of side ⌈√n⌉ that they are, zeros after the last one."""
    side = int(np.ceil(len(x) ** 0.5))
    return np.concatenate([x, np.zeros((side**2 - len(x), *x.shape[1:]))]).reshape(side, side, *x.shape[1:])


@pytest.mark.parametrize("grid", (False, True))
def test_convolved_bottleneck_tokens(grid):
    """Windows of the real tokens of a sequence, or of their image, against loops over windows."""
    q, mask = normal(0, 2, 25, 2, 4), np.random.default_rng(1).random((2, 25)) < 0.5
    mask[0] = True
    q[0] *= 3e-3  # so that the epsilon of the norm matters
    with jax.enable_x64(True):
        bottleneck = Bottleneck(4, landmarks=9, max_len=25, grid=grid, rngs=nnx.Rngs(0))
        z, real = jax.jit(bottleneck)(jnp.asarray(q), jnp.asarray(mask))
        kernel = np.asarray(bottleneck.kernel[...], np.float64)
    assert bottleneck.stride == (2 if grid else 3)
    for b in range(2):
        x, n = q[b, mask[b]], mask[b].sum()
        if grid:
            x, exists = (np.zeros((6, 6, *shape)) for shape in ((2, 4), ()))
            picture = image(q[b, mask[b]])
            side = len(picture)
            x[:side, :side], exists[:side, :side] = picture, image(np.ones(n))
            places = [np.s_[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] for i in range(3) for j in range(3)]
            windows, exist = [x[p].reshape(4, 2, 4) for p in places], [exists[p].any() for p in places]
        else:
            x = np.pad(x, ((0, 27 - n), (0, 0), (0, 0)))
            windows, exist = list(x.reshape(9, 3, 2, 4)), np.arange(9) * 3 < n
        np.testing.assert_array_equal(real[b], exist)
        out = np.array([np.einsum("whk,wkl->hl", w, kernel) for w in windows]) * 4**-0.25  # the published scale
        out = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(z[b][real[b]], 4**0.25 * gelu(out)[exist], rtol=0, atol=1e-6)  # erf in float32
        assert (np.asarray(z[b])[~real[b]] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("grid", (False, True))
def test_convolutions_keep_the_promises_about_padding(grid):
    options = {"bottleneck": "convolution", "value_conv": 3, "grid": grid}
    mixer = Soft(8, heads=2, landmarks=4, max_len=18, rngs=nnx.Rngs(0), **options)
    run = jax.jit(lambda x, mask: mixer(x, mask=mask))
    x, places = normal(0, 1, 9, 8).astype(np.float32), np.array([0, 3, 4, 5, 9, 11, 12, 16, 17])
    results = []
    for at in (np.arange(9), places):
        padded, mask = np.full((1, 18, 8), np.nan, np.float32), np.zeros((1, 18), bool)
        padded[:, at], mask[:, at] = x, True
        results.append(np.asarray(run(padded, mask))[:, at])
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)  # float32 rounding


def test_the_module_is_its_function():
    """On a grid, under SOFT++, with values convolved: the convolution is a sum over neighbours in the image."""
    with jax.enable_x64(True):
        mixer = Soft(8, heads=2, landmarks=9, grid=True, symmetric_norm=True, value_conv=3, rngs=nnx.Rngs(0))
        x, lengths = normal(0, 2, 16, 8), (16, 7)
        mask = np.arange(16) < np.array(lengths)[:, None]
        out, *projected = jax.jit(lambda x: (mixer(x, mask=mask), mixer.q(x), mixer.v(x)))(x)
        q, v = (np.asarray(x).reshape(2, 16, 2, 4) for x in projected)
        heads, conv = np.zeros((2, 16, 2, 4)), np.asarray(mixer.conv[...])
        for (b, n), h in [(pair, h) for pair in enumerate(lengths) for h in range(2)]:
            tokens, values = q[b, :n, h], np.pad(image(v[b, :n, h]), ((1, 1), (1, 1), (0, 0)))
            side = len(values) - 2
            cell = np.array([i // side * 3 // side * 3 + i % side * 3 // side for i in range(n)])
            z = np.array([tokens[cell == c].mean(0) for c in range(9) if (cell == c).any()])
            heads[b, :n, h] = formula(tokens, v[b, :n, h], z, symmetric_norm=True)
            for i in range(n):
                near = values[i // side : i // side + 3, i % side : i % side + 3]
                heads[b, i, h] += np.einsum("ij,ijd->d", conv[..., h], near)
        expected = np.where(mask[..., None], jax.jit(lambda x: mixer.out(x))(heads.reshape(2, 16, 8)), 0)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"landmarks": 0}, "landmarks is 0"),
        ({"ridge": 0.0}, "ridge is 0.0"),
        ({"inverse": "lu"}, "inverse is 'lu': choose one of cholesky, iteration"),
        ({"iterations": 0}, "iterations is 0"),
        ({"bottleneck": "max"}, "bottleneck is 'max'"),
        ({"bottleneck": "convolution"}, "give max_len"),
        ({"value_conv": 4}, "size is 4: it must be odd"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0: it must be a number above 0"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        Soft(16, heads=2, rngs=nnx.Rngs(0), **options)
    assert "\n" not in str(raised.value)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="soft is self-attention"):
        uncompiled(jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 5, 2, 8)))
    with pytest.raises(ValueError, match="length is 8: a grid needs a square number of tokens, or a mask"):
        uncompiled(jnp.zeros((1, 8, 2, 8)), jnp.zeros((1, 8, 2, 8)), grid=True)
