"""What every token mixer is before it computes: parameters, shapes, refusals and sizes; nothing here is compiled."""

import inspect
from functools import partial
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import efficient_tx.attention
from efficient_tx.attention import ATTENTION, Mixer
from efficient_tx.attention.base.options import options
from efficient_tx.checks import OptionError
from efficient_tx.kernels.flash_attention import Mask
from tests.support.mixers import BUDGET, FEATURES, HEADS, SHORT, make

every = pytest.mark.parametrize("name", ATTENTION)
pytestmark = pytest.mark.quick


def abstract(name, **options):
    return nnx.eval_shape(lambda: make(ATTENTION[name], **options))


def output(mixer, batch, length):
    """Shape of the output of an abstract mixer."""
    graphdef, params = nnx.split(mixer)
    x = jax.ShapeDtypeStruct((batch, length, FEATURES), jnp.float32)
    mask = jax.ShapeDtypeStruct((batch, length), bool)
    return jax.eval_shape(lambda params, x, mask: nnx.merge(graphdef, params)(x, mask=mask), params, x, mask)


@every
def test_holds_parameters_only(name):
    variables = [variable for _, variable in nnx.to_flat_state(nnx.split(abstract(name))[1])]
    assert all(type(variable) is nnx.Param for variable in variables)
    assert all(jnp.issubdtype(variable.dtype, jnp.floating) for variable in variables)


@every
def test_parameters_are_float32_where_floats_are_float64(name):
    """With the further parameters that options bring."""
    known = inspect.signature(ATTENTION[name]).parameters
    more = {"conv": 3, "value_conv": 3, "bottleneck": "convolution", "layer_scale": 0.1, "global_projections": True}
    more["score"] = "alibi"
    with jax.enable_x64(True):
        mixer = abstract(name, **{option: value for option, value in more.items() if option in known})
    assert {variable.dtype for variable in jax.tree.leaves(nnx.state(mixer))} <= {jnp.dtype(jnp.float32)}


@every
@pytest.mark.first(4)
def test_shapes_of_few_tokens_and_wide_heads(name):
    """Nothing comes of nothing; a head may be wider than features // heads, queries and keys may turn."""
    cls = ATTENTION[name]
    mixer = abstract(name, head_dim=16, **({"positions": "rope"} if cls.has_positions else {}))
    for length in (0, 1):
        assert output(mixer, 2, length).shape == (2, length, FEATURES)
    # Dropout, the last `where`, and what keeps padding out are the same in all.
    assert cls.__call__ is Mixer.__call__
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5\): a mixer takes \[batch, length\]"):
        nnx.eval_shape(lambda: make(cls)(jnp.zeros((2, 4, FEATURES)), mask=jnp.ones((2, 5), bool)))


@pytest.mark.parametrize("name", [name for name in ATTENTION if not ATTENTION[name].can_be_causal])
def test_what_has_no_causal_form_refuses_at_construction(name):
    with pytest.raises(ValueError, match="causal"):
        abstract(name, causal=True)


@pytest.mark.parametrize("name", [name for name in ATTENTION if ATTENTION[name].needs_max_len])
def test_what_is_tied_to_the_length_says_so(name):
    with pytest.raises(ValueError, match="give max_len"):
        abstract(name, max_len=None)
    with pytest.raises(ValueError, match=f"length is {SHORT + 1}.*max_len={SHORT}"):
        output(abstract(name, max_len=SHORT), 1, SHORT + 1)


@pytest.mark.parametrize("name", [name for name in ATTENTION if not ATTENTION[name].has_positions])
def test_what_has_nothing_to_turn_refuses_positions(name):
    with pytest.raises(ValueError, match="'rope'"):
        abstract(name, positions="rope")


@pytest.mark.parametrize("name", [name for name in ATTENTION if ATTENTION[name].has_positions])
def test_a_width_that_cannot_turn_is_refused_at_construction_by_an_option_of_the_class(name):
    """What turns is split into pairs of channels, on a grid into two halves of them."""
    for positions, multiple in (("rope", 2), ("rope2d", 4)):
        refused = []
        for head_dim in (12, 13, 14):
            try:
                mixer = abstract(name, head_dim=head_dim, positions=positions, max_len=4)
            except OptionError as error:
                refused.append(head_dim)
                assert error.option in inspect.signature(ATTENTION[name]).parameters
                assert str(error).endswith(f"{positions} needs a multiple of {multiple}")
            else:
                assert output(mixer, 1, 4).shape == (1, 4, FEATURES)
        assert refused


