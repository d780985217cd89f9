"""Cut heads: what nobody reads goes without a change, whatever the mixer."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION, Custom, MultiHead
from efficient_tx.compression.cost import Costs
from efficient_tx.compression.cutting import Cutting, expand
from efficient_tx.compression.method import Setting
from efficient_tx.compression.model import bias_of, kernel_of, linear_layers, units
from efficient_tx.compression.statistics import Inputs
from efficient_tx.kernels.flash_attention import SCORES
from efficient_tx.linear import Dense
from efficient_tx.linear.replacement import find

LENGTH, FEATURES, HEADS = 24, 16, 4
GONE = [0, 2]
# A head that is numbered anew draws anew.
MIXERS = {name: kind for name, kind in ATTENTION.items() if issubclass(kind, MultiHead) and not kind.draws}
MIXERS |= {f"custom, {name}": partial(Custom, score=score()) for name, score in SCORES.items()}


class First(Cutting):
    """Cuts the first and the third head, and leaves the others' rows as they are."""

    def order(self, setting, found):
        return [(one.path, np.array(GONE)) for one in found]

    def correct(self, one, kept):
        layer = find(self.setting.model, one.reading)
        return kernel_of(layer)[expand(kept, one.size)], bias_of(layer)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_heads_that_nobody_reads_go_without_a_change(name):
    own = getattr(MIXERS[name], "func", MIXERS[name]).within(8)
    mixer = MIXERS[name](FEATURES, heads=HEADS, linear=Dense, max_len=LENGTH, rngs=nnx.Rngs(0), **own)
    model = nnx.Dict(mixer=mixer)
    layers = linear_layers(model)
    try:
        (one,) = units(model, layers)
    except ValueError:
        return  # they are refused, or there are none
    rows = expand(np.array(GONE), mixer.head_dim)
    mixer.out.kernel[...] = mixer.out.kernel[...].at[rows].set(0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, FEATURES)), jnp.float32)
    before = mixer(x)
    nothing = Inputs(1, np.zeros(FEATURES), np.eye(FEATURES))  # only errors are made of them
    method, costs = First(), Costs("parameters")
    before_cost = {layer.path: costs.of(layer.module) for layer in layers}
    method.prepare(Setting(model, layers, dict.fromkeys(before_cost, nothing), costs, before_cost))
    method.apply(method.plan(0.0))
    assert mixer.heads == HEADS - len(GONE)
    assert {find(model, path).out_features for path in one.making} == {mixer.heads * mixer.head_dim}
    np.testing.assert_allclose(mixer(x), before, atol=1e-5 * np.abs(before).max())  # sums in another order
