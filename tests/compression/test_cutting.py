"""Cuts: in which order units go; and heads that nobody reads go without a change, whatever the mixer."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION, Custom, MultiHead
from efficient_tx.compression.cost import Costs
from efficient_tx.compression.cutting import Cutting, expand
from efficient_tx.compression.method import Setting
from efficient_tx.compression.model import bias_of, kernel_of, linear_layers, select, units
from efficient_tx.compression.statistics import Inputs, gather
from efficient_tx.config.methods import named_method
from efficient_tx.kernels.flash_attention import SCORES
from efficient_tx.linear import Dense
from efficient_tx.linear.replacement import find
from tests.support.small import SIZES, batches, layer_inputs, model

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
    whole = nnx.Dict(mixer=mixer)
    layers = linear_layers(whole)
    try:
        (one,) = units(whole, layers)
    except ValueError:
        return  # they are refused, or there are none
    rows = expand(np.array(GONE), mixer.head_dim)
    mixer.out.kernel[...] = mixer.out.kernel[...].at[rows].set(0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, FEATURES)), jnp.float32)
    before = mixer(x)
    nothing = Inputs(1, np.zeros(FEATURES), np.eye(FEATURES))  # only errors are made of them
    method, costs = First(), Costs("parameters")
    before_cost = {layer.path: costs.of(layer.module) for layer in layers}
    method.prepare(Setting(whole, layers, dict.fromkeys(before_cost, nothing), costs, before_cost))
    method.apply(method.plan(0.0))
    assert mixer.heads == HEADS - len(GONE)
    assert {find(whole, path).out_features for path in one.making} == {mixer.heads * mixer.head_dim}
    np.testing.assert_allclose(mixer(x), before, atol=1e-5 * np.abs(before).max())  # sums in another order


def test_stat_takes_the_step_that_adds_least_for_the_multiplications_it_saves():
    """Of the next steps of all MLPs and mixers; errors are those of least squares on the activations."""
    made = model()
    layers, method = select(made, "mlp|projections"), named_method("stat")
    inputs = gather(made, layers, batches(), triangles=method.triangles(made, layers))
    method.prepare(Setting(made, layers, inputs, Costs("bytes"), {}))
    steps = {path: [] for path in method.found}
    for path, one in method.found.items():
        z = np.concatenate([layer_inputs(made, batch, one.reading) for batch in batches()]).astype(np.float64)
        kept, each, before = np.arange(one.count), 2 * 16 if one.size == 1 else 4 * 16 * one.size, 0.0
        for owner, gone in method.removals:
            if owner == path:
                kept = np.setdiff1d(kept, gone)
                at = z[:, expand(kept, one.size)]
                left = np.sum((z - at @ np.linalg.lstsq(at, z, rcond=None)[0]) ** 2) / np.sum(z**2)
                steps[path].append((left - before) / (each * len(gone)))
                before = left
        assert len(kept) == 1
    for path, _ in method.removals:
        assert all(steps[path][0] <= others[0] * (1 + 1e-4) for others in steps.values() if others)  # of float32 inputs
        del steps[path][0]


def test_flap_removes_by_the_standardised_fluctuation_of_all_layers_together():
    """Squared before for heads; recomputed from the inputs. Blocks of other sizes would all go first without it."""
    made, ranked = model(), []
    made.encoder.blocks[1].mlp.down.kernel[...] *= 0.1
    for number in range(SIZES["layers"]):
        block = ("encoder", "blocks", number)
        for path, name, count in (((*block, "mixer"), "out", SIZES["heads"]), ((*block, "mlp"), "down", 48)):
            x = np.concatenate([layer_inputs(made, batch, (*path, name)) for batch in batches()]).astype(np.float64)
            scores = x.var(0) * np.sum(kernel_of(find(made, (*path, name))) ** 2, axis=1)
            scores = scores**2 if name == "out" else scores
            scores = ((scores - scores.mean()) / scores.std()).reshape(count, -1).mean(1)
            ranked += sorted((score, path, unit) for unit, score in enumerate(scores))[:-1]
    method = named_method("flap")
    layers = select(made, "mlp|projections")
    method.prepare(Setting(made, layers, gather(made, layers, batches()), Costs("bytes"), {}))
    assert [(path, *units) for path, units in method.removals] == [entry[1:] for entry in sorted(ranked)]
