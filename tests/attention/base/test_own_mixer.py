"""A mixer of one's own is one file and a row: the tables, `compare`, the config and the promises find it on arrival."""

import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION, Mixer, MultiHead, as_attention_fn
from efficient_tx.compare import readme
from efficient_tx.compare.attention.inputs import tokens as measured_tokens
from efficient_tx.compare.attention.measure import Settings, case
from efficient_tx.config.describe import describe
from efficient_tx.config.names import mixer_class
from efficient_tx.config.schema import make_config
from tests.support.mixers import check_padding, make

# A subclass of MultiHead with a function, in one file.
LEAN = '''
"""Weights are even powers of products."""

import jax.numpy as jnp

from efficient_tx.attention import MultiHead
from efficient_tx.attention.base.options import checked_by
from efficient_tx.checks import at_least


def check(*, power, causal):
    at_least(1, power=power)
    if causal and power > 4:
        raise ValueError(f"power is {power}: at most 4 where causal")


@checked_by(check)
def lean(q, k, v, *, mask=None, key=None, causal=False, power: int = 1):
    """Attends with the weights (q·k)^2p.

    Args:
      power: p of the weights.
    """
    weights = jnp.einsum("bqhd,bkhd->bhqk", q, k) ** (2 * power)
    if mask is not None:
        weights = jnp.where(mask[:, None, None], weights, 0)
    if causal:
        weights = jnp.tril(weights)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bhqk,bkhd->bqhd", weights / jnp.where(total > 0, total, 1), v)


class Lean(MultiHead):
    """Multi-head lean attention."""

    paper = "Nobody 2026, arXiv 2601.00001"
    computes = "even powers of products"
    cost = "n²"
    function = staticmethod(lean)
'''

# A subclass of Mixer that only writes `mix`, and has an option of its own.
SHIFT = '''
"""Every token becomes the one before it."""

import jax.numpy as jnp

from efficient_tx.attention import Mixer


class Shift(Mixer):
    """Every token becomes the one before it.

    Args:
      gain: what the tokens are multiplied by.
    """

    paper = "Nobody 2026"
    computes = "the token before"
    cost = "n"
    has_positions = False
    side_by_side = True

    def __init__(self, features, *, gain: float = 1.0, **common):
        super().__init__(features, **common)
        self.gain = gain

    def mix(self, x, *, mask, key):
        return self.gain * jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
'''
OWN = {
    "lean": ("own_lean", LEAN, "Lean", "power", 1, "p of the weights"),
    "shift": ("own_shift", SHIFT, "Shift", "gain", 1.0, "what the tokens are multiplied by"),
}
pytestmark = pytest.mark.quick


@pytest.fixture(params=OWN)
def row(request, tmp_path, monkeypatch):
    """(name, class): the file is written, imported, and has its row."""
    module, source, name, *_ = OWN[request.param]
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    cls = getattr(importlib.import_module(module), name)
    monkeypatch.setitem(ATTENTION, request.param, cls)
    yield request.param, cls
    monkeypatch.delitem(importlib.sys.modules, module)


def test_an_own_mixer_is_found_everywhere(row):
    name, cls = row
    module, _, _, option, default, meaning = OWN[name]
    line = next(line for line in readme.mixer_table().splitlines() if line.startswith(f"| `{name}` |"))
    assert cls.computes in line and f"`{module}`" in line and "| yes |" in line
    assert cls.family == "own"
    assert inspect.signature(cls).parameters[option].default == default

    given = measured_tokens("random", 1, 8, 2, 4)
    settings = Settings(lengths=(8,), batch=1, heads=2, head_dim=4, budget=4)
    call, arrays, mask, key = case(name, given, settings)
    assert jax.eval_shape(call, arrays, mask, key).shape[:2] == (1, 8)

    for typed, section in ((name, name), (f"{module}:{cls.__name__}", cls.__name__)):
        assert mixer_class(typed) is cls
        config = make_config("lra.listops", f"{typed}*2,softmax", model={"layers": 3})
        assert config.attention[section].to_dict() == {option: default} | ({"conv": 0} if name == "lean" else {})
        assert describe(config)[f"attention.{section}.{option}"] == meaning


