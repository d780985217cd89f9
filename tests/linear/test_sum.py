"""Sums of two structures: the alternating fit, what is composed of the parts, and forms as objects and text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.linear import LINEAR, Dense, Form, LowRank, Monarch, Sparse, Sum, Ternary, densify, replace, transfer
from efficient_tx.linear.learning_rates import multipliers
from efficient_tx.linear.sum import TOLERANCE, alternate

quick = pytest.mark.quick


def relative(difference, whole):
    return float(np.linalg.norm(difference) / np.linalg.norm(whole))


PARTS = [
    (Form(LowRank, rank=2), Form(Sparse, density=0.1)),
    (Form(Monarch, blocks=4), Form(LowRank, rank=2)),
]


def planted(first, second):
    """Low rank and few entries, three times as large, or random layers: sums that the forms can hold."""
    if second.structure is Sparse:
        rng = np.random.default_rng(0)
        entries = 3 * np.asarray(second.from_dense(rng.normal(size=(32, 24))).to_dense())
        return rng.normal(size=(32, 2)) @ rng.normal(size=(2, 24)) + entries
    made = Sum(32, 24, first=first, second=second, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    return np.asarray(made.to_dense())


@pytest.mark.parametrize(("first", "second"), PARTS, ids=["low_rank+sparse", "monarch+low_rank"])
@pytest.mark.slow
def test_a_planted_sum_is_found_and_the_error_never_increases(first, second):
    with jax.enable_x64(True):
        weight = planted(first, second)
        kernel = jnp.asarray(weight)
        found = np.asarray(Sum.from_dense(kernel, first=first, second=second).to_dense())
        assert relative(found - weight, weight) < 0.01
        ends = []
        for forms in ((first, second), (second, first)):
            (a, b), errors = alternate(forms, kernel)
            errors = np.array(errors)
            gains = -np.diff(errors) / errors[:-1]
            assert (gains > 0).all() and (gains[:-1] >= TOLERANCE).all() and len(errors) <= 101
            # What the parameters are worth, multiplied out by hand, is the last of these errors.
            dense = [nnx.merge(empty(form), state).to_dense() for form, state in zip(forms, (a, b))]
            assert np.linalg.norm(kernel - dense[0] - dense[1]) == pytest.approx(errors[-1], abs=1e-9)
            alone = np.linalg.norm(kernel - forms[0].from_dense(kernel).to_dense())
            assert errors[0] == pytest.approx(alone, rel=1e-9)
            ends.append(errors[-1])
        assert np.linalg.norm(found - weight) == pytest.approx(min(ends), abs=1e-9)


def empty(form):
    return nnx.split(nnx.eval_shape(lambda: form(32, 24, use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))))[0]


def test_the_fit_ends_where_each_part_is_the_best_for_the_other():
    """Against NumPy: the tail of W − S beyond the rank, and the largest entries of W − D U; and each part alone."""
    kernel = np.random.default_rng(0).normal(size=(24, 20))
    with jax.enable_x64(True):
        first, second = Form(LowRank, rank=3), Form(Sparse, density=0.25)
        made = Sum.from_dense(jnp.asarray(kernel), first=first, second=second)
        low, sparse = np.asarray(made.first.to_dense()), np.asarray(made.second.to_dense())
    error = np.linalg.norm(kernel - low - sparse)
    sizes = np.sort(np.abs(kernel), axis=None)
    assert error < np.linalg.norm(np.linalg.svd(kernel, compute_uv=False)[3:])
    assert error < np.linalg.norm(sizes[: -made.second.kept])
    # An end is a round of less than 1/1000, so the half of a round that is made here lowers it by no more.
    tail = np.linalg.norm(np.linalg.svd(kernel - sparse, compute_uv=False)[3:])
    rest = np.linalg.norm(np.sort(np.abs(kernel - low), axis=None)[: -made.second.kept])
    assert tail == pytest.approx(error, rel=2e-3) and rest == pytest.approx(error, rel=2e-3)
    assert np.count_nonzero(sparse) == made.second.kept == 120 and np.linalg.matrix_rank(low) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LINEAR.keys() - {"sum"}))
def test_every_other_row_may_be_a_part(name):
    """Beside low rank: never worse than either alone, and its output is that of the two matrices."""
    kernel = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
    parts = {"first": Form(LINEAR[name]), "second": Form(LowRank, rank=2)}
    made = Sum.from_dense(jnp.asarray(kernel), jnp.arange(12.0), **parts)
    error = np.linalg.norm(kernel - made.to_dense())
    for form in parts.values():
        assert error <= np.linalg.norm(kernel - form.from_dense(jnp.asarray(kernel)).to_dense()) * (1 + 1e-5)
    x = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
    step = made.input_step * np.abs(x).max(-1, keepdims=True) / 2
    allowed = 1e-4 + step * np.abs(made.first.to_dense()).sum(0)
    assert (np.abs(made(x) - (x @ made.to_dense() + np.arange(12))) <= allowed).all()
    assert made.latent is LINEAR[name].latent and made.input_step == LINEAR[name].input_step


@quick
def test_counts_are_those_of_the_parts():
    made = nnx.eval_shape(lambda: Sum(64, 32, first=Form(Sparse, density=0.25), second=Form(Ternary), rngs=nnx.Rngs(0)))
    assert made.parameters == 512 + 64 * 32 + 32
    assert made.multiplies == 512 + 65 * 33
    assert made.bytes_stored == 4 * (2 * 64 * 32 + 32)
    assert made.latent and made.input_step == 1 / 127
    plain = nnx.eval_shape(lambda: Sum(64, 64, use_bias=False, rngs=nnx.Rngs(0)))
    assert plain.parameters == plain.multiplies == 64 * 64 // 2  # the defaults: half of a dense layer
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(plain))}
    assert names == {"first.w1", "first.w2", "second.down", "second.up"}
    assert not plain.latent and plain.input_step == 0


def test_bfloat16_parameters_are_fitted_in_float32():
    kernel = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
    parts = {"first": Form(Monarch, blocks=4), "second": Form(LowRank, rank=2)}
    made = Sum.from_dense(jnp.asarray(kernel, jnp.bfloat16), jnp.zeros(16, jnp.bfloat16), **parts)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(made))} == {jnp.dtype(jnp.bfloat16)}
    wide = Sum.from_dense(jnp.asarray(kernel, jnp.bfloat16), param_dtype=jnp.float32, **parts)
    # Each rounding of bfloat16 is up to 2⁻⁸ of a number: two factors, their product, the sum.
    assert relative(np.asarray(made.to_dense(), np.float32) - wide.to_dense(), kernel) < 4 * 2**-8
    assert made(jnp.ones((2, 24), jnp.bfloat16)).dtype == jnp.bfloat16


@quick
def test_learning_rates_count_the_factors_of_both_parts():
    """As one weight of three factors: 64 / (fan-in · 3)."""
    model = nnx.Dict(
        a=Sum(16, 8, first=Form(LowRank, rank=2), second=Form(Sparse, density=0.25), rngs=nnx.Rngs(0)),
        b=Sum(16, 8, first=Form(Dense), second=Form(LowRank, rank=2), rngs=nnx.Rngs(0)),
    )
    made = nnx.to_flat_state(multipliers(model))
    assert {".".join(map(str, path)): variable.get_value() for path, variable in made} == pytest.approx(
        {
            "a.bias": 1,
            "a.first.down": 64 / (16 * 3),
            "a.first.up": 64 / (2 * 3),
            "a.second.sparse": 64 / (4 * 3),
            "b.bias": 1,
            "b.first.kernel": 64 / (16 * 3),
            "b.second.down": 64 / (16 * 3),
            "b.second.up": 64 / (2 * 3),
        }
    )


def net(linear, **options):
    made = nnx.Dict(one=linear(8, 8, rngs=nnx.Rngs(0), **options), two=nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
    made.one.bias[...] = jnp.arange(8.0)
    return made


def test_a_sum_takes_and_leaves_the_place_of_other_layers_whole():
    sparse = {"first": Form(LowRank, rank=2), "second": Form(Sparse, density=0.25)}
    model = net(nnx.Linear)
    bias = model.one.bias
    found = replace(model, lambda path, layer: path == ("one",), Sum, **sparse)
    assert [one.path for one in found] == [("one",)] and type(model.one) is Sum and model.one.bias is bias
    weight = np.asarray(model.one.to_dense())
    # To other parts: one projection of the whole weight, none of a part. To equal ones: copied.
    other = net(Sum, first=Form(LowRank, rank=2), second=Form(Sparse, density=0.5))
    assert [one.path for one in transfer(model, other)] == [("one",)]
    expected = Sum.from_dense(jnp.asarray(weight), first=Form(LowRank, rank=2), second=Form(Sparse, density=0.5))
    np.testing.assert_allclose(other.one.to_dense(), expected.to_dense(), atol=1e-6)
    np.testing.assert_array_equal(other.one.bias[...], np.arange(8))
    same = net(Sum, **sparse)
    assert transfer(model, same) == []
    np.testing.assert_array_equal(same.one.to_dense(), weight)
    assert [one.path for one in densify(model)] == [("one",)] and type(model.one) is Dense
    np.testing.assert_allclose(model.one.kernel[...], weight, atol=1e-6)


@quick
def test_a_form_is_an_object_and_a_text():
    form = Form(LINEAR["low_rank_plus_sparse"], rank=3, pattern="top")
    assert str(form) == "low_rank_plus_sparse(pattern='top', rank=3)"
    assert form == Form(form.structure, pattern="top", rank=3) != Form(form.structure, rank=3)
    assert {form: 1}[Form(form.structure, pattern="top", rank=3)] == 1
    assert [str(Form(cls)) for cls in LINEAR.values()] == list(LINEAR)
    assert str(Form(type("Own", (Monarch,), {"__module__": "mine"}), blocks=2)) == "mine:Own(blocks=2)"
    assert type(form(8, 4, rngs=nnx.Rngs(0))) is form.structure
    assert Form(Sparse, density=1).options == (("density", 1),)  # a whole number is a number
    assert Form(Sparse, density=np.float32(0.5)).options == (("density", 0.5),)
    assert Form(Monarch, blocks=np.int64(2)).options == (("blocks", 2),)


@quick
@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Form(Monarch, block=2), "monarch has no option 'block': choose one of blocks, init (nearest: 'block"),
        (lambda: Form(Ternary, bits=2), "ternary has no option 'bits': it has none"),
        (lambda: Form(Monarch, dtype=None), "monarch has no option 'dtype': choose one of blocks, init"),
        (lambda: Form(Monarch, blocks="4"), "blocks is '4': it takes a value of type int"),
        (lambda: Form(Monarch, blocks=True), "blocks is True: it takes a value of type int"),
        (lambda: Form(LowRank, rank=1.5), "rank is 1.5: it takes a value of type int"),
        (lambda: sum_of(first=Form(Sum)), "first is sum: a part of a sum must not be a sum"),
        (
            lambda: sum_of(second=Form(Monarch, blocks=0)),
            "second is monarch(blocks=0): blocks is 0: it must be at least",
        ),
        (lambda: sum_of(first="monarch"), "first is 'monarch': it must be a Form, as Form(Monarch, blocks=4)"),
    ],
)
def test_mistakes_are_one_line(make, line):
    with pytest.raises(ValueError) as raised:
        make()
    assert str(raised.value).startswith(line) and "\n" not in str(raised.value)


def sum_of(**parts):
    return nnx.eval_shape(lambda: Sum(8, 8, rngs=nnx.Rngs(0), **parts))


@quick
def test_the_size_of_a_sum_is_that_of_its_second_part():
    option, values = Sum.sized_by(8, 6)
    stored = [sum_of(**{option: value}).bytes_stored for value in values]
    assert stored == sorted(set(stored)) and json.dumps(str(values[2])) == '"low_rank(rank=3)"'
