"""The variants inside flax's own attention modules: padding, grouped heads, cross-attention, decoding, refusals."""

import inspect
import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from efficient_tx.attention import ATTENTION, as_attention_fn

BATCH, LENGTH, FEATURES, HEADS, BUDGET = 2, 6, 8, 2, 4
MASK = np.arange(LENGTH) < np.array([LENGTH, 3])[:, None]  # fewer than BUDGET, so that the mask changes any choice

QUERIES = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, FEATURES // HEADS), jnp.float32)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def options(name):
    """Of the function: a budget below LENGTH, so that the methods approximate, and what it is measured with."""
    known = inspect.signature(ATTENTION[name].function).parameters
    budget = {key: value for key, value in ATTENTION[name].within(BUDGET).items() if key in known}
    measured = ATTENTION[name].measured_with(QUERIES, BUDGET, np.random.default_rng(0))
    return budget | {key: value for key, value in measured.items() if known[key].default is inspect.Parameter.empty}


def fault(name):
    """Why flax's modules cannot hold a variant, or None."""
    try:
        as_attention_fn(name, **options(name))
    except ValueError as error:
        return str(error)


HELD = [name for name in ATTENTION if fault(name) is None]


def nnx_module(name, *, groups=1, decode=False):
    """Grouped heads: flax.nnx hands the groups of keys and values to the function as they are."""
    return nnx.MultiHeadAttention(
        num_heads=HEADS, num_kv_heads=groups, in_features=FEATURES, decode=decode,
        attention_fn=as_attention_fn(name, **options(name)), rngs=nnx.Rngs(0),
    )  # fmt: skip


@cache
def compiled(name):
    """nnx's module with grouped heads, (inputs_q, inputs_kv, mask) -> out."""
    graphdef, params = nnx.split(nnx_module(name))
    return jax.jit(lambda q, kv, mask: nnx.merge(graphdef, params)(q, kv, mask=mask[:, None, None, :]))


def refuses(name, use, call):
    """Whether this use has no meaning for the variant; it must then say so in one line."""
    expected = ATTENTION[name].refuses.get(use)
    if expected is None:
        return False
    with pytest.raises(ValueError, match=expected) as raised:
        call()
    assert "\n" not in str(raised.value)
    return True


@pytest.mark.parametrize("name", HELD)
@pytest.mark.first(1)
def test_padding_and_grouped_heads(name):
    """Contents of padding change nothing, and the mask arrives, with one head of keys and values for two of queries."""
    x = normal(0, BATCH, LENGTH, FEATURES)
    other = np.where(MASK[..., None], x, 9.0)
    grouped = compiled(name)
    out = np.asarray(grouped(x, x, MASK))
    np.testing.assert_allclose(grouped(other, other, MASK)[MASK], out[MASK], atol=1e-5)  # float32 rounding
    whole = np.asarray(grouped(x, x, np.ones_like(MASK)))
    np.testing.assert_allclose(whole[0], out[0], atol=1e-5)
    assert np.abs(whole[1] - out[1])[MASK[1]].max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", HELD)
def test_grouped_heads_are_linens_repeated_ones(name):
    x = normal(0, BATCH, LENGTH, FEATURES)
    out = np.asarray(compiled(name)(x, x, MASK))
    layer = nnx_module(name)
    params = {part: nnx.to_pure_dict(nnx.state(getattr(layer, part))) for part in ("query", "key", "value", "out")}
    for part in ("key", "value"):
        params[part] = jax.tree.map(lambda leaf: jnp.repeat(leaf, HEADS, axis=-2), params[part])
    repeated = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=as_attention_fn(name, **options(name)))
    ours = jax.jit(lambda x, mask: repeated.apply({"params": params}, x, mask=mask[:, None, None, :]))(x, MASK)
    np.testing.assert_allclose(np.asarray(ours)[MASK], out[MASK], atol=1e-5)


