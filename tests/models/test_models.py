"""The shared transformer: embeddings, positions, pooling, blocks, patterns over layers."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import Kernelized, Softmax
from efficient_tx.config.names import MODELS
from efficient_tx.linear import LINEAR, Monarch
from efficient_tx.models import Block, Classifier, DualEncoder, Encoder, Mlp, TokenClassifier
from efficient_tx.models.classifier import POOLS, pool_tokens
from efficient_tx.models.embedding import TokenEmbedding, sinusoids
from efficient_tx.signatures import constructor
from tests.support import models

LENGTHS = np.array([12, 5, 0])


def classifier(cls=Classifier, mixers=(Softmax,), **options):
    defaults = {"num_classes": 3, "vocab_size": 7, "max_len": 20, "features": 8, "mlp_features": 16}
    return cls(mixers=list(mixers), rngs=nnx.Rngs(0), **defaults | options)


def batch(length=12, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < LENGTHS[:, None]
    return np.where(mask, rng.integers(1, 7, (3, length)), 0), mask


def run(model, inputs, mask, key=None):
    return models.run(model, inputs, mask=mask, key=key)


# Two pairs that share nothing; all of them in the slow run.
FAST = {("mean", "learned"), ("last", "rope")}
PAIRS = itertools.product(["mean", "cls", "last"], ["learned", "sinusoidal", "rope", "none"])


@pytest.mark.parametrize(
    ("pool", "positions"), [pytest.param(*one, marks=[] if one in FAST else [pytest.mark.slow]) for one in PAIRS]
)
def test_logits_do_not_depend_on_padding(pool, positions):
    model = classifier(pool=pool, positions=positions, layers=1)
    inputs, mask = batch()
    logits = run(model, inputs, mask)
    assert logits.shape == (3, 3)
    assert np.isfinite(logits).all()
    padded = np.pad(inputs, ((0, 0), (0, 8)), constant_values=5)
    more = run(model, padded, np.pad(mask, ((0, 0), (0, 8))))
    np.testing.assert_allclose(more, logits, rtol=1e-5, atol=1e-5)  # float32: other groupings of sums
    left = np.stack([np.roll(row, 12 - n) for row, n in zip(inputs, LENGTHS)])
    left_mask = np.stack([np.roll(row, 12 - n) for row, n in zip(mask, LENGTHS)])
    np.testing.assert_allclose(run(model, left, left_mask), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.slow
def test_tokens_that_keep_their_places_tell_a_masked_picture_from_its_shift(positions):
    model = classifier(positions=positions, layers=1)
    places = jnp.arange(12)[None]
    picture = np.array([[0, 0, 3, 0, 0, 5, 2, 0, 0, 0, 0, 0]])
    shifted = np.roll(picture, 4)
    parts = nnx.split(model)
    here, there = (np.asarray(models.forward(*parts, x, mask=x > 0, positions=places)) for x in (picture, shifted))
    assert np.abs(here - there).max() > 1e-3
    ranked = [np.asarray(models.forward(*parts, x, mask=x > 0)) for x in (picture, shifted)]
    np.testing.assert_allclose(*ranked, rtol=1e-5, atol=1e-5)  # as padding: float32, other groupings of sums
    # What stands at a place is found there: the same tokens side by side, with their places given, are the picture.
    side_by_side = models.forward(*parts, np.array([[3, 5, 2]]), positions=np.array([[2, 5, 6]]))
    np.testing.assert_allclose(side_by_side, here, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_rotary_positions_of_masked_pictures_are_refused():
    model = classifier(positions="rope")
    with pytest.raises(ValueError, match=r"positions is 'rope'.*legacy_mask.*use 'learned', 'sinusoidal' or 'none'"):
        model(jnp.ones((1, 12), int), positions=jnp.arange(12)[None])


def test_pooling_by_hand():
    x = np.random.default_rng(0).normal(size=(3, 12, 4)).astype(np.float32)
    mask = np.arange(12) < LENGTHS[:, None]
    for left in (False, True):  # the padding
        if left:
            x, mask = x[:, ::-1], mask[:, ::-1]
        mean, cls, last = (np.asarray(pool_tokens(jnp.asarray(x), jnp.asarray(mask), pool)) for pool in POOLS)
        np.testing.assert_allclose(mean[0], x[0].mean(0), atol=1e-6)
        np.testing.assert_allclose(mean[1], x[1][mask[1]].mean(0), atol=1e-6)
        np.testing.assert_array_equal(cls[:2], [x[0, 0], x[1][mask[1]][0]])
        np.testing.assert_array_equal(last[:2], [x[0, 11], x[1][mask[1]][-1]])
        assert (mean[2] == 0).all() and (cls[2] == 0).all() and (last[2] == 0).all()
    np.testing.assert_array_equal(pool_tokens(jnp.asarray(x), None, "last"), x[:, -1])
    np.testing.assert_array_equal(pool_tokens(jnp.asarray(x), None, "cls"), x[:, 0])


def test_a_causal_model_that_reads_the_last_token_sees_all():
    model = classifier(causal=True, pool="last")
    inputs, mask = batch()
    changed = inputs.copy()
    changed[0, 0] = 1 + changed[0, 0] % 6
    assert np.abs(run(model, inputs, mask)[0] - run(model, changed, mask)[0]).max() > 1e-5
    with pytest.raises(ValueError, match="use 'last'"):
        classifier(causal=True, pool="cls")


def test_token_labels_of_a_causal_model_do_not_look_ahead():
    model = classifier(TokenClassifier, causal=True)
    inputs, mask = batch()
    logits = run(model, inputs, mask)
    assert logits.shape == (3, 12, 3)
    changed = inputs.copy()
    changed[0, 8] = 1 + changed[0, 8] % 6
    after = run(model, changed, mask)
    np.testing.assert_array_equal(after[0, :8], logits[0, :8])
    assert np.abs(after[0, 8:] - logits[0, 8:]).max() > 1e-5


def test_a_block_is_its_formula():
    """Pre-norm residuals around a mixer and a GELU network, in numpy, with the mixer taken as given."""
    block = Block(8, mixer=partial(Softmax, heads=2), mlp_features=16, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    middle = x + np.asarray(block.mixer(norm(x)))
    hidden = norm(middle) @ block.mlp.up.kernel[...] + block.mlp.up.bias[...]
    expected = middle + np.asarray(jax.nn.gelu(hidden)) @ block.mlp.down.kernel[...] + block.mlp.down.bias[...]
    np.testing.assert_allclose(block(x), expected, atol=1e-5)  # float32


@pytest.mark.slow
def test_swiglu_and_gelu_have_equal_parameters():
    gelu, swiglu = (
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(Mlp(64, 192, kind=kind, rngs=nnx.Rngs(0)))))
        for kind in ("gelu", "swiglu")
    )
    assert swiglu == pytest.approx(gelu, rel=0.01)  # the biases differ
    mlp = Mlp(4, 6, kind="swiglu", rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    gate, up = (x @ np.asarray(layer.kernel[...]) for layer in (mlp.gate, mlp.up))
    expected = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(mlp.down.kernel[...])
    np.testing.assert_allclose(mlp(x), expected, atol=1e-5)  # float32


@pytest.mark.quick
def test_sinusoids_by_their_formula():
    table = sinusoids(9, 6)
    for position in range(9):
        for c in range(3):
            angle = position / 10000 ** (c / 3)
            assert table[position, c] == pytest.approx(np.sin(angle), abs=1e-6)
            assert table[position, 3 + c] == pytest.approx(np.cos(angle), abs=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_absolute_positions_refuse_longer_input(positions):
    embedding = TokenEmbedding(7, 4, max_len=5, positions=positions, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"length is 6, .* max_len=5"):
        embedding(np.zeros((1, 6), np.int32))


def test_patterns_of_mixers_and_structures_go_where_they_belong():
    model = classifier(
        mixers=[partial(Softmax, linear=Monarch), Kernelized], linear=LINEAR["low_rank"], layers=3, norm="rms"
    )
    blocks = model.encoder.blocks
    assert [type(block.mixer) for block in blocks] == [Softmax, Kernelized, Softmax]
    assert type(blocks[0].mixer.q) is Monarch
    assert type(blocks[1].mixer.q) is nnx.Linear
    assert all(type(block.mlp.up) is LINEAR["low_rank"] for block in blocks)
    assert all(type(block.mlp_norm) is nnx.RMSNorm for block in blocks)


@pytest.mark.slow
def test_remat_changes_memory_not_numbers():
    inputs, mask = batch()
    plain, remat = (classifier(remat=flag, layers=3) for flag in (False, True))
    np.testing.assert_allclose(run(remat, inputs, mask), run(plain, inputs, mask), atol=1e-6)

    def saved_bytes(model):
        """What the forward pass keeps for the backward pass (XLA on CPU merges both again: its memory says nothing)."""
        graphdef, params = nnx.split(model)
        pullback = jax.vjp(lambda params: nnx.merge(graphdef, params)(inputs, mask=mask), params)[1]
        return sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))

    assert saved_bytes(remat) < 0.5 * saved_bytes(plain)


@pytest.mark.slow
def test_training_draws_belong_to_the_example():
    model = classifier(dropout=0.5)
    inputs, mask = batch()
    keys = jax.random.split(jax.random.key(0), 3)
    once = run(model, inputs, mask, keys)
    flipped = run(model, inputs[::-1], mask[::-1], keys[::-1])
    np.testing.assert_allclose(flipped[::-1], once, rtol=1e-5, atol=1e-6)
    assert np.abs(once - run(model, inputs, mask)).max() > 1e-3


@pytest.mark.slow
def test_bfloat16_computes_near_float32_with_float32_parameters_and_logits():
    inputs, mask = batch()
    half = classifier(dtype=jnp.bfloat16)
    logits = run(half, inputs, mask)
    assert logits.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(logits, run(classifier(), inputs, mask), atol=0.05)  # 8 bits of mantissa, 2 blocks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max"}, "pool is 'max'"),
        ({"positions": "learnt"}, "positions is 'learnt'"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"mlp": "relu"}, "mlp is 'relu'"),
        ({"layers": 0}, "layers is 0"),
        ({"heads": 3}, "8 features do not divide into 3 heads"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        classifier(**options)


def test_encoder_ends_with_its_norm():
    encoder = Encoder(8, layers=1, mixers=[partial(Softmax, heads=2)], mlp_features=16, rngs=nnx.Rngs(0))
    out = np.asarray(encoder(np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)))
    np.testing.assert_allclose(out.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(-1), 1, atol=1e-3)


def pair(length=12):
    inputs, mask = batch(length)
    other, other_mask = batch(length, seed=1)
    return inputs, mask, other[::-1], other_mask[::-1]


def run_pair(model, inputs, mask, inputs2, mask2, key=None):
    return models.run(model, inputs, inputs2, mask=mask, mask2=mask2, key=key)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.slow
def test_logits_of_a_pair_do_not_depend_on_padding(pool):
    model = classifier(DualEncoder, pool=pool, layers=1)
    inputs, mask, inputs2, mask2 = pair()
    logits = run_pair(model, inputs, mask, inputs2, mask2)
    assert logits.shape == (3, 3) and logits.dtype == np.float32 and np.isfinite(logits).all()
    padded = (np.pad(x, ((0, 0), (0, 8)), constant_values=5) for x in (inputs, mask, inputs2, mask2))
    inputs, mask, inputs2, mask2 = (x & (np.arange(20) < 12) if x.dtype == bool else x for x in padded)
    more = run_pair(model, inputs, mask, inputs2, mask2)
    np.testing.assert_allclose(more, logits, rtol=1e-5, atol=1e-5)  # float32: other groupings of sums


@pytest.mark.parametrize(("pair_head", "widths"), [("interaction", [32, 16, 3]), ("concatenation", [16, 16, 8, 3])])
@pytest.mark.slow
def test_the_head_of_a_pair_is_its_formula(pair_head, widths):
    """Both sequences through one encoder, then an MLP of what the docstring says, in numpy."""
    model = classifier(DualEncoder, pair_head=pair_head, layers=1)
    inputs, mask, inputs2, mask2 = pair()
    x1, x2 = (
        np.asarray(pool_tokens(*model.encode(tokens, real, None), "mean"), np.float64)
        for tokens, real in [(inputs, mask), (inputs2, mask2)]
    )
    x = np.concatenate([x1, x2, x1 * x2, x1 - x2] if pair_head == "interaction" else [x1, x2], axis=1)
    layers = [layer for layer in model.head.layers if isinstance(layer, nnx.Linear)]
    assert [layer.kernel.shape for layer in layers] == list(itertools.pairwise(widths))
    for i, layer in enumerate(layers):
        x = x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    np.testing.assert_allclose(run_pair(model, inputs, mask, inputs2, mask2), x, atol=1e-5)  # float32


@pytest.mark.slow
def test_a_text_without_a_mask_is_all_real_whatever_the_other_has():
    model = classifier(DualEncoder, layers=1)
    inputs, mask, inputs2, mask2 = pair()
    every = np.ones_like(mask)
    for one, two in ((mask, None), (None, mask2), (None, None)):
        given = [every if each is None else each for each in (one, two)]
        expected = run_pair(model, inputs, given[0], inputs2, given[1])
        np.testing.assert_allclose(run_pair(model, inputs, one, inputs2, two), expected, atol=1e-6)  # float32


@pytest.mark.slow
def test_the_two_sequences_of_a_pair_draw_differently():
    """Else dropout would leave out the same parts of both, and a pair of equal documents would look equal."""
    model = classifier(DualEncoder, dropout=0.5, layers=1, pair_head="interaction")
    inputs, mask, _, _ = pair()
    keys = jax.random.split(jax.random.key(0), 3)
    model.head = nnx.Sequential(lambda x: x)
    parts = run_pair(model, inputs, mask, inputs, mask, keys)
    assert np.abs(parts[0, 24:]).max() > 1e-2  # x₁ − x₂
    assert np.abs(run_pair(model, inputs, mask, inputs, mask)[:, 24:]).max() == 0
    with pytest.raises(ValueError, match="pad both to one length"):
        run_pair(model, inputs, mask, inputs[:, :5], mask[:, :5])


@pytest.mark.parametrize("outside", [-1, 7, 2**30])
@pytest.mark.first(2)
def test_an_id_outside_the_vocabulary_is_not_a_number(outside):
    """In a real token of its own example; in padding it means nothing, for a gradient neither."""
    model = classifier(positions="none", layers=1)
    inputs, mask = batch()
    logits = run(model, inputs, mask)
    wrong = inputs.copy()
    wrong[1, 2] = outside  # real
    found = run(model, wrong, mask)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], logits[[0, 2]])
    padded = np.where(mask, inputs, outside)
    np.testing.assert_array_equal(run(model, padded, mask), logits)


@pytest.mark.slow
def test_gradients_do_not_see_ids_of_padding():
    model = classifier(positions="learned", layers=1)
    graphdef, params = nnx.split(model)
    inputs, mask = batch()
    loss = jax.jit(jax.grad(lambda p, inputs: jnp.square(nnx.merge(graphdef, p)(inputs, mask=mask)).sum()))
    expected = loss(params, inputs)
    jax.tree.map(np.testing.assert_array_equal, loss(params, np.where(mask, inputs, -100)), expected)


@pytest.mark.quick
def test_ids_and_positions_by_hand():
    embedding = TokenEmbedding(3, 2, max_len=4, rngs=nnx.Rngs(0))
    tokens, learned = np.asarray(embedding.tokens[...]), np.asarray(embedding.learned[...])
    ids, places = np.array([[2, 0, -1, 3]]), np.array([[3, -1, 0, 0]])
    out = np.asarray(embedding(ids, positions=places))[0]
    np.testing.assert_array_equal(out[0], tokens[2] + learned[3])
    assert np.isnan(out[1:]).all()
    masked = np.asarray(embedding(ids, mask=np.array([[1, 0, 0, 0]]), positions=places))[0]
    np.testing.assert_array_equal(masked[0], out[0])
    assert np.isfinite(masked).all()
    with pytest.raises(ValueError, match="inputs have dtype float32: a model of tokens takes their ids, integers"):
        embedding(jnp.ones((1, 4)))


@pytest.mark.quick
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.first(1)
def test_parameters_are_float32_where_floats_are_float64(kind):
    """JAX_ENABLE_X64=1 is about the user's own arrays."""
    given = {"image_shape": (32, 32, 3)} if kind == "image" else {"vocab_size": 7, "max_len": 16}

    def make(model):
        known = constructor(model).parameters
        more = {"layers": 1, "depths": (1, 1, 1, 1), "pool": "cls"}
        more = {name: value for name, value in more.items() if name in known}
        return model(mixers=[Softmax], num_classes=3, rngs=nnx.Rngs(0), **given, **more)

    with jax.enable_x64(True):
        for model in MODELS[kind].values():
            made = nnx.eval_shape(lambda model=model: make(model))
            assert {str(p.dtype) for p in jax.tree.leaves(nnx.state(made))} == {"float32"}
