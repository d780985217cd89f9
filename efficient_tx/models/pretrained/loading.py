"""Loading: gives a ViT the tensors of a published checkpoint, and says what was and was not given."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.models.pretrained.description import Description, describe
from efficient_tx.models.pretrained.families import FAMILIES, Family, identify, rename, split
from efficient_tx.models.pretrained.positions import fit_positions
from efficient_tx.models.pretrained.tensors import Tensors, read
from efficient_tx.models.vit import ViT

# Tokens other than the patches and one class token; our ViT does not have them.
MORE_TOKENS = re.compile(r"dist_token|head_dist|distillation|reg_token|register_tokens|detection_tokens")
# What only pretraining computes with: the tokens and logits of the images do not depend on it.
PRETRAINING = re.compile(r"(.*\.)?(mask_token|(decoder|lm_head)\..*)")
# Norms and attention between the last tokens and the head; our ViT does not have them, and its tokens do not need them.
POOLING = re.compile(r"(?:^|[./])(fc_norm|attn_pool|MAPHead_0)[./]")
# What every block of every family has.
BLOCK = re.compile(
    r"encoder\.blocks\.(\d+)\.((mixer_norm|mlp_norm)\.scale|mixer\.(q|k|v|out)\.kernel|mlp\.(up|gate|down)\.kernel)"
)


def load_pretrained(model: ViT, path: str | Path) -> list[str]:
    """Loads the tensors of a published checkpoint into a ViT with dense linear layers.

    Weights are float64, float32, float16 or bfloat16 and become float32. Position embeddings of another grid are
    resized bilinearly with the corners kept, as in big_vision.

    What may stay as initialised, with a line: a head with another number of classes, biases, class token, positions,
    the last norm, the tanh layer, LayerScale and parameters of mixers that attention has none of. Weights of every
    block must be there.

    Torch files do not contain the number of heads, the activation and the grid of positions. A config.json of
    transformers beside the file says them, one of timm the grid; if there is none, `model` must have the right ones.

    Args:
      model: the model to change; on errors it is unchanged.
      path: a file with the extension .npz or .safetensors. One of several shards stands for all of them, if the
        .safetensors.index.json that names them is beside it; so does that index.

    Returns:
      Lines of a report: the family; options of `model` that differ; one line for each parameter that is missing in the
      file (it stays as initialised) and for each tensor that has no place in the model.

    Raises:
      ValueError: one line: the file is missing, unreadable or no ViT; it is one shard without the others; a weight is
        not of one of these dtypes or not finite; a weight of a block is missing; it has parts that our ViT does not
        have (DeiT's distillation, registers, another activation); the number of heads or blocks or any other shape
        differs.
    """
    path = Path(path)
    tensors = read(path)
    name, prefix = identify(tensors, path)
    family, said = FAMILIES[name], describe(path)
    check_tokens(tensors, path)
    single = list(split(tensors, path))
    found, unknown = rename(single, family, prefix, path)
    check_parts(unknown, prefix, path)
    wanted = {".".join(map(str, place)): x for place, x in nnx.iter_graph(model) if isinstance(x, nnx.Param)}
    check_blocks(found, wanted, path)
    check_heads(model, single, said, path)
    check_output(model, found, unknown, family, said, path)
    patch = [tensors[prefix + family.embedding].shape[axis] for axis in family.patch]
    lines = [f"parameters of {path}, a checkpoint of {name}", *differences(model, family, name, found, said)]
    lines += fit_positions(
        model,
        found,
        before=family.before if "cls" in found else (0,),
        said=said.image and (said.image[0] // patch[0], said.image[1] // patch[1]),
    )
    if "head.kernel" in found and found["head.kernel"].shape[-1] != model.head.out_features:
        classes = found["head.kernel"].shape[-1]
        lines.append(
            f"  its head has {classes} classes: the one here, of {model.head.out_features}, stays as initialised"
        )
        found = {key: x for key, x in found.items() if not key.startswith("head.")}
        wanted = {key: x for key, x in wanted.items() if not key.startswith("head.")}
    wrong = [key for key, x in found.items() if key in wanted and x.shape != wanted[key].shape]
    if wrong:
        key, rest = wrong[0], f"; {len(wrong) - 1} others differ too" if wrong[1:] else ""
        raise ValueError(f"{key} is {found[key].shape} in {path} and {wanted[key].shape} here{rest}")
    if tuple(patch) != (here := (model.patch_size, model.patch_size, model.image_shape[2])):
        raise ValueError(f"patches are {tuple(patch)} in {path} and {here} here")
    lines += [f"  {key} is not there: it stays as initialised" for key in wanted if key not in found]
    lines += [f"  {key} has no place here" for key in [*unknown, *(key for key in found if key not in wanted)]]
    for key, x in wanted.items():
        if key in found:
            x.set_value(jnp.asarray(found[key], x.dtype))
    return lines


def check_tokens(tensors: Collection[str], path: Path) -> None:
    """Raises ValueError if there are tokens other than the patches and one class token."""
    if extra := next(filter(MORE_TOKENS.search, tensors), None):
        raise ValueError(
            f"{path} has {extra}: a token more than the patches and one class token (distilled DeiT, registers), which "
            "this ViT does not have; take a checkpoint without"
        )


def check_parts(unknown: Collection[str], prefix: str, path: Path) -> None:
    """Raises ValueError if a tensor without our name may take part in computing the tokens."""
    for name in unknown:
        inside = name.removeprefix(prefix)
        beside = prefix.endswith("/") and inside == name  # the optimizer's state
        if not (beside or PRETRAINING.fullmatch(inside) or POOLING.match(inside)):
            raise ValueError(f"{path} has {name}: this ViT has no such part")


def check_blocks(found: Tensors, wanted: Mapping[str, nnx.Param], path: Path) -> None:
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


def check_heads(model: ViT, single: list[tuple[str, np.ndarray]], said: Description, path: Path) -> None:
    """Raises ValueError if the number of heads differs: linen's projections have an axis of heads, config.json says it.

    Mixers without heads are left out.
    """
    mixers = [block.mixer for block in model.encoder.blocks]
    for heads in dict.fromkeys(mixer.heads for mixer in mixers if hasattr(mixer, "heads")):
        for name, x in single:
            if name.endswith("/query/kernel") and x.ndim == 3 and x.shape[1] != heads:
                raise ValueError(f"{name} has {x.shape[1]} heads in {path} and {heads} here")
        if said.heads not in (None, heads):
            raise ValueError(f"num_attention_heads is {said.heads} in {said.path}, and here are {heads} heads")


def check_output(
    model: ViT, found: Tensors, unknown: Collection[str], family: Family, said: Description, path: Path
) -> None:
    """Raises ValueError if the layers after the encoder compute something else than those of the model."""
    tanh = "representation.kernel" in found
    if tanh and model.representation is not None and said.pooler_activation not in (None, "tanh"):
        raise ValueError(f"pooler_act is {said.pooler_activation!r} in {said.path}: the layer here has tanh")
    if "head.kernel" not in found or found["head.kernel"].shape[1] != model.head.out_features:
        return
    otherwise = "a head with another number of classes would stay as initialised"
    if pooling := next(filter(POOLING.search, unknown), None):
        raise ValueError(f"the head of {path} needs {pooling}, which this ViT does not have: {otherwise}")
    inputs, here = found["head.kernel"].shape[0], model.head.in_features
    if inputs == 2 * here:
        raise ValueError(
            f"the head of {path} reads {inputs} features, of the class token and the mean of the patches (Dinov2), and "
            f"here are {here}: {otherwise}"
        )
    if family.tanh and tanh and model.representation is None:
        size = found["representation.kernel"].shape[1]
        raise ValueError(
            f"the head of {path} is behind a tanh layer: the option representation={size} gives it a place"
        )
    if not (family.tanh and tanh) and model.representation is not None:
        raise ValueError(f"the head of {path} is behind no tanh layer: leave out the option representation")


def differences(model: ViT, family: Family, name: str, found: Tensors, said: Description) -> list[str]:
    """One line for each option of `model` that differs from that of the checkpoint's authors.

    Raises:
      ValueError: one line: no option computes the activation of the checkpoint.
    """
    block = model.encoder.blocks[0]
    here = {
        "mlp": "swiglu" if block.mlp.gate is not None else "gelu_erf" if block.mlp.exact else "gelu",
        "norm": "layer" if isinstance(model.encoder.norm, nnx.LayerNorm) else "rms",
        "norm_epsilon": model.encoder.norm.epsilon,
    }
    there = {
        "mlp": "swiglu" if "encoder.blocks.0.mlp.gate.kernel" in found else said.mlp or family.mlp,
        "norm": "layer",
        "norm_epsilon": said.norm_epsilon or (1e-6 if "encoder.blocks.0.mixer_scale" in found else family.norm_epsilon),
    }
    return [
        f"  {name} has {option}={there[option]}, here it is {value}: the option {option}={there[option]} computes the "
        "same as there"
        for option, value in here.items()
        if value != there[option]
    ]