@pytest.mark.parametrize("name", HELD)
@pytest.mark.first(1)
def test_cross_attention(name):
    """Three queries over six keys, padded."""
    q, x = normal(0, BATCH, 3, FEATURES), normal(1, BATCH, LENGTH, FEATURES)
    attend = compiled(name)
    if refuses(name, "cross", lambda: attend(q, x, MASK)):
        return
    out = np.asarray(attend(q, x, MASK))
    assert out.shape == q.shape
    other = np.where(MASK[..., None], x, 9.0)
    np.testing.assert_allclose(attend(q, other, MASK), out, atol=1e-5)  # float32 rounding
    assert np.abs(attend(q, x, np.ones_like(MASK))[1] - out[1]).max() > 1e-4


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (not ATTENTION[n].can_be_causal)) for n in HELD]
)
@pytest.mark.first(1)
def test_decoding_with_flaxs_cache(name):
    """One token at a time: the rows of the causal form; where there are none, the function over the unpadded prefix."""
    cls, causal = ATTENTION[name], ATTENTION[name].can_be_causal
    layer = nnx_module(name, decode=True)
    layer.init_cache((BATCH, LENGTH, FEATURES))
    graphdef, state = nnx.split(layer)

    @jax.jit
    def step(state, token):
        layer = nnx.merge(graphdef, state)
        return layer(token, is_causal=causal), nnx.state(layer)

    x = normal(0, BATCH, LENGTH, FEATURES)
    if refuses(name, "decode", lambda: step(state, x[:, :1])):
        return
    rows = []
    for t in range(LENGTH):
        row, state = step(state, x[:, t : t + 1])
        rows.append(row)
    rows = np.concatenate(rows, axis=1)

    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    arguments = options(name) | ({"causal": True} if causal else {})
    function = jax.jit(lambda q, k, v: cls.function(q, k, v, **arguments))
    if causal and "rows" not in cls.refuses:
        np.testing.assert_allclose(rows, layer.out(function(q, k, v)), atol=1e-5)  # float32 rounding
    else:
        t = LENGTH - 2
        expected = layer.out(function(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1]))
        np.testing.assert_allclose(rows[:, t : t + 1], expected, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in HELD if not ATTENTION[name].can_be_causal])
def test_what_has_no_causal_form_refuses_a_causal_call(name):
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match=f"{name} has no causal form"):
        as_attention_fn(name, **options(name))(q, q, q, is_causal=True)


@pytest.mark.quick
@pytest.mark.parametrize("name", ATTENTION)
def test_what_flaxs_modules_cannot_hold_says_so(name):
    """Functions of other things than queries, keys and values; all others are held."""
    cls, said = ATTENTION[name], fault(name)
    known = inspect.signature(cls.function).parameters.values()
    tokens = [p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD]
    further = {p.name for p in known if p.kind is p.KEYWORD_ONLY} & set(cls.projections)
    assert (said is None) == (tokens == ["q", "k", "v"] and not further)
    if said is not None:
        assert said.startswith(f"{name} ") and said.endswith(f"use the module {cls.__name__}") and "\n" not in said
        assert all(part in said for part in (further or tokens))


@pytest.mark.parametrize("own", [linen, nnx], ids=["linen", "nnx"])
@pytest.mark.slow
def test_softmax_is_flaxs_own_attention(own):
    """Through either module, with no mask, a key mask and a full one."""
    x = normal(0, BATCH, LENGTH, FEATURES)
    full = np.tril(np.ones((LENGTH, LENGTH), bool)) & MASK[:, None, None, :] & MASK[:, None, :, None]
    outputs = []
    for function in (as_attention_fn("softmax"), own.dot_product_attention):
        if own is linen:
            layer = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=function)
            attend = layer.bind(layer.init(jax.random.key(0), x))
        else:
            attend = nnx.MultiHeadAttention(
                num_heads=HEADS, in_features=FEATURES, decode=False, attention_fn=function, rngs=nnx.Rngs(0)
            )
        outputs.append([np.asarray(attend(x, mask=mask))[MASK] for mask in (None, MASK[:, None, None, :], full)])
    np.testing.assert_allclose(*outputs, atol=1e-5)  # float32 rounding


@pytest.mark.slow
def test_softmax_decodes_in_linen():
    """linen says nothing of causality: the mask of its cache is all there is."""
    x = normal(0, BATCH, LENGTH, FEATURES)
    layer = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=as_attention_fn("softmax"), decode=True)
    variables = layer.init(jax.random.key(0), x)
    params, cache = variables["params"], variables["cache"]
    rows = []
    for t in range(LENGTH):
        row, updated = layer.apply({"params": params, "cache": cache}, x[:, t : t + 1], mutable=["cache"])
        cache = updated["cache"]
        rows.append(row)
    causal = np.broadcast_to(np.tril(np.ones((LENGTH, LENGTH), bool)), (BATCH, 1, LENGTH, LENGTH))
    whole = linen.MultiHeadDotProductAttention(num_heads=HEADS).apply({"params": params}, x, mask=causal)
    np.testing.assert_allclose(np.concatenate(rows, axis=1), whole, atol=1e-5)  # float32 rounding