def test_an_own_mixer_keeps_the_promises_of_padding(row):
    for causal in (False, True) if row[0] == "lean" else (True,):
        check_padding(row[1], causal=causal)


def test_options_of_an_own_mixer(row):
    name, cls = row
    _, _, _, option, default, _ = OWN[name]
    assert getattr(make(cls, **{option: 3 * default}), option) == 3 * default
    with pytest.raises(TypeError, match=f"{cls.__name__} has no argument 'powr'"):
        make(cls, powr=3)
    if name == "shift":
        with pytest.raises(ValueError, match="shift is no function of queries, keys and values: use the module Shift"):
            as_attention_fn("shift")
        return
    x = jnp.ones((1, 3, 2, 4))
    for call in (lambda: make(cls, power=0), lambda: cls.function(x, x, x, power=0)):
        with pytest.raises(ValueError, match="power is 0: it must be at least 1"):
            call()
    # A check sees what the mixer has besides: causal.
    with pytest.raises(ValueError, match="power is 5: at most 4 where causal"):
        make(cls, power=5, causal=True)
    assert make(cls, power=5).power == 5
    attend = as_attention_fn("lean", power=2)
    np.testing.assert_allclose(attend(x, x, x), x)


def test_an_own_init_and_an_own_function_share_one_signature():
    """The options of a function, those of the class and of its bases, each once, at every subclass."""

    def twice(q, k, v, *, mask=None, causal=False, often: int = 2, table: jax.Array | None = None):
        return often * v

    class Own(MultiHead):
        function = staticmethod(twice)

        def __init__(self, features, *, gate: bool = False, **common):
            super().__init__(features, **common)
            self.gate = gate

    class Deeper(Own):
        def __init__(self, features, *, depth: int = 1, **common):
            super().__init__(features, **common)
            self.depth = depth

    shown = inspect.signature(Deeper).parameters
    names = ("features", "depth", "gate", "often", "heads", "conv", "dropout", "causal", "max_len")
    assert set(names) <= shown.keys() and "table" not in shown and "common" not in shown
    assert "depth" not in inspect.signature(Own).parameters
    mixer = Deeper(8, heads=2, depth=4, gate=True, often=3, rngs=nnx.Rngs(0))
    assert (mixer.depth, mixer.gate, mixer.often) == (4, True, 3)
    with pytest.raises(TypeError, match="Deeper has no argument 'table': options of its function are often"):
        Deeper(8, heads=2, table=None, rngs=nnx.Rngs(0))


def test_an_option_whose_name_all_mixers_have_is_refused_at_class_definition():
    def wrong(q, k, v, *, mask=None, windowed: bool = True):
        return v

    with pytest.raises(TypeError, match=r"Wrong\.windowed is an attribute of all mixers: give that option another"):
        type("Wrong", (MultiHead,), {"function": staticmethod(wrong)})
    with pytest.raises(TypeError, match=r"Wrong\.windowed"):
        type("Wrong", (Mixer,), {"function": staticmethod(wrong)})


def test_a_mixer_without_mix_and_function_says_so():
    class Empty(Mixer):
        """Nothing."""

    with pytest.raises(NotImplementedError, match="Empty writes neither `mix` nor a `function` of the tokens"):
        Empty(4)(jnp.ones((1, 2, 4)))


def test_a_function_is_static_and_says_whether_there_is_a_causal_form():
    """A class need not write `staticmethod`, nor `can_be_causal`; a function that would see the padding is refused."""

    def both(q, k, v, *, mask=None, causal=False):
        return v

    def one(q, k, v, *, mask=None):
        return v

    for function, causal in ((both, True), (one, False)):
        cls = type("Own", (MultiHead,), {"function": function})
        assert cls.function is function and cls.can_be_causal is causal
    with pytest.raises(ValueError, match="Own has no causal form"):
        cls(8, heads=2, causal=True, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"Blind\.function takes no argument `mask`: it would see the padding"):
        type("Blind", (MultiHead,), {"function": lambda q, k, v: v})
