"""What BigBird draws: blocks that a query does not see anyway, all sets alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.attention.block_sparse.bigbird import bigbird_blocks, distinct
from efficient_tx.attention.block_sparse.patterns import Window


def near(i, j, window, causal):
    return i - j < window if causal else abs(i - j) <= window // 2


@pytest.mark.quick
def test_bigbird_draws_other_real_blocks_than_those_it_sees_anyway():
    """Every query block gets different blocks, outside its window and the global ones, as many as there are."""
    first, random, blocks, heads, key = 1, 3, 12, 2, jax.random.key(1)
    draw = jax.jit(bigbird_blocks, static_argnums=range(2, 8))
    longer = draw(key, 7, Window.of(3, False), heads, blocks + 5, False, first, random)[:, :blocks, -random:]
    for real, causal in np.ndindex(blocks + 1, 2):
        drawn = np.asarray(draw(key, real, Window.of(3, causal), heads, blocks, causal, first, random))[..., -random:]
        assert real != 7 or causal or (drawn == longer).all()
        for h, own in np.ndindex(heads, real):
            chosen = [block for block in drawn[h, own] if block >= 0]
            free = [b for b in range(first, own if causal else real) if not near(own, b, 3, causal)]
            assert len(set(chosen)) == len(chosen) == min(random, len(free))
            assert set(chosen) <= set(free)


def test_every_set_is_drawn_as_often_as_any_other():
    """Pairs out of five in 20000 draws: 10 sets, each 2000 times with a standard deviation of 42."""
    uniform = jax.random.uniform(jax.random.key(0), (20000, 2))
    drawn = np.sort(np.asarray(distinct(uniform, jnp.full(20000, 5))), axis=1)
    sets, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(sets) == 10
    assert np.abs(counts - 2000).max() < 4 * 42