@pytest.mark.slow
def test_causal_reaches_the_variant():
    q, k, v = (normal(seed, 1, 5, 2, 8) for seed in range(3))
    ours = as_attention_fn("softmax")(q, k, v, is_causal=True)
    np.testing.assert_allclose(ours, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("name", [name for name in HELD if ATTENTION[name].can_be_causal])
def test_a_causal_call_of_several_queries_for_other_keys_is_refused(name):
    """jax's and flax's functions align the first query with the first key, ours the last with the last."""
    k = jnp.ones((1, 6, 2, 4))
    with pytest.raises(ValueError, match=r"3 queries and 6 keys: our functions align the last query .* the first"):
        as_attention_fn(name, **options(name))(k[:, :3], k, k, is_causal=True)


Q = np.ones((1, 4, 2, 8), np.float32)
FULL = np.ones((1, 1, 4, 4), bool)


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("skyformer", {"mask": FULL}, r"pass the key mask \[B, 1, 1, L\] instead of make_attention_mask"),
        ("softmax", {"dropout_rate": 0.1, "deterministic": False}, "dropout_rate=0"),
        ("softmax", {"bias": FULL}, "takes no bias"),
        ("softmax", {"module": object()}, "sow_weights=False"),
    ],
)
def test_calls_that_mean_nothing_are_refused(name, call, message):
    with pytest.raises(ValueError, match=message):
        as_attention_fn(name)(Q, Q, Q, **call)


def test_more_batch_axes_are_refused():
    with pytest.raises(ValueError, match=r"query has shape \(1, 1, 4, 2, 8\): softmax takes one batch axis"):
        as_attention_fn("softmax")(Q[None], Q[None], Q[None])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("skyfromer", {}, "nearest: 'skyformer'"),
        ("skyformer", {"landmark": 3}, "no option 'landmark'"),
        ("linformer", {}, r"parameters of its own \(e, f\)"),
    ],
)
def test_names_and_options_that_do_not_exist(name, given, message):
    with pytest.raises(ValueError, match=message):
        as_attention_fn(name, **given)


@pytest.mark.slow
def test_sampling_follows_flaxs_key():
    """A raw uint32 key, as linen still makes, and a typed one are the same draw."""
    sample = jax.jit(as_attention_fn("skyformer", landmarks=2))
    x = normal(0, 1, LENGTH, 2, 8)
    first, second = (np.asarray(sample(x, x, x, dropout_rng=jax.random.key(seed))) for seed in (1, 2))
    assert np.abs(first - second).max() > 1e-4
    np.testing.assert_array_equal(sample(x, x, x, dropout_rng=jax.random.PRNGKey(1)), first)


def test_flaxs_masks_of_zeros_and_ones_are_read_and_additive_ones_are_not():
    """make_attention_mask makes floats. One that is added to logits raises; traced, it makes the output NaN."""
    attend, x = as_attention_fn("softmax"), normal(0, BATCH, LENGTH, HEADS, 4)
    mask = nnx.make_attention_mask(MASK, MASK)
    assert mask.dtype == jnp.float32
    expected = np.asarray(attend(x, x, x, mask=mask.astype(bool)))
    traced = jax.jit(lambda mask: attend(x, x, x, mask=mask))
    for call in (lambda mask: attend(x, x, x, mask=mask), traced):
        np.testing.assert_allclose(call(mask), expected, atol=1e-6)  # float32 rounding
    for lowest in (-1e9, -np.inf):
        additive = jnp.where(MASK, 0.0, lowest)[:, None, None]
        with pytest.raises(ValueError, match=r"mask has values besides 0\.0 and 1\.0: softmax adds no mask to logits"):
            attend(x, x, x, mask=additive)
        assert np.isnan(traced(additive)).all()


DRAWN = "skyformer", {"landmarks": 2}


