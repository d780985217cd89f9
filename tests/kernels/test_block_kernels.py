"""The Pallas kernels of block_attention and sampled_block_attention, interpreted, against the formula in float64."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels import block_attention, sampled_block_attention
from efficient_tx.kernels.block_attention.lists import by_key_block, transposed, with_repeats
from efficient_tx.kernels.sampled_block_attention import regrouped
from efficient_tx.kernels.sampled_block_attention.options import Choice, Sizes
from tests.support.races import races_found, two_cores
from tests.support.samples import attention_inputs

PALLAS = ("pallas_gpu", "pallas_tpu")


def near(query, key):
    return abs(query - key) % 7 < 5


def lists(r, batch, heads, queries, keys, n):
    """Any key blocks, some twice, some none; the first of several blocks of queries has none."""
    blocks = r.integers(-1, keys, (batch, heads, queries, n)).astype(np.int32)
    blocks[:, :, : queries - 1][:, :, :1] = -1
    return blocks


def inputs(queries, keys, size, *, heads, groups, own, dim=16):
    r = np.random.default_rng(queries)
    arrays = attention_inputs(0, queries, keys, heads=heads, groups=groups, dim=dim, v_dim=32)
    counts = [-(-length // size) for length in (queries, keys)]
    return arrays, lists(r, *((2, heads) if own else (1, 1)), *counts, 3)


def both(arrays, bias, implementation, **options):
    """Output, log-sum-exp and gradients of a weighted sum of both, in float64 by the reference."""

    def loss(arrays):
        *qkv, bias = arrays
        out, lse = block_attention(*qkv, bias=bias, return_lse=True, implementation=implementation, **options)
        w = np.random.default_rng(7).normal(size=out.shape)
        return jnp.vdot(out, w.astype(out.dtype)) + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (out, lse)

    wide = implementation == "reference"
    with jax.enable_x64(wide):
        cast = [None if x is None else jnp.asarray(x, np.float64 if wide else None) for x in (*arrays, bias)]
        (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(cast)
        return [np.asarray(x, np.float64) for x in (*outputs, *gradients[: 4 if bias is not None else 3])]


def check(got, expected, tolerance):
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(
            ours, theirs, rtol=tolerance, atol=tolerance * max(1, np.abs(theirs[np.isfinite(theirs)]).max())
        )


# Queries, keys, block size, whether every head has lists of its own, and options. One list for all, whose heads are
# computed together, two key heads; lists and a bias for each query head, which share key heads; and a head size that
# fills a TPU's lanes, whose blocks have no tiles of several heads.
CASES = {
    "together": (40, 56, 16, False, {"mask": True, "causal": True, "visible": near}),
    "lists of heads": (40, 52, 32, True, {"bias": True}),
    "length last": (140, 130, 128, False, {"mask": True}),
    "one token": (1, 1, 16, True, {}),
    "whole lanes": (40, 70, 32, False, {"mask": True, "dim": 128}),
}


def case(name, dtype=np.float32):
    queries, keys, size, own, options = CASES[name]
    options = dict(options)
    heads = (4, 2) if not own else (2, 1)
    dim = options.pop("dim", 16)
    arrays, blocks = inputs(queries, keys, size, heads=heads[0], groups=heads[1], own=own, dim=dim)
    arrays = [np.asarray(x, dtype) for x in arrays]
    r = np.random.default_rng(3)
    given = {"blocks": blocks, "block_size": size} | options
    if given.pop("mask", False):  # nothing is real in the second example
        given["mask"] = r.random((2, keys)) < np.array([[0.6], [0.0]])
    bias = (
        r.normal(size=(2, arrays[0].shape[2], *blocks.shape[2:])).astype(np.float32)
        if given.pop("bias", False)
        else None
    )
    return arrays, bias, given


@pytest.mark.parametrize("implementation", PALLAS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.first(1)
def test_equals_the_formula_and_its_gradients(implementation, name):
    arrays, bias, options = case(name)
    got = both(arrays, bias, implementation, interpret=True, **options)
    assert name == "one token" or (np.isneginf(got[1]).any() and all(np.abs(x).max() > 0 for x in got[2:]))
    # Sums of at most a hundred float32 terms of order 1.
    check(got, both(arrays, bias, "reference", **options), 1e-5)


@pytest.mark.parametrize("implementation", PALLAS)
@pytest.mark.slow
def test_bfloat16_is_rounded_where_it_is_a_factor(implementation):
    arrays, bias, options = case("lists of heads", jnp.bfloat16)
    got = both(arrays, bias, implementation, interpret=True, **options)
    # Weights and their cotangents are rounded to 2⁻⁹ before a product, as inputs and outputs are.
    check(got, both([x.astype(np.float64) for x in arrays], bias, "reference", **options), 2**-6)


@pytest.mark.parametrize("name", ["together", "lists of heads"])
@pytest.mark.slow
def test_two_cores_of_a_tpu_do_not_race(name):
    arrays, bias, options = case(name)
    got = both(arrays, bias, "pallas_tpu", interpret=two_cores(), **options)
    check(got, both(arrays, bias, "reference", **options), 1e-5)
    assert not races_found()


@pytest.mark.parametrize("implementation", PALLAS)
@pytest.mark.slow
def test_works_under_vmap_checkpoint_and_shard_map(implementation):
    (q, k, v), blocks = inputs(20, 20, 16, heads=2, groups=1, own=True)
    arrays = tuple(np.stack([x, 2 * x]).astype(np.float32) for x in (q, k, v))

    def gradient(q, k, v, implementation=implementation, interpret=True):
        def loss(q, k, v):
            options = {"blocks": blocks, "block_size": 16, "implementation": implementation, "interpret": interpret}
            return jnp.square(block_attention(q, k, v, **options)).sum()

        return jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2))(q, k, v)

    plain = jax.jit(partial(gradient, implementation="xla", interpret=False))
    expected = [np.stack(x) for x in zip(*(plain(*(x[i] for x in arrays)) for i in (0, 1)))]
    check(jax.jit(jax.vmap(gradient))(*arrays), expected, 1e-5)
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("devices")
    # Without the check of what varies over devices, which the loops of jax's interpreter fail; the next test has it.
    sharded = jax.shard_map(
        lambda *x: jax.tree.map(lambda y: y[None], gradient(*(y[0] for y in x))),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    check(jax.jit(sharded)(*arrays), expected, 1e-5)


@pytest.mark.parametrize("implementation", PALLAS)
def test_is_traced_within_shard_map(implementation):
    """Where jax checks what varies over devices: the tokens do, the lists and the bias do not."""
    (q, k, v), blocks = inputs(20, 20, 16, heads=2, groups=1, own=True)
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, whole = jax.sharding.PartitionSpec("devices"), jax.sharding.PartitionSpec()

    def gradient(arrays, bias):
        def loss(arrays, bias):
            options = {"blocks": blocks[:1], "block_size": 16, "bias": bias, "implementation": implementation}
            return block_attention(*arrays, **options).sum()

        return jax.grad(loss, argnums=(0, 1))(arrays, bias)

    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(spec, whole), out_specs=(spec, whole))
    narrow = [x.astype(np.float32) for x in (q, k, v)]
    text = str(jax.jit(mapped).trace(narrow, np.ones((1, 2, *blocks.shape[2:]), np.float32)).jaxpr)
    assert all(f"block_attention_{name}" in text for name in ("attend", "pull_back_to_queries", "pull_back_to_keys"))


def test_lists_by_key_block():
    """Against loops over the lists."""
    r = np.random.default_rng(0)
    blocks = lists(r, 2, 3, 5, 4, 6)
    lists_of = jax.jit(lambda x: (by_key_block(x, 4), transposed(x, 4, 3)))
    (entries, starts), (key, steps) = jax.tree.map(np.asarray, lists_of(blocks))
    assert steps.shape == (2, 3, -(-5 * 6 // 3) + 4, 3)
    for b, h in np.ndindex(2, 3):
        for c in range(4):
            expected = np.flatnonzero(blocks[b, h].reshape(-1) == c)
            assert sorted(entries[b, h, starts[b, h, c] : starts[b, h, c + 1]]) == expected.tolist()
            found = steps[b, h][key[b, h] == c]
            assert len(found) >= 1 and sorted(found[found >= 0]) == expected.tolist()
        assert (np.diff(key[b, h]) >= 0).all()
    index = np.array([[[-1, 2], [5, -1], [-1, -1], [0, 7]]], np.int32)
    np.testing.assert_array_equal(with_repeats(index), [[[~0, 2], [5, ~2], [~5, ~2], [0, 7]]])


def queries_of_groups(sizes, queries, keys, samples):
    """A choice for two sequences: two groups, of the blocks of even and of odd number; some rows are empty."""
    r = np.random.default_rng(queries)
    rows, blocks = -(-queries // sizes.tile) * sizes.tile + sizes.tile, -(-keys // sizes.block)
    q_order = np.stack([r.permutation(np.r_[np.arange(queries), np.full(rows - queries, queries)]) for _ in range(2)])
    k_order = np.stack([np.r_[r.permutation(keys), np.full(blocks * sizes.block - keys, keys)] for _ in range(2)])
    places = [np.argsort(x, axis=1, kind="stable")[:, :n] for x, n in ((q_order, queries), (k_order, keys))]
    group = r.integers(0, min(blocks, 2), (2, rows // sizes.tile))
    of_row = group.repeat(sizes.tile, axis=1)
    block = np.where(q_order == queries, -1, of_row + 2 * r.integers(0, (blocks - of_row + 1) // 2))
    sample, offset = r.integers(0, keys, (2, 2, samples)), r.normal(size=(2, 2, samples))
    offset[:, :, 0] = -np.inf
    ints = q_order, places[0], k_order, places[1], block, group, sample
    return Choice(*(x.astype(np.int32) for x in ints), offset)


def without(choice, query, key):
    """The choice with a query and a key in no row."""
    queries, keys = choice.q_place.shape[1], choice.k_place.shape[1]
    gone = np.take_along_axis(choice.k_order, choice.sample.reshape(2, -1), axis=1).reshape(choice.sample.shape) == key
    q_place, k_place = choice.q_place.copy(), choice.k_place.copy()
    q_place[:, query], k_place[:, key] = choice.q_order.shape[1], choice.k_order.shape[1]
    return choice._replace(
        q_order=np.where(choice.q_order == query, np.int32(queries), choice.q_order),
        k_order=np.where(choice.k_order == key, np.int32(keys), choice.k_order),
        q_place=q_place,
        k_place=k_place,
        block=np.where(choice.q_order == query, np.int32(-1), choice.block),
        offset=np.where(gone, -np.inf, choice.offset),
    )


@pytest.mark.parametrize("implementation", ["batched", *PALLAS])
@pytest.mark.parametrize(
    ("sizes", "special"), [(Sizes(16, 32), "averse"), (Sizes(32, 16), "keyless"), (Sizes(16, 16), "averse")]
)
@pytest.mark.first(1)
def test_a_block_and_samples_are_listed_blocks(implementation, sizes, special):
    """The XLA form of GPUs and TPUs, too, against the formula in float64.

    averse: the logits of the first query are far larger with the keys that it does not see; exp of these by its
    log-sum-exp is not finite. keyless: the second sequence has no keys.
    """
    q, k, v = (x[:, :, 0] for x in attention_inputs(0, 40, 60, heads=1, groups=1, dim=16, v_dim=16))
    choice = without(queries_of_groups(sizes, 40, 60, 5), query=3, key=7)
    q[:, 3], k[:, 7], v[:, 7] = np.nan, np.nan, np.nan  # what is in no row is not looked at
    if special == "averse":
        own = np.take_along_axis(choice.block, choice.q_place[:, :1], axis=1)
        q[..., 0], q[:, 0] = 0, 10 * np.eye(16)[0]
        sampled = (choice.k_place[:, :, None] == choice.sample.reshape(2, 1, -1)).any(-1)
        k[..., 0] = np.where((choice.k_place // sizes.block == own) | sampled, -10, 10)
    else:
        choice.k_order[1], choice.k_place[1], choice.offset[1] = 60, choice.k_order.shape[1], -np.inf
        k[1], v[1] = np.nan, np.nan
    d_out = np.random.default_rng(1).normal(size=v.shape[:1] + q.shape[1:2] + v.shape[2:])

    def run(q, k, v, choice, implementation):
        if implementation == "batched":
            batched = importlib.import_module("efficient_tx.kernels.block_attention.xla")
            outputs = regrouped.forward(batched, sizes, q, k, v, choice)
            given = d_out.astype(q.dtype), jnp.ones_like(outputs[1])
            return outputs, regrouped.backward(batched, sizes, (q, k, v, choice), outputs, given)

        def attend(q, k, v):
            options = {"implementation": implementation, "interpret": implementation in PALLAS}
            return sampled_block_attention(q, k, v, choice, sizes=sizes, **options)

        outputs, pull = jax.vjp(attend, q, k, v)
        return outputs, pull((d_out.astype(q.dtype), jnp.ones_like(outputs[1])))

    jitted = jax.jit(run, static_argnums=4)
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, jitted(q, k, v, choice, "reference"))
    narrow = [x.astype(np.float32) for x in (q, k, v)]
    got = jitted(*narrow, choice._replace(offset=choice.offset.astype(np.float32)), implementation)
    check(jax.tree.leaves(got), jax.tree.leaves(expected), 2e-5)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block_size": 12},
            {"pallas_tpu": "block_size is 12: pass a multiple of 8", "pallas_gpu": "12: pass a multiple of 16"},
        ),
        ({"visible": lambda i, j: jnp.sin(i) > j}, dict.fromkeys(PALLAS, "visible has the operation sin")),
        ({"visible": lambda i, j: jnp.arange(9)[i] > j}, dict.fromkeys(PALLAS, "visible")),
        ({"precision": jax.lax.Precision.HIGH}, dict.fromkeys(PALLAS, "precision is HIGH")),
    ],
    ids=("size", "sine", "table", "precision"),
)
def test_what_kernels_cannot_do_is_a_reason(options, message):
    (q, k, v), _ = inputs(24, 24, 16, heads=2, groups=2, own=False)
    given = {"block_size": 16} | options
    blocks = np.zeros((1, 1, -(-24 // given["block_size"]), 1), np.int32)
    for implementation, text in message.items():
        with pytest.raises(ValueError, match=text) as raised:
            block_attention(q, k, v, blocks=blocks, implementation=implementation, **given)
        assert "\n" not in str(raised.value)
