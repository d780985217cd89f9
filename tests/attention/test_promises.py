"""The promises of every token mixer, over the table ATTENTION: a new row is covered on arrival."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.attention import ATTENTION, MultiHead
from efficient_tx.kernels.flash_attention import prefix, window
from tests.support.mixers import (
    FEATURES,
    LENGTHS,
    LONG,
    SHORT,
    assert_same,
    check_padding,
    derivatives,
    firsts,
    longer,
    one_of_a_family,
    program,
    right_padded,
    scattered,
    tokens,
)

CAUSAL = [name for name in ATTENTION if ATTENTION[name].can_be_causal]


@one_of_a_family(list(ATTENTION))
def test_padding_and_other_examples_change_nothing(name):
    """And a mask may have any pattern."""
    check_padding(ATTENTION[name])


@one_of_a_family(list(ATTENTION))
def test_gradients_are_finite_even_for_nothing_but_padding(name):
    with jax.enable_x64(True):
        params, run = derivatives(ATTENTION[name])
        x, mask = tokens(0, 3, SHORT, FEATURES).astype(np.float64), right_padded(LENGTHS, SHORT)
        out, by_params, by_x = run(params, x, mask, np.ones_like(x))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(by_params))
        assert np.isfinite(by_x).all()
        assert (np.asarray(by_x)[~mask] == 0).all()
        assert np.abs(np.asarray(by_x)[mask]).max() > 1e-6
        hostile = run(params, np.where(mask[..., None], x, np.nan), mask, np.ones_like(x))
        for ours, theirs in zip(*map(jax.tree.leaves, (hostile, (out, by_params, by_x)))):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@one_of_a_family(CAUSAL)
def test_causal(name):
    """Zero Jacobian above the diagonal; the promises about padding; later tokens, however large, change nothing.

    Nor through a choice, an order, a stabiliser or a rounding, which no Jacobian sees.
    """
    with jax.enable_x64(True):
        params, run = derivatives(ATTENTION[name], causal=True)
        x, mask = tokens(0, 3, SHORT, FEATURES).astype(np.float64), right_padded(LENGTHS, SHORT)
        for i in (0, 7, SHORT - 1):
            w = np.zeros_like(x)
            w[:, i] = 1 + tokens(i, 3, FEATURES)
            out, _, by_x = run(params, x, mask, w)
            out, by_x = np.asarray(out), np.asarray(by_x)
            assert (by_x[:, i + 1 :] == 0).all()
            if not ATTENTION[name].windowed:
                assert np.abs(by_x[0, : i + 1]).max(axis=1).min() > 0

        for i in (4, 12):
            later = np.where(np.arange(SHORT)[:, None] > i, 1e3 * tokens(1, *x.shape), x)
            assert_same(run(params, later, mask, w)[0][:, : i + 1], out[:, : i + 1], 1e-9)

        forward = program(ATTENTION[name], causal=True)[1]
        further = np.asarray(forward(params, longer(x, 2), right_padded(LENGTHS, LONG), None))
        assert_same(further[:, :SHORT][mask], out[mask], 1e-9)


@one_of_a_family(list(ATTENTION))
def test_randomness_is_an_argument_of_the_example(name):
    """Keys decide; without a mask all tokens are real; nothing is drawn that the class does not tell of."""
    params, evaluate = program(ATTENTION[name])
    x, mask = tokens(0, 3, SHORT, FEATURES), np.ones((3, SHORT), bool)
    evaluated = np.asarray(evaluate(params, x, mask, None))
    np.testing.assert_array_equal(evaluate(params, x, mask, None), evaluated)

    _, train = program(ATTENTION[name], dropout=0.5)
    keys, others = (jax.random.split(jax.random.key(seed), 3) for seed in (1, 2))
    trained, redrawn = (np.asarray(train(params, x, None, keys)) for keys in (keys, others))
    assert (trained == 0).mean() == pytest.approx(0.5, abs=0.1)  # 1,152 entries: sd 0.015
    assert not np.array_equal(trained[0] == 0, trained[1] == 0)
    # Where neither dropped an entry both have twice what was to be dropped.
    kept = (trained != 0) & (redrawn != 0)
    drawn = not np.allclose(trained[kept], redrawn[kept], rtol=1e-3, atol=1e-5)
    assert drawn == ATTENTION[name].draws
    if not drawn:
        assert_same(trained[kept], 2 * evaluated[kept])

    # A key belongs to its example, whichever row that has; at evaluation all have the same.
    same = np.repeat(x[:1], 3, axis=0)
    assert_same(train(params, same, None, keys[::-1])[2], trained[0])
    evaluated = np.asarray(evaluate(params, same, mask, None))
    assert_same(evaluated[1], evaluated[0])


DRAWING = [name for name in ATTENTION if ATTENTION[name].draws]


@pytest.mark.parametrize("name", [*DRAWING, "vmean"])
@pytest.mark.first(1)
def test_draws_do_not_depend_on_the_padded_length(name):
    """What draws, and for the dropout, which is the same in all mixers, one that does not."""
    params, forward = program(ATTENTION[name], dropout=0.5)
    x, keys = tokens(0, 3, SHORT, FEATURES), jax.random.split(jax.random.key(1), 3)
    padded = right_padded((SHORT,) * 3, LONG)
    assert_same(np.asarray(forward(params, longer(x, None), padded, keys))[:, :SHORT], forward(params, x, None, keys))
    # And they belong to the real tokens by rank, wherever these stand.
    mask = right_padded(LENGTHS, SHORT)
    aside = np.asarray(forward(params, longer(x, 2), right_padded(LENGTHS, LONG), keys))
    among, places = scattered(x)
    ours, theirs = np.asarray(forward(params, among, places, keys))[places], aside[:, :SHORT][mask]
    kept = (ours != 0) & (theirs != 0)  # dropout goes by place
    assert_same(ours[kept], theirs[kept])


@pytest.mark.slow
def test_a_scalar_key_is_folded_per_row():
    params, forward = program(ATTENTION["vmean"], dropout=0.5)
    x, mask = tokens(0, 3, SHORT, FEATURES), np.ones((3, SHORT), bool)
    rows = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), np.arange(3))
    assert_same(forward(params, x, mask, jax.random.key(5)), forward(params, x, mask, rows))


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.first(1)
def test_bfloat16_stays_near_float32(name):
    x, mask = tokens(0, 3, SHORT, FEATURES), right_padded(LENGTHS, SHORT)
    params, forward = program(ATTENTION[name])
    full = np.asarray(forward(params, x, mask, None))
    half = program(ATTENTION[name], dtype=jnp.bfloat16)[1](params, x.astype(jnp.bfloat16), mask, None)
    assert half.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(half, np.float32) - full) / np.linalg.norm(full)
    assert error < 0.03  # 8 bits of mantissa, 0.4 % an operation, a handful of operations


# MultiHead turns them: one of each family, and those that project otherwise.
TURNED = [name for name, m in ATTENTION.items() if m.has_positions]
TURNED = [name for name in TURNED if name in firsts(TURNED) or ATTENTION[name].mix is not MultiHead.mix]


@pytest.mark.slow
@pytest.mark.parametrize("name", TURNED)
def test_rotary_positions_and_other_head_widths(name):
    """The same weights give another output when queries and keys turn; a head may be wider than features // heads."""
    params, plain = program(ATTENTION[name], head_dim=16)
    _, turned = program(ATTENTION[name], positions="rope", head_dim=16)
    x = tokens(0, 3, SHORT, FEATURES)
    outputs = [np.asarray(forward(params, x, None, None)) for forward in (plain, turned)]
    assert outputs[0].shape == x.shape
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


