"""Learning rates at which an update of Adam moves the output of a layer alike at every width and in every structure.

An update of Adam or Lion has entries of size 1 times the learning rate, whatever the gradient. An output number sums
over `fan_in` of them, all pulling one way, so its change grows with the width unless the learning rate falls as
1 / fan_in (Yang et al. 2022, arXiv 2203.03466). In a weight of several factors each has a fan-in of its own, and the
factors share the change evenly (Qiu et al. 2024, arXiv 2406.06248): a factor's learning rate is
(d_in of the layer / d_in of the factor) / number of factors times that of a dense layer.

Where entries are used many times (toeplitz) the rule bounds the change: it is reached where the inputs have a mean, as
behind an activation, and falls as 1 / √width where they have none.
"""

import jax
import optax
from flax import nnx

from efficient_tx.linear.structured import Structured

# The width at which the optimizer's learning rate means what it says: a dense layer of this fan-in has multiplier 1.
BASE = 64


def multipliers(model: nnx.Module) -> nnx.State:
    """What the learning rate of every parameter is multiplied by, in the structure of `nnx.split(model)[1]`.

    BASE / (fan_in · number of factors) for a factor of a structured weight, BASE / in_features for the kernel of a
    dense layer, 1 for everything else: biases, norms, embeddings, what attention has beside its projections.

    Args:
      model: any; its values are not looked at, so it may be abstract.
    """
    graphdef, params = nnx.split(model)
    marked = nnx.merge(graphdef, jax.tree.map(lambda _: 1.0, params))
    for _, layer in nnx.iter_modules(marked):
        if isinstance(layer, Structured):
            factors = layer.factors()
            for name, factor in factors.items():
                getattr(layer, name).set_value(BASE / (factor.fan_in * len(factors)))
        elif isinstance(layer, nnx.Linear):
            layer.kernel.set_value(BASE / layer.in_features)
    return nnx.split(marked)[1]


def structured_learning_rates(model: nnx.Module) -> optax.GradientTransformation:
    """Multiplies updates by the `multipliers` of `model`: `optax.chain(optax.adamw(1e-3), ...)` puts it last.

    So it scales decoupled weight decay too, as the learning rate of a parameter group does in torch.
    """
    factors = multipliers(model)
    return optax.stateless(lambda updates, _: jax.tree.map(lambda update, factor: update * factor, updates, factors))
