"""Scores, masks and weight structures that a config names, by their own names and as module:name."""

import sys
import textwrap

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import MultiHead
from efficient_tx.checks import OptionError, parse_call
from efficient_tx.config import ConfigError, keys, make_config, resolve, schema, stored
from efficient_tx.config.build import build_linear, build_mixer
from efficient_tx.config.check import check
from efficient_tx.config.evaluation import apply_settings
from efficient_tx.config.objects import expression
from efficient_tx.kernels.flash_attention import Mask, Score, causal, prefix, window
from efficient_tx.linear import Form, LowRank, Monarch, Sparse, Sum

MINE = """
    import dataclasses
    from typing import Any
    import numpy as np
    from efficient_tx.kernels.flash_attention import Score, Mask, prefix, window
    from efficient_tx.linear import LowRank

    @dataclasses.dataclass(frozen=True)
    class Gated(Score):
        gates: Any = None
        def logits(self, dot, q_norm, k_norm, i, j, head): return self.gates * dot
        def given(self, *, heads, bias):
            return self if self.gates is not None else dataclasses.replace(self, gates=np.ones(heads))

    class Lost(Score):
        def logits(self, dot, q_norm, k_norm, i, j, head): return dot + lost

    @dataclasses.dataclass(frozen=True)
    class Sized(Mask):
        size: int

    class Thin(LowRank): pass

    sinks = window(3) | prefix(2)
"""
TINY = {"batch_size": 8, "steps": 3, "task": {"max_len": 24}, "model": {"features": 8, "heads": 2, "layers": 1}}


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_objects.py").write_text(textwrap.dedent(MINE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_objects", None)


def config(**typed):
    typed = {f"attention.custom.{key}": value for key, value in typed.items()}
    return resolve.resolve(make_config("lra.listops", "custom", **TINY), typed)


def mixer(made):
    make = build_mixer("custom", made.attention.custom, nnx.Linear)
    return nnx.eval_shape(lambda: make(8, heads=2, rngs=nnx.Rngs(0)))


@pytest.mark.quick
def test_text_becomes_objects():
    plain = config()
    assert (plain.attention.custom.score, plain.attention.custom.mask) == ("softmax", None)
    assert mixer(plain).mask is None and mixer(config(mask="")).mask is None
    made = mixer(config(score="my_objects:Gated", mask="my_objects:sinks"))
    assert made.score.gates.shape == (2,) and made.mask == window(3) | prefix(2)
    assert mixer(config(score="alibi")).score.slopes.shape == (2,)


@pytest.mark.quick
def test_a_stored_config_and_an_evaluation_name_them_too():
    made = config(score="my_objects:Gated", mask="window(3)")
    run = keys.flatten(stored.restore(made.to_dict()))
    assert (run["attention.custom.score"], run["attention.custom.mask"]) == ("my_objects:Gated", "window(3)")
    changed = apply_settings(made.to_dict(), {"attention.custom.mask": "my_objects:sinks"})
    assert mixer(changed).mask == window(3) | prefix(2)
    assert mixer(apply_settings(made.to_dict(), {"attention.custom.mask": ""})).mask is None


@pytest.mark.quick
def test_the_options_of_any_mixer_may_be_objects():
    def attend(q, k, v, *, mask=None, weigh: str | Score = "softmax", seen: Mask | None = None):
        return v

    class Own(MultiHead):
        function = staticmethod(attend)

    section = schema.options(Own, schema.GIVEN["mixer"])
    assert {key: section[key] for key in ("weigh", "seen")} == {"weigh": "softmax", "seen": None}
    assert section.get_type("seen") is str


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("window(64)", window(64)),
        (" ~causal() & (window(2) | prefix(4))", ~causal() & (window(2) | prefix(4))),
    ],
)
def test_expressions_of_masks(text, mask):
    assert expression(text, "mask") == mask


