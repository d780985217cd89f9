"""Parameters: those of a model by name, and what they are given of a checkpoint's tensors."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from efficient_tx.linear.replacement import dotted
from efficient_tx.models.pretrained.description import Description
from efficient_tx.models.pretrained.tensors import Tensors

Parameters = dict[str, nnx.Variable]
# What every block of every family has.
BLOCK = re.compile(
    r"encoder\.blocks\.(\d+)\.((mixer_norm|mlp_norm)\.scale|mixer\.(q|k|v|out)\.kernel|mlp\.(up|gate|down)\.kernel)"
)


def parameters(model: nnx.Module) -> Parameters:
    """The parameters of a model by their paths, "encoder.blocks.0.mlp.up.kernel"; random streams are none."""
    return {
        dotted(place): x
        for place, x in nnx.iter_graph(model)
        if isinstance(x, nnx.Variable) and not isinstance(x, nnx.RngState)
    }


def check_blocks(found: Tensors, wanted: Parameters, path: Path) -> None:
    """Raises ValueError unless the file has as many blocks as the model, and all of each."""
    there, here = (
        {int(match[1]) for key in keys if (match := re.match(r"encoder\.blocks\.(\d+)\.", key))}
        for keys in (found, wanted)
    )
    if len(there) != len(here):
        raise ValueError(f"{path} has weights of {len(there)} blocks, and here are {len(here)}")
    if missing := [key for key in wanted if BLOCK.fullmatch(key) and key not in found]:
        rest = f", and {len(missing) - 1} others" if missing[1:] else ""
        raise ValueError(f"{missing[0]} is not in {path}{rest}: a part of the checkpoint is missing")
    for ending, option in [("_scale", "layer_scale=1.0"), (".mlp.gate.kernel", "mlp=swiglu")]:
        if homeless := next((key for key in found if key.endswith(ending) and key not in wanted), None):
            raise ValueError(f"{path} gives {homeless}, which has no place here: the option {option} gives it one")


def mlp_of(model: nnx.Module) -> str:
    """The kind of a model's MLPs, as the option `mlp` names it."""
    mlp = model.encoder.blocks[0].mlp
    return "swiglu" if mlp.gate is not None else "gelu_erf" if mlp.exact else "gelu"


def heads_of(model: nnx.Module) -> list[int]:
    """The numbers of heads of a model's mixers, each once; mixers without heads are left out."""
    return list(dict.fromkeys(block.mixer.heads for block in model.encoder.blocks if hasattr(block.mixer, "heads")))


def check_heads(model: nnx.Module, said: Description) -> None:
    """Raises ValueError if the number of heads is another one than config.json says."""
    for heads in heads_of(model):
        if said.heads not in (None, heads):
            raise ValueError(f"num_attention_heads is {said.heads} in {said.path}, and here are {heads} heads")


def check_shapes(found: Tensors, wanted: Parameters, path: Path) -> None:
    """Raises ValueError if a tensor has another shape than the parameter of its name."""
    wrong = [key for key, x in found.items() if key in wanted and x.shape != wanted[key].shape]
    if wrong:
        key, rest = wrong[0], f"; {len(wrong) - 1} others differ too" if wrong[1:] else ""
        raise ValueError(f"{key} is {found[key].shape} in {path} and {wanted[key].shape} here{rest}")


def differences(name: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """One line for each option that differs from that of the authors of a checkpoint of the family `name`."""
    return [
        f"  {name} has {option}={there[option]}, here it is {value}: the option {option}={there[option]} computes the "
        "same as there"
        for option, value in here.items()
        if value != there[option]
    ]


def assign(found: Tensors, wanted: Parameters, unknown: Collection[str]) -> list[str]:
    """Gives the parameters their tensors; a line for each that has none, and for each tensor without a parameter."""
    for key in wanted.keys() & found.keys():
        wanted[key].set_value(jnp.asarray(found[key], wanted[key].dtype))
    homeless = [*unknown, *(key for key in found if key not in wanted)]
    return [
        *(f"  {key} is not there: it stays as initialised" for key in wanted if key not in found),
        *(f"  {key} has no place here" for key in homeless),
    ]
