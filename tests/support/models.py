"""Models in tests: one compiled program for all weights, masks and keys of a model."""

from functools import partial

import jax
import numpy as np
from flax import nnx


@partial(jax.jit, static_argnums=0)
def forward(graphdef, params, *inputs, **others):
    """The output of the model `nnx.merge(graphdef, params)`."""
    return nnx.merge(graphdef, params)(*inputs, **others)


def run(model, *inputs, **others):
    return np.asarray(forward(*nnx.split(model), *inputs, **others))
