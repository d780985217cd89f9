"""Weights: those of any NNX model as a safetensors file, and back.

The name of an array is its path in the model, with dots: attributes by their name, the elements of an `nnx.List` by
their number. "encoder.blocks.0.mlp.up.kernel" is `model.encoder.blocks[0].mlp.up.kernel`. A weight that stands in
several places has the name of the first. A layer of another structure has its factors there ("...up.w1"), a kernel is
`[in, out]`, and complex parameters are pairs of real arrays.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.checks import OptionError
from efficient_tx.files import write
from efficient_tx.models.pretrained.parameters import parameters
from efficient_tx.models.pretrained.tensors import Tensors, read

SUFFIX = ".safetensors"
DTYPES = ("float32", "bfloat16")
# How many differences a line names.
NAMED = 3


def save_weights(
    model: nnx.Module, path: str | Path, *, dtype: str | None = None, about: Mapping[str, Any] | None = None
) -> None:
    """Writes the parameters of a model; the file is whole or as it was, and is read back.

    Args:
      model: of any kind; the state of random streams is left out.
      path: ends in .safetensors; a file of that name is replaced.
      dtype: of the real parameters in the file, "float32" or "bfloat16"; None keeps theirs.
      about: JSON values by name, in the file's metadata.

    Raises:
      ValueError: one line: another ending or dtype, or a parameter is not finite in that dtype; nothing is written.
      OSError: the file cannot be written, or what is read back differs.
    """
    from safetensors.numpy import save

    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"{path} does not end in {SUFFIX}")
    if dtype not in (None, *DTYPES):
        raise OptionError("dtype", dtype, f"choose one of {', '.join(DTYPES)}")
    arrays = {name: stored(name, variable, dtype) for name, variable in parameters(model).items()}
    metadata = {name: json.dumps(value) for name, value in (about or {}).items()}
    content = save(arrays, metadata or None)
    write(path, content)
    if path.read_bytes() != content:
        raise OSError(f"{path} comes back with other bytes than were written")


def stored(name: str, variable: nnx.Variable, dtype: str | None) -> np.ndarray:
    """The array of a variable as the file has it; safetensors writes the memory as it lies."""
    array = np.asarray(variable[...])
    if jnp.issubdtype(array.dtype, jnp.floating):
        with np.errstate(over="ignore"):
            array = array.astype(dtype or array.dtype)
        if not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite in {array.dtype}")
    return np.ascontiguousarray(array).reshape(array.shape)


def load_weights(model: nnx.Module, path: str | Path) -> None:
    """Gives a model the parameters of a file that `save_weights` wrote; each becomes of the model's dtype.

    Args:
      model: of the same structure; on errors it is unchanged. It may be abstract (`nnx.eval_shape`).
      path: the file; shards with an index beside them do too, as `load_pretrained` takes them.

    Raises:
      ValueError: one line: the file is missing or unreadable, or has no such parameter, another one, one of another
        shape or kind of number, or one that is not finite.
    """
    path = Path(path)
    found, wanted = read(path), parameters(model)
    if wrong := differences(found, wanted):
        more = f"; and {len(wrong) - NAMED} more" if wrong[NAMED:] else ""
        raise ValueError(f"{path} does not fit: {'; '.join(wrong[:NAMED])}{more}")
    for name, variable in wanted.items():
        variable.set_value(jnp.asarray(found[name], variable.dtype))


def differences(found: Tensors, wanted: Mapping[str, nnx.Variable]) -> list[str]:
    """In words, what of a file cannot be given to a model."""
    wrong = [f"it has no {name}" for name in wanted if name not in found]
    for name, array in found.items():
        if name not in wanted:
            wrong.append(f"it has {name}, for which there is no place here")
            continue
        here = wanted[name]
        real = [jnp.issubdtype(x.dtype, jnp.floating) for x in (array, here)]
        if array.shape != here.shape or real[0] != real[1] or not (real[0] or array.dtype == here.dtype):
            wrong.append(f"{name} is {array.dtype}{list(array.shape)} in it and {here.dtype}{list(here.shape)} here")
        elif real[0] and not np.isfinite(array.astype(np.float32)).all():
            wrong.append(f"{name} has numbers that are not finite")
    return wrong
