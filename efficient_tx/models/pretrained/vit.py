"""Vit: gives a ViT the tensors of a published checkpoint, and says what was and was not given."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from efficient_tx.models.pretrained.description import Description, describe
from efficient_tx.models.pretrained.families import FAMILIES, Family, identify, rename, split
from efficient_tx.models.pretrained.parameters import (
    assign,
    check_blocks,
    check_heads,
    check_shapes,
    differences,
    heads_of,
    mlp_of,
    parameters,
)
from efficient_tx.models.pretrained.positions import fit_positions
from efficient_tx.models.pretrained.tensors import Tensors, read
from efficient_tx.models.vit import ViT

# Tokens other than the patches and one class token; our ViT does not have them.
MORE_TOKENS = re.compile(r"dist_token|head_dist|distillation|reg_token|register_tokens|detection_tokens")
# What only pretraining computes with: the tokens and logits of the images do not depend on it.
PRETRAINING = re.compile(r"(.*\.)?(mask_token|(decoder|lm_head)\..*)")
# Norms and attention between the last tokens and the head; our ViT does not have them, and its tokens do not need them.
POOLING = re.compile(r"(?:^|[./])(fc_norm|attn_pool|MAPHead_0)[./]")


def load_vit(model: ViT, path: Path) -> list[str]:
    """Loads the tensors of a published checkpoint into a ViT with dense linear layers; see `load_pretrained`.

    Position embeddings of another grid are resized bilinearly with the corners kept, as in big_vision.

    What may stay as initialised, with a line: a head with another number of classes, biases, class token, positions,
    the last norm, the tanh layer, LayerScale and parameters of mixers that attention has none of. Weights of every
    block must be there.

    Torch files do not contain the number of heads, the activation and the grid of positions. A config.json of
    transformers beside the file says them, one of timm the grid; if there is none, `model` must have the right ones.

    Raises:
      ValueError: one line: the file is no ViT, or has parts that our ViT does not have (DeiT's distillation,
        registers); and as `load_pretrained`.
    """
    tensors = read(path)
    name, prefix = identify(tensors, path)
    family, said = FAMILIES[name], describe(path)
    check_tokens(tensors, path)
    single = list(split(tensors, path))
    found, unknown = rename(single, family, prefix, path)
    check_parts(unknown, prefix, path)
    wanted = parameters(model)
    check_blocks(found, wanted, path)
    check_axes_of_heads(model, single, path)
    check_heads(model, said)
    check_output(model, found, unknown, family, said, path)
    patch = [tensors[prefix + family.embedding].shape[axis] for axis in family.patch]
    lines = [f"parameters of {path}, a checkpoint of {name}", *differences(name, *options(model, family, found, said))]
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
    check_shapes(found, wanted, path)
    if tuple(patch) != (here := (model.patch_size, model.patch_size, model.image_shape[2])):
        raise ValueError(f"patches are {tuple(patch)} in {path} and {here} here")
    return lines + assign(found, wanted, unknown)


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


def check_axes_of_heads(model: ViT, single: list[tuple[str, np.ndarray]], path: Path) -> None:
    """Raises ValueError if the number of heads differs from that of linen's projections, which have an axis of it."""
    for heads in heads_of(model):
        for name, x in single:
            if name.endswith("/query/kernel") and x.ndim == 3 and x.shape[1] != heads:
                raise ValueError(f"{name} has {x.shape[1]} heads in {path} and {heads} here")


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


def options(model: ViT, family: Family, found: Tensors, said: Description) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of `model` that decide what is computed, and those of the checkpoint's authors.

    Raises:
      ValueError: one line: no option computes the activation of the checkpoint.
    """
    here = {
        "mlp": mlp_of(model),
        "norm": "layer" if isinstance(model.encoder.norm, nnx.LayerNorm) else "rms",
        "norm_epsilon": model.encoder.norm.epsilon,
    }
    there = {
        "mlp": "swiglu" if "encoder.blocks.0.mlp.gate.kernel" in found else said.mlp or family.mlp,
        "norm": "layer",
        "norm_epsilon": said.norm_epsilon or (1e-6 if "encoder.blocks.0.mixer_scale" in found else family.norm_epsilon),
    }
    return here, there