@pytest.mark.slow
def test_nnx_draws_anew_at_every_step():
    """The stream is a part of the model: two jitted steps differ, two evaluations do not."""
    name, chosen = DRAWN
    rngs = nnx.Rngs(0, landmarks=1)
    attend = as_attention_fn(name, key=rngs.landmarks, **chosen)
    layer = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, attention_fn=attend, rngs=rngs)
    x = normal(0, 1, LENGTH, FEATURES)

    @nnx.jit
    def step(layer):
        return layer(x)

    assert np.abs(step(layer) - step(layer)).max() > 1e-4
    layer.eval()
    np.testing.assert_array_equal(step(layer), step(layer))


@pytest.mark.slow
def test_nnx_trains_on_other_draws_at_every_step():
    name, chosen = DRAWN
    rngs = nnx.Rngs(0)
    attend = as_attention_fn(name, key=rngs, **chosen)
    layer = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, attention_fn=attend, rngs=rngs)
    x = normal(0, 1, LENGTH, FEATURES)

    @nnx.jit
    def loss_and_gradient(layer):
        return nnx.value_and_grad(lambda layer: jnp.square(layer(x)).sum())(layer)

    first, second = (float(loss_and_gradient(layer)[0]) for _ in range(2))
    assert abs(first - second) > 1e-4


@pytest.mark.slow
def test_streams_of_two_layers_draw_apart():
    streams = nnx.Rngs(0)
    one, other = (as_attention_fn(DRAWN[0], key=streams, **DRAWN[1]) for _ in range(2))
    x = normal(0, 1, LENGTH, 2, 8)
    assert np.abs(one(x, x, x) - other(x, x, x)).max() > 1e-4
    viewed = nnx.view(one, deterministic=True)
    plain = as_attention_fn(DRAWN[0], **DRAWN[1])
    np.testing.assert_allclose(viewed(x, x, x), plain(x, x, x), atol=1e-6)  # float32 rounding


class Block(linen.Module):
    """`make_rng` belongs to the module around; without its stream the function gives no key: evaluation."""

    @linen.compact
    def __call__(self, x):
        name, chosen = DRAWN
        attend = as_attention_fn(
            name, key=lambda: self.make_rng("landmarks") if self.has_rng("landmarks") else None, **chosen
        )
        return linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=attend)(x)


def linen_block(x):
    """Parameters, and (key or None) -> out, compiled."""
    shapes = jax.eval_shape(Block().init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: normal(0, *leaf.shape), shapes)
    return params, jax.jit(lambda key: Block().apply(params, x, rngs={} if key is None else {"landmarks": key}))


def test_linen_draws_anew_at_every_step():
    _, step = linen_block(normal(0, 1, LENGTH, FEATURES))
    first, second, again = (np.asarray(step(jax.random.key(seed))) for seed in (1, 2, 1))
    assert np.abs(first - second).max() > 1e-4
    np.testing.assert_array_equal(first, again)


@pytest.mark.slow
def test_linen_evaluates_without_a_stream():
    x = normal(0, 1, LENGTH, FEATURES)
    params, step = linen_block(x)
    plain = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=as_attention_fn(DRAWN[0], **DRAWN[1]))
    inner = {"params": params["params"]["MultiHeadDotProductAttention_0"]}
    np.testing.assert_allclose(step(None), jax.jit(plain.apply)(inner, x), atol=1e-5)  # float32 rounding


@pytest.mark.parametrize("name", sorted(HELD, key=lambda name: not ATTENTION[name].draws))
@pytest.mark.first(1)
def test_training_on_one_draw_for_ever_is_warned_of(name):
    """Where gradients flow and nothing gives keys; not at evaluation, and not where nothing is drawn."""
    x = QUERIES
    attend = as_attention_fn(name, **options(name))

    def differentiated(attend):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            jax.eval_shape(jax.grad(lambda x: attend(x, x, x).sum()), x)
        return [str(one.message) for one in seen]

    said = differentiated(attend)
    assert len(said) == ATTENTION[name].draws
    if said:
        assert f"{name} is trained on what one fixed key draws" in said[0] and "key=..." in said[0]
        assert not differentiated(as_attention_fn(name, key=lambda: jax.random.key(0), **options(name)))
        assert not differentiated(lambda *x: attend(*x, dropout_rng=jax.random.key(0)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jax.eval_shape(attend, x, x, x)
