"""What every function and every mixer refuses in a call, in one line; nothing here is compiled."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION, gla_step, lev_init, lev_step
from efficient_tx.kernels import block_attention, flash_attention, gated_linear_attention, pair_attention
from tests.support.mixers import BUDGET, FEATURES, HEADS, SHORT, make

every = pytest.mark.parametrize("name", ATTENTION)
pytestmark = pytest.mark.quick

HEAD_DIM = FEATURES // HEADS
SHAPES = {"tokens": (2, SHORT, FEATURES), "heads": (2, SHORT, HEADS, HEAD_DIM)}


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def needs(name):
    """The arrays of a call of the function by name, each with the axes of the tokens or of their heads."""
    cls = ATTENTION[name]
    known = inspect.signature(cls.function).parameters.values()
    positional = [p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD]
    kind = "tokens" if positional == ["x"] else "heads"
    further = [p.name for p in known if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name in cls.projections]
    return positional, dict.fromkeys(positional + further, SHAPES[kind])


def call(name, shapes, empty=None, **arguments):
    """Traces the function on abstract arrays of these shapes; further ones of all tokens have no `empty` axis."""
    cls = ATTENTION[name]
    known = inspect.signature(cls.function).parameters
    fixed = cls.measured_with(shaped(*SHAPES["heads"]), BUDGET, np.random.default_rng(0)) | cls.within(BUDGET)
    fixed = {key: value for key, value in fixed.items() if key in known}
    if empty is not None:
        whole = [key for key, value in fixed.items() if np.shape(value)[:2] == SHAPES["tokens"][:2]]
        fixed |= {key: jnp.take(fixed[key], jnp.arange(0), empty) for key in whole}
    given = {key: value for key, value in arguments.items() if isinstance(value, jax.ShapeDtypeStruct)}
    fixed |= {key: value for key, value in arguments.items() if key not in given}

    def run(arrays, given):
        return cls.function(**arrays, **given, **fixed)

    return jax.eval_shape(run, {key: shaped(*shape) for key, shape in shapes.items()}, given)


def refused(match, run, *args, **kwargs):
    """Asserts that the call raises a ValueError of one line that matches."""
    with pytest.raises(ValueError, match=match) as raised:
        run(*args, **kwargs)
    assert "\n" not in str(raised.value).partition("\n-----")[0]  # jax appends a note on its own frames


@every
@pytest.mark.first(3)
def test_one_call_fits(name):
    """Else every refusal below would be one of this file's own mistakes."""
    assert call(name, needs(name)[1], mask=shaped(2, SHORT, dtype=bool)).shape[:2] == (2, SHORT)


@every
def test_nothing_comes_of_nothing(name):
    """Of no examples or no tokens; queries without keys have zeros, where the method takes as many as one likes."""
    (first, *_), shapes = needs(name)
    no_examples, no_tokens = (
        {key: (*shape[:axis], 0, *shape[axis + 1 :]) for key, shape in shapes.items()} for axis in (0, 1)
    )
    for options in [{}, {"causal": True}][: 1 + ATTENTION[name].can_be_causal]:
        for axis, none in enumerate((no_examples, no_tokens)):
            mask = shaped(*none[first][:2], dtype=bool)
            assert call(name, none, empty=axis, mask=mask, **options).shape[:2] == mask.shape
        if len(shapes) > 1:
            try:
                out = call(name, no_tokens | {first: shapes[first]}, empty=1, **options)
            except ValueError:
                continue  # it needs as many queries as keys
            assert out.shape[:2] == (2, SHORT)


@every
def test_a_float_mask_is_refused(name):
    """Added to logits it would mean the opposite: 0 for real tokens, −1e9 for padding."""
    wanted = "mask has dtype float32, .*: pass dtype=bool"
    refused(wanted, call, name, needs(name)[1], mask=shaped(2, SHORT))
    refused(wanted, call, name, needs(name)[1], mask=shaped(2, 1, 1, SHORT))


