"""Decoding, over the table ATTENTION: prefill and steps are the rows of the causal forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION, MultiHead
from efficient_tx.models.transformer import Encoder
from tests.support.mixers import BUDGET, FEATURES, LONG, assert_same, make, program, right_padded, tokens

DECODING = [name for name, cls in ATTENTION.items() if cls.can_decode]
# Tokens of three examples in a first prefill, in a second one, and one by one: four budgets in all.
FIRST, SECOND, STEPS = (13, 7, 0), (5, 3, 5), 14


def pieces(seed=0):
    """Sequences `[3, LONG, features]` with their real tokens first, and the same tokens cut in the three parts."""
    lengths = np.add(FIRST, SECOND) + STEPS
    assert lengths.max() == 4 * BUDGET
    x = tokens(seed, 3, LONG, FEATURES)
    cut = [np.stack([x[b, start : start + size] for b, start in enumerate(starts)])
           for starts, size in (((0, 0, 0), max(FIRST)), (FIRST, max(SECOND)), (np.add(FIRST, SECOND), STEPS))]  # fmt: skip
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


def check(module, tolerance=1e-5):
    x, lengths, cut = pieces()
    params, run = decoded(module)
    graphdef, _ = nnx.split(module)
    whole = jax.jit(lambda params, x, mask: nnx.merge(graphdef, params)(x, mask=mask))
    expected = np.asarray(whole(params, x, right_padded(lengths, LONG)))
    parts = [np.asarray(part) for part in run(params, *cut)]
    for b, (first, second) in enumerate(zip(FIRST, SECOND)):
        rows = np.concatenate([parts[0][b, :first], parts[1][b, :second], parts[2][b]])
        assert_same(rows, expected[b, : lengths[b]], tolerance)
        assert (parts[0][b, first:] == 0).all() and (parts[1][b, second:] == 0).all()


@pytest.mark.parametrize("name", DECODING)
def test_prefill_and_steps_are_rows_of_the_causal_forward_pass(name):
    check(make(ATTENTION[name], causal=True))


@pytest.mark.parametrize("name", [name for name in DECODING if issubclass(ATTENTION[name], MultiHead)])
def test_so_they_are_with_convolutions_and_positions(name):
    turned = {"positions": "rope"} if ATTENTION[name].has_positions and name != "tensor" else {}
    check(make(ATTENTION[name], causal=True, conv=4, **turned))
