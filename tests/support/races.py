"""The interpreter of TPU kernels with two cores, and the races it saw, which only a private module of jax tells."""

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


def two_cores() -> pltpu.InterpretParams:
    """What to pass as `interpret`: two cores share the axes of the grid that are parallel."""
    return pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


def races_found() -> bool:
    """Whether a kernel that ran since the last call of one had a race; asked after its results are there."""
    return interpret_pallas_call.races.races_found
