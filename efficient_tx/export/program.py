"""Program: what a model computes at evaluation, as a `jax.export.Exported` for several platforms at once.

The model is that of one example, mapped over a batch whose size stays open. So kernels see one example, whose sizes are
numbers, and outputs do not depend on the other examples, as every mixer promises.

It has no kernels of accelerators (`kernels.platform.portable`). jax promises that a program can be read for six months
after the version that wrote it, but makes no such promise for Triton's code, which its Pallas kernels on GPUs become.
What is left are XLA's operations, and the solvers of LAPACK, cuSOLVER and TPUs whose names jax keeps.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax import export

from efficient_tx.kernels.platform import PLATFORMS, portable
from efficient_tx.linear.replacement import dotted
from efficient_tx.models.pretrained.parameters import parameters


def program(
    model: nnx.Module,
    batch: Mapping[str, Any],
    *,
    precision: str | None = "highest",
) -> export.Exported:
    """The function (weights by name, batch by name) -> outputs, exported.

    Args:
      model: trained; its weights are arguments of the function, so only their shapes count.
      batch: arrays `[batch, ...]` that the model takes by name; the batch size in them does not count.
      precision: of float32 products, as `jax.default_matmul_precision`. With "highest" all platforms compute the same
        up to rounding; None is each platform's own: bfloat16 on TPUs, TF32 on GPUs.

    Raises:
      ValueError: one line: it has code that jax cannot keep, as a kernel of one's own.
    """
    (size,) = export.symbolic_shape("batch")
    weights = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in parameters(model).items()}
    inputs = {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in batch.items()}

    graphdef, state = nnx.split(model)
    variables = nnx.to_flat_state(state)

    def evaluate(weights, batch):
        given = [(path, variable.copy(weights[dotted(path)])) for path, variable in variables]
        made = nnx.merge(graphdef, nnx.from_flat_state(given))
        return jax.vmap(lambda example: made(**{name: x[None] for name, x in example.items()}, key=None)[0])(batch)

    try:
        with portable(), jax.default_matmul_precision(precision):
            return export.export(jax.jit(evaluate), platforms=PLATFORMS)(weights, inputs)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"the model cannot be exported: {' '.join(str(error).split())[:300]}") from None
