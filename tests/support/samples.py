"""Queries, keys and values that several tests draw."""

import jax
import jax.numpy as jnp
import numpy as np


def attention_inputs(seed, queries, keys, *, heads=2, groups=2, dim=8, v_dim=5, batch=2):
    """Normal q `[batch, queries, heads, dim]`, k `[batch, keys, groups, dim]`, v `[batch, keys, groups, v_dim]`."""
    r = np.random.default_rng(seed)
    shapes = (batch, queries, heads, dim), (batch, keys, groups, dim), (batch, keys, groups, v_dim)
    return [r.normal(size=shape) for shape in shapes]


def scattered(lengths, length):
    """A mask `[batch, length]` with so many real tokens in each row, anywhere."""
    mask = np.zeros((len(lengths), length), bool)
    for b, n in enumerate(lengths):
        mask[b, np.random.default_rng(b).choice(length, n, replace=False)] = True
    return mask


def clusters(r, shape, sizes, spread, scale=2.0):
    """Points `[..., dim]` within `spread` of centres of length about scale · √dim, in clusters of these shares."""
    centres = scale * r.normal(size=(len(sizes), shape[-1]))
    return centres[r.choice(len(sizes), shape[:-1], p=sizes)] + spread * r.normal(size=shape)


def check_equal(ours, formula, arrays, mask, *, gradient_atol):
    """Asserts that two functions of `arrays` agree at the tokens of `mask`, and in all gradients, in float64.

    Outputs are `[batch, length, heads, dim]`, of order 1: 1e-12 is the rounding of sums over some hundred terms.
    """

    def loss(arrays, function):
        out = function(*arrays)
        w = np.random.default_rng(2).normal(size=out.shape) * mask[:, :, None, None]
        return jnp.vdot(out, w), out

    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
        (_, got), gradients = run(arrays, ours)
        (_, expected), expected_gradients = run(arrays, formula)
    np.testing.assert_allclose(np.asarray(got)[mask], np.asarray(expected)[mask], atol=1e-12)
    for gradient, wanted in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, wanted, atol=gradient_atol)
    return got