@pytest.mark.parametrize("kernel", [block_attention, flash_attention, gated_linear_attention, pair_attention])
def test_a_kernel_refuses_a_float_mask_and_unbatched_arrays(kernel):
    own = {block_attention: {"blocks": jnp.zeros((1, 1, 1, 1), int), "block_size": SHORT}}.get(kernel, {})
    count, own = (5, {"pair": lambda q, k2: (q * k2, k2[..., 0])}) if kernel is pair_attention else (3, own)
    x, mask = shaped(*SHAPES["heads"]), jnp.zeros((2, SHORT))
    wanted = "mask has dtype float32, .*: pass dtype=bool"
    refused(wanted, jax.eval_shape, lambda x: kernel(*[x] * count, mask=mask, **own), x)
    wanted = r"q, k, v.* have shapes .*: pass \[batch, length, heads, dim\] each"
    refused(wanted, jax.eval_shape, lambda x: kernel(*[x] * count, **own), shaped(*SHAPES["heads"][1:]))


@every
def test_other_ranks_are_refused(name):
    """The axes that are wanted are named: without the batch, with two of them, of a single token."""
    _, shapes = needs(name)
    axes = r"pass \[batch, length, (heads, dim|features)\]"
    for change in (lambda shape: shape[1:], lambda shape: (1, *shape), lambda shape: shape[-1:]):
        refused(axes, call, name, {key: change(shape) for key, shape in shapes.items()})
    for key in shapes:
        refused(axes, call, name, shapes | {key: shapes[key][1:]})


@every
def test_shapes_that_do_not_fit_each_other_are_refused(name):
    """Another batch, length, number of heads or width of one of the arrays."""
    positional, shapes = needs(name)
    for key in shapes:
        for axis in range(4 if len(shapes) > 1 else 0):
            if key == positional[0] and axis == 1:
                continue  # other queries than keys: a matter of the method
            if axis == 3 and (key.startswith("v") or "k" not in shapes):
                continue  # values may have any width, where the method does not tie them to the keys
            shape = list(shapes[key])
            shape[axis] += 1
            refused("has shape|have shapes|heads|queries", call, name, shapes | {key: tuple(shape)})


@every
@pytest.mark.first(3)
def test_a_mixer_refuses_a_float_mask_and_other_shapes(name):
    def calls():
        mixer = make(ATTENTION[name])
        wanted = "mask has dtype float32, .*: pass dtype=bool"
        refused(wanted, mixer, jnp.zeros(SHAPES["tokens"]), mask=jnp.zeros((2, SHORT)))
        wanted = rf"takes \[batch, length, features\] with {FEATURES} features"
        for shape in ((SHORT, FEATURES), (1, 2, SHORT, FEATURES), (2, SHORT, FEATURES + 1), (FEATURES,)):
            refused(wanted, mixer, jnp.zeros(shape))

    nnx.eval_shape(calls)


@every
@pytest.mark.first(3)
def test_a_mask_of_numpy_is_taken_inside_vmap(name):
    """A constant mask for all members of an outer batch."""
    mask = np.arange(SHORT) < np.array([[SHORT], [5]])

    def outer(x):
        return jax.vmap(lambda x: make(ATTENTION[name])(x, mask=mask))(x)

    shape = (3, *SHAPES["tokens"])
    assert nnx.eval_shape(outer, shaped(*shape)).shape == shape


def test_a_step_of_a_decoder_refuses_other_ranks_and_float_masks():
    lev, gla = lev_init(2, HEADS, HEAD_DIM, budget=4), jnp.zeros((2, HEADS, HEAD_DIM, HEAD_DIM))
    shape = SHAPES["heads"][:1] + SHAPES["heads"][2:]

    def traced(step, state, *shape, **arguments):
        return jax.eval_shape(lambda x: step(x, x, x, state, **arguments)[0], shaped(*shape))

    for step, state in ((lev_step, lev), (gla_step, gla)):
        assert traced(step, state, *shape).shape == shape
        wanted = r"q, k, v have shapes \(2, 8\), .*: pass \[batch, heads, dim\] each"
        refused(wanted, traced, step, state, *shape[1:])
    refused("mask has dtype float32", traced, lev_step, lev, *shape, mask=jnp.zeros(2))
    assert traced(lev_step, lev, *shape, mask=np.array([1, 0])).shape == shape