# Options that take other ways through the code than the defaults do.
# The convolution is MultiHead's: those that project otherwise, and one for each number of projections.
CONVOLVED = [name for name, m in ATTENTION.items() if issubclass(m, MultiHead) and m.mix is not MultiHead.mix]
CONVOLVED += ["softmax", "soft", "tensor", "vmean"]

MODES = [
    ("softmax", {"positions": "rope"}),
    ("softmax", {"positions": "rope2d", "max_len": 49}),
    ("sigmoid", {"qk_norm": True, "layer_scale": 0.1}),
    ("custom", {"score": "alibi", "mask": window(6) | prefix(2)}),
    ("custom", {"score": "gaussian", "mask": ~window(3), "causal": True}),
    ("skyformer", {"choice": "kmeans"}),
    ("skyformer", {"choice": "leverage", "inverse": "iteration"}),
    ("skyformer", {"accumulate": 2}),
    ("soft", {"grid": True, "landmarks": 64, "value_conv": 3}),
    ("soft", {"bottleneck": "convolution", "symmetric_norm": True, "inverse": "iteration"}),
    ("lev", {"attention": "polynomial"}),
    ("lev", {"attention": "polynomial", "causal": True}),
    ("lev", {"p": 3.0, "heads": 1}),
    ("longformer", {"global_projections": True}),
    ("sparse", {"pattern": "fixed"}),
    ("pool", {"grid": True, "kind": "max"}),
    ("softmax", {"positions": "rope", "conv": 3}),
    *((name, {"conv": 4, "causal": ATTENTION[name].can_be_causal}) for name in CONVOLVED),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), MODES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)))
def test_modes_keep_the_promises_about_padding(name, mode):
    check_padding(ATTENTION[name], **mode)
    if mode.get("causal"):
        params, forward = program(ATTENTION[name], **mode)
        x, mask = tokens(0, 3, SHORT, FEATURES), right_padded(LENGTHS, SHORT)
        later = np.where(np.arange(SHORT)[:, None] > 12, 1e3 * tokens(1, *x.shape), x)
        out = np.asarray(forward(params, x, mask, None))
        assert_same(np.asarray(forward(params, later, mask, None))[:, :13], out[:, :13])
