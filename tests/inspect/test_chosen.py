"""Chosen tokens, beside what outputs depend on, weights, and plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.attention import ATTENTION
from efficient_tx.attention.low_rank.s3 import column_attention
from efficient_tx.inspect.captured import Call
from efficient_tx.inspect.rows import attention_rows, chosen_tokens

HEADS, LENGTHS, LENGTH = 2, (9, 20), 24
CHOOSING = [name for name, variant in ATTENTION.items() if variant.chosen]


def call_of(name, length=LENGTH, **options):
    """A call with tokens that are the same for any length beyond those that are real."""
    real = np.arange(length) < np.array(LENGTHS)[:, None]
    arrays = {"mask": jnp.asarray(real)}
    for number, projection in enumerate(ATTENTION[name].projections):
        x = np.random.default_rng(number).normal(size=(max(LENGTHS), len(LENGTHS), HEADS, 4)).swapaxes(0, 1)
        x = np.pad(x, ((0, 0), (0, length - max(LENGTHS)), (0, 0), (0, 0)), constant_values=7.0)
        arrays[projection] = jnp.asarray(x, jnp.float32)
    return Call("mixer", ATTENTION[name], arrays, {"key": None, "causal": False, **options})


def chosen(call, sequence=1):
    return chosen_tokens(call, sequence, np.arange(LENGTHS[sequence]))


def single(groups):
    """The positions of tokens that are landmarks themselves."""
    assert all(len(group) == 1 for group in groups)
    return {place for (place,) in groups}


def output(call, sequence=1, **changed):
    """The output of the real tokens of a sequence, `[tokens, heads, dim]`, with other arrays."""
    options = {name: value for name, value in call.options.items() if name != "causal"}
    arrays = {name: x[sequence : sequence + 1] for name, x in (call.arrays | changed).items()}
    return call.variant.function(**arrays, **options)[0, : LENGTHS[sequence]]


def weights(call, sequence=1):
    """`[queries, keys, heads]`: the derivative of an output by a value."""
    count = LENGTHS[sequence]

    def one(v):
        return output(call, sequence, v=call.arrays["v"].at[sequence].set(v))[..., 0]

    found = jax.jit(jax.jacrev(one))(call.arrays["v"][sequence])[..., 0]
    return np.stack([np.asarray(found)[:, head, :count, head] for head in range(HEADS)], -1)


@pytest.mark.parametrize("choice", ["uniform", pytest.param("leverage", marks=pytest.mark.slow)])
def test_landmarks_of_skyformer_are_the_tokens_on_which_other_outputs_depend(choice):
    """Of the queries all but the output's own; of the keys, where the only value that is not zero is another's."""
    call = call_of("skyformer", landmarks=8, choice=choice)
    found, count = chosen(call), LENGTHS[1]
    alone = call.arrays["v"].at[:, 1:].set(0)
    for name, given in (("q", call.arrays["v"]), ("k", alone)):

        def total(x, name=name, given=given):
            return output(call, v=given, **{name: call.arrays[name].at[1].set(x)}).sum(-1)

        by = np.asarray(jax.jit(jax.jacrev(total))(call.arrays[name][1]))  # [queries, heads, tokens, heads, dim]
        for head in range(HEADS):
            on = np.abs(by[:, head, :count, head]).max(-1)
            on[np.arange(count), np.arange(count)] = 0
            depends = {int(t) for t in np.flatnonzero(on.max(0) > 1e-6)} - ({0} if name == "k" else set())
            assert depends == single(found[name][head]) - ({0} if name == "k" else set())
    assert [len(found["q"][head]) + len(found["k"][head]) for head in range(HEADS)] == [8, 8]


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("nystromformer", {"landmarks": 6}, {"q": 6, "k": 6}),
        ("nystromformer", {"landmarks": 50}, {"q": 20, "k": 20}),
        ("skyformer", {"landmarks": 7, "choice": "segments"}, {"q": 3, "k": 4}),
        ("soft", {"landmarks": 6}, {"q": 6}),
    ],
)
def test_segments_are_those_of_their_formula(name, options, counts):
    found = chosen(call_of(name, **options))
    for projection, count in counts.items():
        number = np.arange(LENGTHS[1]) * count // LENGTHS[1]
        assert found[projection] == [[np.flatnonzero(number == i).tolist() for i in range(count)]] * HEADS
    assert found.keys() == counts.keys()


def test_cells_of_a_grid():
    call = call_of("soft", landmarks=4, grid=True)
    arrays = {name: x[:, :16] for name, x in call.arrays.items() if name != "mask"}
    corner = [0, 1, 4, 5]
    wanted = [[place + start for place in corner] for start in (0, 2, 8, 10)]
    assert chosen_tokens(call._replace(arrays=arrays), 1, np.arange(16))["q"] == [wanted] * HEADS


@pytest.mark.slow
def test_landmarks_of_several_tokens_share_them_out():
    """Sums of tokens drawn without replacement, and means of clusters, which have all tokens between them."""
    for options, size, count in (({"accumulate": 3}, 3, 12), ({"choice": "kmeans"}, None, 2 * LENGTHS[1])):
        found = chosen(call_of("skyformer", landmarks=4, **options))
        for head in range(HEADS):
            places = [(name, place) for name in "qk" for group in found[name][head] for place in group]
            assert len({*places}) == len(places) == count
            groups = len(found["q"][head]) + len(found["k"][head])
            assert size is None or groups <= 2 * 4


@pytest.mark.slow
def test_drawn_tokens_of_skeinformer():
    """The row of a pilot is exact; in the others, keys that are not drawn have one weight."""
    call = call_of("skeinformer", columns=5, pilots=4)
    found, ours = chosen(call), weights(call)
    exact = weights(call_of("softmax"))
    for head in range(HEADS):
        pilots, drawn = single(found["q"][head]), single(found["k"][head])
        assert (len(pilots), len(drawn)) == (4, 5)
        off = np.abs(ours[..., head] - exact[..., head]).max(1)
        assert {int(i) for i in np.flatnonzero(off < 1e-6)} == pilots
        (row, *_) = {*range(LENGTHS[1])} - pilots
        values, counts = np.unique(ours[row, :, head].round(7), return_counts=True)
        rest = np.abs(ours[row, :, head] - values[counts.argmax()]) < 1e-6
        assert {int(j) for j in np.flatnonzero(~rest)} == drawn


@pytest.mark.slow
def test_the_sample_of_hyper_is_read_by_all_queries():
    """The keys of a block are read by the queries of that block alone."""
    call = call_of("hyper", block=5, samples=4, bits=3)
    found, read = chosen(call), weights(call) != 0
    for head in range(HEADS):
        assert single(found["k"][head]) == {int(j) for j in np.flatnonzero(read[..., head].all(0))}
        assert len(found["k"][head]) == 4
    assert chosen(call_of("hyper", block=64)) == {}  # exact: nothing is chosen


@pytest.mark.slow
def test_columns_of_s3_are_what_column_attention_reads():
    call = call_of("s3", columns=6)
    q, k, v = (call.arrays[name] for name in "qkv")
    read = jax.grad(lambda v: column_attention(q, k, v, call.arrays["mask"], 6).sum())(v)
    for head, groups in enumerate(chosen(call)["k"]):
        assert single(groups) == {int(j) for j in np.flatnonzero(np.abs(read[1, :, head]).max(-1) > 0)}
        assert len(groups) == 6


@pytest.mark.first(1)
@pytest.mark.parametrize("name", CHOOSING)
def test_what_is_chosen_are_real_tokens_whatever_the_padding(name):
    options, count = ATTENTION[name].within(8), LENGTHS[0]
    found = chosen(call_of(name, **options), 0)
    assert found and found == chosen(call_of(name, length=LENGTH + 8, **options), 0)
    for heads in found.values():
        places = [place for head in heads for group in head for place in group]
        assert places and max(places) < count


def test_who_chooses_for_each_query_chooses_nothing_for_all():
    assert chosen(call_of("lev", causal=True, budget=6)) == {}
    assert chosen(call_of("hyper", causal=True, block=5)) == {}
    assert attention_rows(call_of("softmax"))["chosen"] == attention_rows(call_of("local", window=4))["chosen"] == {}
