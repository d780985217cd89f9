"""Learning rates for which an Adam update changes a layer's output equally at every width and in every structure.

The entries of an Adam or Lion update have about the size of the learning rate, for any gradient. An output number sums
over `fan_in` such entries of aligned signs, so its change grows with the width unless the learning rate is proportional
to 1 / fan_in (Yang et al. 2022, arXiv 2203.03466). In a weight with several factors, each factor has its own fan-in,
and the factors share the change equally (Qiu et al. 2024, arXiv 2406.06248): the learning rate of a factor is that of a
dense layer times (d_in of the layer / d_in of the factor) / number of factors.

If entries are used many times (toeplitz), the rule is an upper bound of the change. Inputs with nonzero mean, as after
an activation, reach the bound; for zero-mean inputs the change falls as 1 / √width.
"""

import jax
import optax
from flax import nnx

from efficient_tx.linear.structured import Structured
from efficient_tx.linear.sum import Sum

# A dense layer of this fan-in has multiplier 1: it uses the optimizer's learning rate unchanged.
BASE = 64


def multipliers(model: nnx.Module) -> nnx.State:
    """The multiplier of every parameter's learning rate, in the structure of `nnx.split(model)[1]`.

    It is BASE / (fan_in · number of factors) for a factor of a structured weight, both parts of a sum being one weight,
    BASE / in_features for the kernel of a dense layer, and 1 for everything else: biases, norms, embeddings, parameters
    of attention other than projections.

    Args:
      model: any model; its values are not used, so it may be abstract.
    """
    graphdef, params = nnx.split(model)
    marked = nnx.merge(graphdef, jax.tree.map(lambda _: 1.0, params))
    # The parts of a sum come before the sum, which counts the factors of both.
    for _, layer in nnx.iter_modules(marked):
        arrays = multiplied(layer)
        for array, fan_in in arrays:
            array.set_value(BASE / (fan_in * len(arrays)))
    return nnx.split(marked)[1]


def multiplied(layer: nnx.Module) -> list[tuple[nnx.Param, float]]:
    """The arrays that a linear layer multiplies with, and the fan-in of each; none for another module."""
    match layer:
        case Sum():
            return [*multiplied(layer.first), *multiplied(layer.second)]
        case Structured():
            return [(getattr(layer, name), factor.fan_in) for name, factor in layer.factors().items()]
        case nnx.Linear():
            return [(layer.kernel, layer.in_features)]
    return []


def structured_learning_rates(model: nnx.Module) -> optax.GradientTransformation:
    """Multiplies updates by the `multipliers` of `model`; must be last in `optax.chain(optax.adamw(1e-3), ...)`.

    As it is last, it also scales decoupled weight decay, as the learning rate of a parameter group does in torch.
    """
    factors = multipliers(model)
    return optax.stateless(lambda updates, _: jax.tree.map(lambda update, factor: update * factor, updates, factors))