@every
def test_the_family_is_the_folder(name):
    cls = ATTENTION[name]
    assert inspect.getsourcefile(cls).split("/")[-3:-1] == ["attention", cls.family]
    assert cls.family in {path.name for path in FOLDERS}


FOLDERS = [path.parent for path in Path(efficient_tx.attention.__file__).parent.glob("*/__init__.py")]


@every
def test_the_signature_shows_all_that_the_class_takes(name):
    """Options of the function first to last, then those of the class, each once; a budget is among them."""
    cls = ATTENTION[name]
    shown = inspect.signature(cls).parameters
    assert {"features", "heads", "dropout", "causal", "positions", "max_len", "rngs"} <= shown.keys()
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in shown.values())
    for option, parameter in options(cls.function).items():
        assert shown[option].default == parameter.default
    assert cls.within(BUDGET).keys() <= shown.keys()
    taken = {"mask", "key", "q", "k", "v", "x"} & shown.keys()
    # Those of a call; a Mask of the mixer's own, beside that of its calls, is an option.
    assert taken <= {"mask"} and all(Mask in get_args(shown[option].annotation) for option in taken)


@every
def test_each_option_becomes_an_attribute_and_unknown_ones_are_refused(name):
    cls, known = ATTENTION[name], options(ATTENTION[name].function)
    mixer = abstract(name)
    for option, parameter in known.items():
        assert getattr(mixer, option) == cls.within(BUDGET).get(option, parameter.default)
    with pytest.raises(TypeError, match=f"{cls.__name__} has no argument 'landmrks'"):
        abstract(name, landmrks=3)


CHECKED = [name for name in ATTENTION if hasattr(ATTENTION[name].function, "check")]


@pytest.mark.parametrize("name", CHECKED)
def test_a_check_fires_at_a_call_and_at_construction(name):
    """Whatever number the check looks at: 0 and below are refused by one line, the same in both places."""
    cls = ATTENTION[name]
    defaults = cls.function.defaults
    budgets = cls.within(BUDGET)
    numbers = [name for name in options(cls.function) if name in budgets or type(defaults.get(name)) in (int, float)]
    refused = 0
    for option in numbers:
        try:
            cls.function.check(**defaults | {option: -1})
        except ValueError as error:
            refused += 1
            said = str(error)
            assert option in said and "\n" not in said
            with pytest.raises(ValueError) as at_construction:
                abstract(name, **{option: -1})
            with pytest.raises(ValueError) as at_call:
                x = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
                known = inspect.signature(cls.function).parameters.values()
                needed = [p for p in known if p.default is p.empty]
                jax.eval_shape(partial(cls.function, **{option: -1}), *[x] * len(needed))
            assert str(at_construction.value) == str(at_call.value) == said
    assert refused


@every
def test_what_a_decoder_keeps(name):
    """A bound where the class says one: no more for a longer sequence once the sizes are reached; else linear in it."""
    mixer = abstract(name)
    short, long, longest = (mixer.state_bytes(length) for length in (1024, 2048, 4096))
    assert 0 < short <= long <= longest
    assert longest - long in (0, 2 * (long - short))
    assert short % 4 == 0


HEAD_DIM = FEATURES // HEADS
# Numbers that are kept of 1,000 tokens, counted by hand from each method's recurrence or cache.
KEPT = {
    "softmax": 2 * 1000 * FEATURES,  # a key and a value for each token
    "local": 2 * 8 * FEATURES,  # those of the window
    "linear": HEADS * (HEAD_DIM * HEAD_DIM + HEAD_DIM),  # sums of k vᵀ and of k
    "gla": HEADS * (HEAD_DIM // 2) * HEAD_DIM,  # one matrix, keys half as wide
    "skyformer": 2 * 8 * FEATURES,  # landmarks in place of keys and values
    "fourier": 1000 * FEATURES,  # the tokens
}


@pytest.mark.parametrize("name", KEPT)
def test_bytes_kept_by_hand(name):
    assert abstract(name).state_bytes(1000) == 4 * KEPT[name]


def test_bytes_of_the_decoders_that_exist():
    """Those of the arrays that they hold."""
    causal = abstract("gla", causal=True)
    assert causal.state_bytes(99) == jax.eval_shape(lambda: causal.init_state(1)).memory.size * 4
    convolved = abstract("softmax", conv=4)
    assert (
        convolved.state_bytes(99) - abstract("softmax").state_bytes(99) == 4 * 3 * 3 * FEATURES
    )  # 3 tokens of q, k, v
