"""Decoding, over the table ATTENTION: prefill and steps are the rows of the causal forward pass."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION, MultiHead
from efficient_tx.kernels.flash_attention import prefix, window
from efficient_tx.models.transformer import Encoder
from tests.attention.test_memory import shapes_in
from tests.support.mixers import BUDGET, FEATURES, LONG, assert_same, make, right_padded, tokens

DECODING = [name for name, cls in ATTENTION.items() if cls.can_decode]
# Tokens of three examples in a first prefill, in a second one, and one by one: four budgets in all.
FIRST, SECOND, STEPS = (13, 7, 0), (5, 3, 5), 14


def default(cls, option):
    """The default of an option of the constructor, that of a class below it where the class leaves it to that."""
    for base in cls.__mro__:
        parameters = inspect.signature(base.__init__).parameters if "__init__" in vars(base) else {}
        if option in parameters:
            return parameters[option].default
    return None


def pieces(seed=0):
    """Sequences `[3, LONG, features]` with their real tokens first, and the same tokens cut in the three parts."""
    lengths = np.add(FIRST, SECOND) + STEPS
    assert lengths.max() == 4 * BUDGET
    x = tokens(seed, 3, LONG, FEATURES)
    parts = ((0, 0, 0), max(FIRST)), (FIRST, max(SECOND)), (np.add(FIRST, SECOND), STEPS)
    cut = [np.stack([x[b, i : i + size] for b, i in enumerate(starts)]) for starts, size in parts]
    return x, lengths, cut


def decoded(module, max_len=LONG, **options):
    """`(params) -> rows of each of the three parts`, compiled."""
    graphdef, params = nnx.split(module)

    @jax.jit
    def run(params, first, second, steps):
        mixer = nnx.merge(graphdef, params)
        start, state = mixer.prefill(first, mask=right_padded(FIRST, max(FIRST)), max_len=max_len)
        middle, state = mixer.prefill(second, mask=right_padded(SECOND, max(SECOND)), state=state)

        def step(state, x):
            y, state = mixer.step(x, state)
            return state, y

        _, rows = jax.lax.scan(step, state, steps.swapaxes(0, 1))
        return start, middle, rows.swapaxes(0, 1)

    return params, run


def check(module, tolerance=1e-5, masked=0):
    x, lengths, cut = pieces()
    params, run = decoded(module)
    graphdef, _ = nnx.split(module)
    whole = jax.jit(lambda params, x, mask: nnx.merge(graphdef, params)(x, mask=mask))
    expected = np.asarray(whole(params, x, right_padded(lengths, LONG)))
    parts = [np.asarray(part) for part in run(params, *cut)]
    for b, (first, second) in enumerate(zip(FIRST, SECOND)):
        rows = np.concatenate([parts[0][b, :first], parts[1][b, :second], parts[2][b]])
        assert_same(rows, expected[b, : lengths[b]], tolerance)
        if masked is not None:
            assert (parts[0][b, first:] == masked).all() and (parts[1][b, second:] == masked).all()


@pytest.mark.parametrize("name", sorted(DECODING, key=lambda name: name not in ("local", "gla", "lev")))
@pytest.mark.first(3)
def test_prefill_and_steps_are_rows_of_the_causal_forward_pass(name):
    check(make(ATTENTION[name], causal=True))


@pytest.mark.parametrize("name", [name for name in DECODING if issubclass(ATTENTION[name], MultiHead)])
@pytest.mark.first(1)
def test_so_they_are_with_convolutions_and_positions(name):
    turned = {"positions": "rope"} if ATTENTION[name].has_positions and name != "tensor" else {}
    check(make(ATTENTION[name], causal=True, conv=4, **turned))


OWN_CONV = [name for name in DECODING if default(ATTENTION[name], "conv")]


@pytest.mark.parametrize("name", OWN_CONV)
@pytest.mark.first(1)
def test_so_they_are_without_the_convolutions_of_the_class(name):
    assert set(OWN_CONV) > {"mamba2", "delta"}
    check(make(ATTENTION[name], causal=True, conv=0))


@pytest.mark.slow
def test_scores_and_masks_of_ones_own_count_from_the_first_token():
    mask = prefix(3) | window(5)
    check(make(ATTENTION["custom"], causal=True, score="alibi", mask=mask, conv=3))


def state(name, max_len, **options):
    """The shapes of a state of one sequence, and the mixer."""
    longest = max(LONG, max_len or 0)
    mixer = nnx.eval_shape(lambda: make(ATTENTION[name], causal=True, max_len=longest, **options))
    return jax.eval_shape(lambda: mixer.init_state(1, max_len=max_len)), mixer


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact))


@pytest.mark.parametrize("name", DECODING)
def test_its_bytes_are_what_the_class_says_and_those_of_a_bounded_method_do_not_grow(name):
    options = {"conv": 3} if issubclass(ATTENTION[name], MultiHead) else {}
    sizes = []
    for length in (4 * BUDGET, 16 * BUDGET):
        arrays, mixer = state(name, length, **options)
        assert nbytes(arrays) == mixer.state_bytes(length)
        sizes.append(nbytes(arrays))
    if sizes[1] == sizes[0]:
        assert nbytes(state(name, None, **options)[0]) == sizes[0]
    elif not ATTENTION[name].needs_max_len:
        with pytest.raises(ValueError, match=f"{ATTENTION[name].__name__} stores all tokens to decode: give max_len"):
            nnx.eval_shape(lambda: make(ATTENTION[name], causal=True, max_len=None).init_state(1))


def test_who_cannot_decode_says_why():
    for cls in ATTENTION.values():
        if not cls.can_decode:
            mixer = nnx.eval_shape(lambda cls=cls: make(cls, causal=cls.can_be_causal))
            reason = cls.refuses["rows"] if cls.can_be_causal else "it has no causal form"
            with pytest.raises(ValueError, match=f"{cls.__name__} cannot decode: {reason}"):
                mixer.init_state(1)
    for options, reason in (
        ({}, "it is not causal, build it with causal=True"),
        ({"causal": True, "positions": "rope2d", "max_len": 36}, "positions='rope2d' depend on the number of tokens"),
    ):
        mixer = nnx.eval_shape(lambda options=options: make(ATTENTION["softmax"], **options))
        with pytest.raises(ValueError, match=f"Softmax cannot decode: {reason}"):
            mixer.init_state(1)
        with pytest.raises(ValueError, match="Softmax cannot decode"):
            mixer.prefill(jnp.zeros((1, 3, FEATURES)))
    with pytest.raises(ValueError, match="Longformer cannot decode: global_projections=True, use False"):
        nnx.eval_shape(lambda: make(ATTENTION["longformer"], causal=True, global_projections=True)).init_state(1)


def test_a_token_without_room_is_not_a_number():
    mixer = make(ATTENTION["softmax"], causal=True)
    x = tokens(0, 2, 5, FEATURES)
    y, after = mixer.prefill(x[:, :3], mask=right_padded((3, 2), 3), max_len=4)
    for t in (3, 4):
        y, after = mixer.step(x[:, t], after)
        np.testing.assert_array_equal(np.isnan(y).all(1), [t > 3, False])
        assert (np.isnan(y).any(1) == np.isnan(y).all(1)).all()
    with pytest.raises(ValueError, match="Softmax has room for 4 tokens and gets 5: give max_len"):
        mixer.prefill(x, max_len=4)
    with pytest.raises(ValueError, match=r"x has shape \(2, 7\): a step of Softmax takes \[batch, features\] with 16"):
        mixer.step(x[:, 0, :7], after)
    for wrong in (0, -3, 2.5, "9"):
        with pytest.raises(ValueError, match=f"max_len is {wrong!r}: it "):
            mixer.init_state(2, max_len=wrong)


@pytest.mark.parametrize("name", DECODING)
@pytest.mark.first(2)
def test_a_state_is_of_so_many_sequences_and_no_prompt_leaves_it_as_it_is(name):
    mixer = make(ATTENTION[name], causal=True)
    x, state = jnp.asarray(tokens(0, 2, 1, FEATURES)), mixer.init_state(1)
    for call in (lambda: mixer.step(x[:, 0], state), lambda: mixer.prefill(x, state=state)):
        with pytest.raises(ValueError, match="and the state is of 1 sequences: give one of 2"):
            call()
    y, after = mixer.prefill(jnp.zeros((1, 0, FEATURES)), state=state)
    assert y.shape == (1, 0, FEATURES)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("name", DECODING)
@pytest.mark.first(1)
def test_float64_stays_float64(name):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(1, 7, FEATURES))
        graphdef, params = nnx.split(make(ATTENTION[name], causal=True))

        @jax.jit
        def last_rows(params, x):
            mixer = nnx.merge(graphdef, params)
            return mixer.step(x[:, 6], mixer.prefill(x[:, :6])[1])[0], mixer(x)[:, 6]

        decoded, whole = last_rows(params, x)
        assert decoded.dtype == whole.dtype == np.float64
        assert_same(decoded, whole, 1e-12)


# A later part of a prompt beside few tokens, and beside all the room there is.
LATER = [name for name in DECODING if ATTENTION[name].cost != "n²"]


@pytest.mark.parametrize("name", ["custom", *LATER])
@pytest.mark.first(3)
def test_a_later_part_of_a_prompt_has_no_array_of_its_length_and_that_of_all(name):
    length = 1536
    cls = ATTENTION[name]
    mixer = nnx.eval_shape(lambda: make(cls, max_len=2 * length, causal=True))
    graphdef, params = nnx.split(mixer)

    def run(params, x):
        mixer = nnx.merge(graphdef, params)
        return mixer.prefill(x, state=mixer.init_state(1, max_len=2 * length))[0]

    shapes = list(shapes_in(jax.make_jaxpr(run)(params, jnp.zeros((1, length, FEATURES))).jaxpr))
    assert not [shape for shape in shapes if sum(size >= length for size in shape) > 1]


def test_what_is_tied_to_a_length_decodes_no_longer_text():
    """As the forward pass: the bias and the weights beyond it would be others."""
    for name in ("sigmoid", "cosformer"):
        mixer = nnx.eval_shape(lambda name=name: make(ATTENTION[name], causal=True))
        error = f"length is {LONG + 1}, but {ATTENTION[name].__name__} was built for max_len={LONG}"
        with pytest.raises(ValueError, match=error):
            mixer.init_state(1, max_len=LONG + 1)
        with pytest.raises(ValueError, match=error):
            mixer.prefill(jnp.zeros((1, LONG + 1, FEATURES)))


@pytest.mark.parametrize("name", ["softmax", "gla"])
@pytest.mark.first(1)
def test_bfloat16_is_stored_where_tokens_are_and_sums_are_float32(name):
    mixer = make(ATTENTION[name], causal=True, conv=4, dtype=jnp.bfloat16)
    memory = mixer.init_state(1).memory
    assert {x.dtype for x in jax.tree.leaves(memory)} == {jnp.dtype("bfloat16" if name == "softmax" else "float32")}
    check(mixer, 2e-2)  # two and a half digits, rounded at other places


@pytest.mark.slow
def test_a_stack_of_blocks_decodes():
    mixers = [lambda *args, cls=ATTENTION[name], **options: make(cls, causal=True, features=FEATURES, **options)
              for name in ("softmax", "gla")]  # fmt: skip
    mixers = [lambda features, mixer=mixer, **options: mixer(**options) for mixer in mixers]
    encoder = Encoder(FEATURES, layers=3, mixers=mixers, mlp_features=24, layer_scale=0.5, rngs=nnx.Rngs(0))
    check(encoder, masked=None)  # its norms
    assert encoder.state_bytes(9) == sum(block.mixer.state_bytes(9) for block in encoder.blocks)
    arrays = jax.eval_shape(lambda: encoder.init_state(1, max_len=9))
    assert nbytes(arrays) == encoder.state_bytes(9)


def test_all_steps_are_one_program():
    mixer = make(ATTENTION["local"], causal=True)
    graphdef, params = nnx.split(mixer)
    step = jax.jit(lambda params, x, state: nnx.merge(graphdef, params).step(x, state), donate_argnums=2)
    after = mixer.init_state(2)
    for t in range(3):
        _, after = step(params, tokens(t, 2, FEATURES), after)
    assert step._cache_size() == 1 and after.count.tolist() == [3, 3]