@pytest.mark.quick
@pytest.mark.parametrize(
    "text",
    ["window", "window(", "windo(3)", "window(3) + prefix(1)", "window(size=3)", "window(x)", "window('3')", "3",
     "__import__('os').getcwd()", "(lambda: window(3))()", "window(3) | 3", "~" * 9999 + "causal()", "\0"],
)  # fmt: skip
def test_other_text_is_no_mask_and_runs_nothing(text):
    with pytest.raises(ConfigError, match=r"config.mask is .*: give module:name, or causal, window, prefix combined"):
        expression(text, "mask")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ({"mask": "window(0)"}, "config.attention.custom.mask is 'window(0)': size is 0: it must be at least 1; give"),
        ({"mask": "my_objects:Gated"}, "config.attention.custom.mask is 'my_objects:Gated': that is no efficient_tx."),
        ({"score": "my_objects:sinks"}, "config.attention.custom.score is 'my_objects:sinks': that is no efficient"),
        ({"score": "my_objects:Gate"}, "config.attention.custom.score is 'my_objects:Gate': the module my_objects has"),
        ({"score": "json:loads"}, "config.attention.custom.score is 'json:loads': it is in "),
        ({"score": "alibj"}, "config.attention.custom.score is 'alibj': choose one of softmax, "),
        ({"mask": "my_objects:Sized"}, "config.attention.custom.mask is 'my_objects:Sized', which cannot be made: Ty"),
        (
            {"score": "my_objects:Lost"},
            "config.attention.custom cannot be used: NameError: name 'lost' is not defined (",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(typed, line):
    with pytest.raises(ConfigError) as raised:
        check(config(**typed))
    assert str(raised.value).startswith(line) and "\n" not in str(raised.value)


def test_the_named_objects_are_those_of_the_built_mixer():
    made = config(score="my_objects:Gated", mask="my_objects:sinks")
    build = build_mixer("custom", made.attention.custom, nnx.Linear)
    x = np.random.default_rng(0).normal(size=(1, 7, 8)).astype(np.float32)
    near, everywhere = (build(8, heads=2, rngs=nnx.Rngs(0)) for _ in range(2))
    everywhere.mask = None
    seen = np.abs(jax.jacobian(near)(x)[0, :, :, 0]).sum((1, 3)) > 0
    i, j = np.arange(7)[:, None], np.arange(7)
    np.testing.assert_array_equal(seen, (abs(i - j) < 3) | (j < 2))
    assert not np.allclose(near(x), everywhere(x))


def sums(**typed):
    typed = {f"linear.mlp.{key}": value for key, value in typed.items()}
    return resolve.resolve(make_config("lra.listops", "vmean+sum", **TINY), typed)


def layer(made):
    make = build_linear(made.linear.mlp, "linear.mlp")
    return nnx.eval_shape(lambda: make(16, 8, rngs=nnx.Rngs(0)))


@pytest.mark.quick
def test_text_becomes_the_parts_of_a_sum():
    plain = sums()
    assert plain.linear.mlp.to_dict() == {"name": "sum", "first": None, "second": None}
    for made in (layer(plain), layer(sums(first="", second=""))):
        assert type(made) is Sum and (type(made.first), type(made.second)) == (Monarch, LowRank)
    made = sums(first="my_objects:Thin(rank=3)", second="sparse(density=0.25)")
    check(made)
    made = layer(made)
    assert (type(made.first).__name__, made.first.rank) == ("Thin", 3)
    assert (type(made.second), made.second.kept) == (Sparse, 32)


@pytest.mark.quick
def test_a_stored_config_keeps_the_parts_of_a_sum():
    made = sums(first="monarch", second="low_rank(rank=1)")
    run = stored.restore(made.to_dict())
    assert (run.linear.mlp.first, run.linear.mlp.second) == ("monarch", "low_rank(rank=1)")
    assert layer(run).second.rank == 1 and layer(run).first.blocks == 4
    # What a form prints is text that names it.
    form = Form(LowRank, rank=1)
    assert layer(sums(second=str(form))).second.rank == 1


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("monarc(blocks=2)", "config.linear.mlp.first is 'monarc': choose one of dense, low_rank, monarch"),
        (
            "monarch(block=2)",
            "config.linear.mlp.first is 'monarch(block=2)': monarch has no option 'block': choose one",
        ),
        (
            "monarch(blocks='2')",
            """config.linear.mlp.first is "monarch(blocks='2')": blocks is '2': it takes a value o""",
        ),
        ("monarch(blocks=0)", "config.linear.mlp.first is monarch(blocks=0): blocks is 0: it must be at least 1"),
        ("monarch(4)", "config.linear.mlp.first is 'monarch(4)': give NAME or NAME(OPTION=VALUE, ...)"),
        ("sum", "config.linear.mlp.first is sum: a part of a sum must not be a sum"),
        ("json:loads(x=1)", "config.linear.mlp.first is 'json:loads': it is in "),
    ],
)
def test_mistakes_in_a_part_are_one_line(text, line):
    with pytest.raises(ConfigError) as raised:
        check(sums(first=text))
    assert str(raised.value).startswith(line) and "\n" not in str(raised.value)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("monarch", "monarch", {}),
        (" low_rank ( rank = -32 ) ", "low_rank", {"rank": -32}),
        ("a.b:C(x=(1, 2), y=None, z=')', w=0.5,)", "a.b:C", {"x": (1, 2), "y": None, "z": ")", "w": 0.5}),
        ("flap()", "flap", {}),
    ],
)
def test_calls_as_text(text, name, options):
    assert parse_call(text, "method") == (name, options)


@pytest.mark.quick
@pytest.mark.parametrize(
    "text",
    ["", "a b", "a(", "a)", "a(1)", "a(x)", "a(x=y)", "a(x=1, x=2)", "a(**{'x': 1})", "a(x=1)(y=2)", "a(x=1).b()",
     "a(x=__import__('os'))", "a(x=1) + b(y=2)", "a:b:c", "a(x=1 for x in [1])", "a(x=" + "(" * 9999 + ")", "\0"],
)  # fmt: skip
def test_other_text_is_no_call_and_runs_nothing(text):
    with pytest.raises(OptionError, match=r"method is .*: give NAME or NAME\(OPTION=VALUE, ...\)") as raised:
        parse_call(text, "method")
    assert raised.value.value == text
