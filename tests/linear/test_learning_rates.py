"""structured_lr: its multipliers by hand, and what a step of Adam does to the output of a layer at every width."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_tx.attention import Skyformer
from efficient_tx.linear import LINEAR, Dense, LowRank, Monarch, structured_learning_rates
from efficient_tx.linear.learning_rates import multipliers
from efficient_tx.training.optimizer import SIGN_LIKE, make_optimizer

WIDTHS = (64, 1024)  # × 1 and × 16


class Model(nnx.Module):
    """A layer of every sort, one of them at two paths."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, 128, rngs=rngs)
        self.layers = nnx.List([Monarch(128, 64, blocks=4, rngs=rngs), LowRank(64, 256, rank=8, rngs=rngs)])
        self.again = self.layers[0]
        self.norm = nnx.LayerNorm(256, rngs=rngs)
        self.mixer = Skyformer(32, heads=2, linear=Dense, rngs=rngs)
        self.head = nnx.Linear(256, 3, use_bias=False, rngs=rngs)


def test_multipliers_are_the_rule_by_hand():
    model = Model(nnx.Rngs(0))
    made = multipliers(model)
    assert jax.tree.structure(made) == jax.tree.structure(nnx.split(model)[1])
    found = {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(made)}
    special = {
        "again.w1": 64 / (32 * 2),  # 128 inputs in 4 blocks
        "again.w2": 64 / (16 * 2),
        "layers.1.down": 64 / (64 * 2),
        "layers.1.up": 64 / (8 * 2),
        "head.kernel": 64 / 256,
    } | {f"mixer.{name}.kernel": 64 / 32 for name in ("q", "k", "v", "out")}
    assert {name: value for name, value in found.items() if value != 1} == {k: v for k, v in special.items() if v != 1}
    assert jax.tree.leaves(multipliers(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))) == jax.tree.leaves(made)


def output_changes(name, width):
    """Mean absolute change of the output by a step of Adam, over 8 draws of the layer: with structured_lr and without.

    Not the root mean square: a rounded weight moves rarely and by a whole level, which at small widths is mostly noise.
    Inputs and gradients have a mean, as behind an activation: what adds up over the fan-in is what all entries share.
    """
    x, g = (1 + jax.random.normal(key, (16, width)) for key in jax.random.split(jax.random.key(1)))

    def changes(key):
        layer = LINEAR[name](width, width, rngs=nnx.Rngs(key))
        graphdef, params = nnx.split(layer)

        def output(params):
            return nnx.merge(graphdef, params)(x)

        grads, found = jax.grad(lambda params: (output(params) * g).sum())(params), []
        for options in ({"structured_lr": True, "scaling": structured_learning_rates(layer)}, {}):
            optimizer, _ = make_optimizer(steps=1, name="adam", schedule="constant", warmup=0, clip=0, **options)
            updates, _ = optimizer.update(grads, optimizer.init(params), params)
            change = output(optax.apply_updates(params, updates)) - output(params)
            found.append(jnp.mean(jnp.abs(change)))
        return jnp.stack(found)

    keys = jax.random.split(jax.random.key(0), 8)
    return jax.jit(lambda keys: jax.lax.map(changes, keys).mean(0))(keys)


@pytest.mark.slow
@pytest.mark.parametrize("name", LINEAR)
def test_one_step_of_adam_moves_the_output_alike_at_every_width(name):
    scaled, plain = np.array([output_changes(name, width) for width in WIDTHS]).T
    # What is left are corrections of order 1/√fan_in (8 inputs in the smallest factors of 64) and the draws: those
    # of Kronecker's factors of 64 numbers differ by 30 %, over 8 of them by 10 %.
    assert scaled.max() < 1.5 * scaled.min()
    # Fan-ins grow by 16, or by 4 where two factors have √width each.
    assert plain[-1] > 3 * plain[0]


@pytest.mark.parametrize("name", SIGN_LIKE)
@pytest.mark.slow
def test_updates_are_multiplied_and_the_state_is_the_same_without_a_model(name):
    model = nnx.jit(lambda: Model(nnx.Rngs(0)))()
    params = nnx.split(model)[1]
    options = {"steps": 9, "name": name, "schedule": "constant", "warmup": 0}
    plain, _ = make_optimizer(**options)
    scaled, _ = make_optimizer(structured_lr=True, scaling=structured_learning_rates(model), **options)
    unknown, _ = make_optimizer(structured_lr=True, **options)
    structures = [jax.tree.structure(jax.eval_shape(optimizer.init, params)) for optimizer in (scaled, unknown)]
    assert structures[0] == structures[1]
    grads = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def updates(params, grads):
        return [optimizer.update(grads, optimizer.init(params), params)[0] for optimizer in (plain, scaled)]

    before, after = updates(params, grads)
    jax.tree.map(
        lambda a, b, factor: np.testing.assert_allclose(b, a * factor, rtol=1e-6), before, after, multipliers(model)
    )


@pytest.mark.quick
@pytest.mark.parametrize("name", ["sgd", "muon", "schedule_free_adamw", "prodigy"])
def test_optimizers_without_a_rule_are_refused(name):
    with pytest.raises(ValueError, match=f"structured_lr is True: there is no rule for {name}: .* adam, adamw"):
        make_optimizer(steps=1, name=name, structured_lr=True)
