"""Pretrained: loads published ViT checkpoints from files into our ViT.

Three families have different names and layouts of the same tensors (facts from google-research/big_vision
`models/vit.py`, google-research/vision_transformer `checkpoint.py`, huggingface/pytorch-image-models
`timm/models/vision_transformer.py` and transformers' ViT): `.npz` files of big_vision and AugReg, `.safetensors` of
timm, which DeiT shares, and those of Hugging Face.
"""

import math
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.ndimage import zoom

from efficient_tx.models.vit import ViT

SUFFIXES = (".npz", ".safetensors")
Tensors = dict[str, np.ndarray]


class Family(NamedTuple):
    """Names and layouts of a family of checkpoints.

    Attributes:
      embedding: name of the tensor that identifies the family.
      renamed: pairs (pattern of a name, our name with the pattern's groups in braces), tried in this order.
      words: translation of the groups to words in our names, if they differ.
      layout: (our name, tensor) -> the tensor in our layout.
      mlp, norm_epsilon: options of ViT with which such checkpoints were trained.
    """

    embedding: str
    renamed: list[tuple[str, str]]
    words: dict[str, str]
    layout: Callable[[str, np.ndarray], np.ndarray]
    mlp: str
    norm_epsilon: float


def flax_layout(name: str, x: np.ndarray) -> np.ndarray:
    """Layout of a linen module: a separate axis for heads, kernels `[in, out]`, images `[height, width, channels]`."""
    part, leaf = name.rpartition(".")[::2]
    if part.endswith((".q", ".k", ".v")):
        return x.reshape(len(x), -1) if leaf == "kernel" else x.reshape(-1)
    if leaf == "kernel":
        return x.reshape(-1, x.shape[-1])
    return x[0] if name in ("cls", "learned") else x


def torch_layout(name: str, x: np.ndarray) -> np.ndarray:
    """Layout of a torch module: weights `[out, in]`, images `[channels, height, width]`."""
    if x.ndim == 4:
        x = x.transpose(0, 2, 3, 1).reshape(len(x), -1)
    if name.endswith(".kernel"):
        return x.T
    return x[0] if name in ("cls", "learned") else x


BLOCK = "encoder.blocks.{}"
FAMILIES = {
    "big_vision": Family(
        embedding="embedding/kernel",
        renamed=[
            (r"(embedding|head)/(kernel|bias)", "{}.{}"),
            (r"cls", "cls"),
            (r"(?:Transformer/)?(?:posembed_input/)?pos_embedding", "learned"),
            (r"Transformer/encoderblock_(\d+)/LayerNorm_0/(scale|bias)", f"{BLOCK}.mixer_norm.{{}}"),
            (r"Transformer/encoderblock_(\d+)/LayerNorm_[12]/(scale|bias)", f"{BLOCK}.mlp_norm.{{}}"),
            (
                r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/(query|key|value|out)/(kernel|bias)",
                f"{BLOCK}.mixer.{{}}.{{}}",
            ),
            (r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/(Dense_0|Dense_1)/(kernel|bias)", f"{BLOCK}.mlp.{{}}.{{}}"),
            (r"Transformer/encoder_norm/(scale|bias)", "encoder.norm.{}"),
            (r"pre_logits/(kernel|bias)", "representation.{}"),
        ],
        words={"query": "q", "key": "k", "value": "v", "Dense_0": "up", "Dense_1": "down"},
        layout=flax_layout,
        mlp="gelu",
        norm_epsilon=1e-6,
    ),
    "timm": Family(
        embedding="patch_embed.proj.weight",
        renamed=[
            (r"patch_embed\.proj\.(weight|bias)", "embedding.{}"),
            (r"cls_token", "cls"),
            (r"pos_embed", "learned"),
            (r"blocks\.(\d+)\.(norm1|norm2)\.(weight|bias)", f"{BLOCK}.{{}}.{{}}"),
            (r"blocks\.(\d+)\.attn\.(q|k|v|proj)\.(weight|bias)", f"{BLOCK}.mixer.{{}}.{{}}"),
            (r"blocks\.(\d+)\.mlp\.(fc1|fc2)\.(weight|bias)", f"{BLOCK}.mlp.{{}}.{{}}"),
            (r"blocks\.(\d+)\.(ls1\.gamma|ls2\.gamma|gamma_1|gamma_2)", f"{BLOCK}.{{}}"),
            (r"norm\.(weight|bias)", "encoder.norm.{}"),
            (r"pre_logits\.fc\.(weight|bias)", "representation.{}"),
            (r"head\.(weight|bias)", "head.{}"),
        ],
        words={
            "norm1": "mixer_norm", "norm2": "mlp_norm", "proj": "out", "fc1": "up", "fc2": "down",
            "ls1.gamma": "mixer_scale", "ls2.gamma": "mlp_scale", "gamma_1": "mixer_scale", "gamma_2": "mlp_scale",
        },
        layout=torch_layout,
        mlp="gelu_erf",
        norm_epsilon=1e-6,
    ),
    "Hugging Face": Family(
        embedding="embeddings.patch_embeddings.projection.weight",
        renamed=[
            (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", "embedding.{}"),
            (r"embeddings\.cls_token", "cls"),
            (r"embeddings\.position_embeddings", "learned"),
            (r"encoder\.layer\.(\d+)\.(layernorm_before|layernorm_after)\.(weight|bias)", f"{BLOCK}.{{}}.{{}}"),
            (
                r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)",
                f"{BLOCK}.mixer.{{}}.{{}}",
            ),
            (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)", f"{BLOCK}.mixer.out.{{}}"),
            (r"encoder\.layer\.(\d+)\.(intermediate|output)\.dense\.(weight|bias)", f"{BLOCK}.mlp.{{}}.{{}}"),
            (r"layernorm\.(weight|bias)", "encoder.norm.{}"),
            (r"pooler\.dense\.(weight|bias)", "representation.{}"),
            (r"classifier\.(weight|bias)", "head.{}"),
        ],
        words={
            "query": "q", "key": "k", "value": "v", "intermediate": "up", "output": "down",
            "layernorm_before": "mixer_norm", "layernorm_after": "mlp_norm",
        },
        layout=torch_layout,
        mlp="gelu_erf",
        norm_epsilon=1e-12,
    ),
}  # fmt: skip
# Tokens other than the patches and one class token; our ViT does not have them.
MORE_TOKENS = re.compile(r"dist_token|head_dist|distillation|reg_token")


def load_pretrained(model: ViT, path: str | Path) -> list[str]:
    """Loads the tensors of a published checkpoint into a ViT with dense linear layers.

    A head with another number of classes is not loaded. Position embeddings of another grid are resized bilinearly with
    the corners kept, as in big_vision. Torch files do not contain the number of heads: `model` must have the right one.

    Args:
      model: the model to change; on errors it is unchanged.
      path: a file with the extension .npz or .safetensors.

    Returns:
      Lines of a report: the family; options of `model` that differ; one line for each tensor that is missing in the
      file (it stays as initialised) or has no place in the model.

    Raises:
      ValueError: one line: the file is missing, unreadable or no ViT; it has tokens that our ViT does not have (DeiT's
        distillation, registers); the number of heads or any other shape differs.
    """
    tensors = read(path)
    name, family, tensors = identify(tensors, path)
    if extra := next(filter(MORE_TOKENS.search, tensors), None):
        raise ValueError(
            f"{path} has {extra}: a token more than the patches and one class token (distilled DeiT, registers), which "
            "this ViT does not have; take a checkpoint without"
        )
    lines = [f"parameters of {path}, a checkpoint of {name}", *differences(model, family, name)]
    wanted = {".".join(map(str, place)): x for place, x in nnx.iter_graph(model) if isinstance(x, nnx.Param)}
    found, unknown = rename(tensors, family)
    check_heads(model, tensors, path)
    lines += fit_positions(model, found)
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
    lines += [f"  {key} is not there: it stays as initialised" for key in wanted if key not in found]
    lines += [f"  {key} has no place here" for key in [*unknown, *(key for key in found if key not in wanted)]]
    for key, x in wanted.items():
        if key in found:
            x.set_value(jnp.asarray(found[key], x.dtype))
    return lines


def read(path: str | Path) -> Tensors:
    """The tensors of a file by name.

    Raises:
      ValueError: one line: the file is missing or unreadable.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if str(path).endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                # numpy has no bfloat16 and stores it as two untyped bytes.
                return {name: x.view(jnp.bfloat16) if x.dtype == "V2" else x for name, x in file.items()}
        from safetensors import SafetensorError
        from safetensors.flax import load_file  # its numpy counterpart has no bfloat16

        try:
            return {name: np.asarray(x) for name, x in load_file(path).items()}
        except SafetensorError as error:
            raise ValueError(error) from None
    except (OSError, EOFError, TypeError, ValueError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def identify(tensors: Tensors, path: str | Path) -> tuple[str, Family, Tensors]:
    """The family of a checkpoint, and its tensors without the common prefix of their names."""
    for name, family in FAMILIES.items():
        for prefix in ("", "params/", "opt/target/", "vit.", "deit.", "model."):
            if prefix + family.embedding in tensors:
                return name, family, split_projections({key.removeprefix(prefix): x for key, x in tensors.items()})
    looked = ", ".join(family.embedding for family in FAMILIES.values())
    raise ValueError(f"{path} is no checkpoint of a ViT: of the patches' embeddings it has none of {looked}")


def split_projections(tensors: Tensors) -> Tensors:
    """Splits q, k and v, which are one tensor in timm."""
    split = {}
    for name, x in tensors.items():
        if ".attn.qkv." in name and len(x) % 3 == 0:
            split |= {name.replace("qkv", part): piece for part, piece in zip("qkv", np.split(x, 3))}
        else:
            split[name] = x
    return split


def rename(tensors: Tensors, family: Family) -> tuple[Tensors, list[str]]:
    """The tensors with our names and layout, and the names of tensors that have no counterpart."""
    found, unknown = {}, []
    for name, x in tensors.items():
        for pattern, ours in family.renamed:
            if match := re.fullmatch(pattern, name):
                key = ours.format(*(family.words.get(word, word) for word in match.groups()))
                if family.layout is torch_layout and key.endswith(".weight"):
                    key = key.removesuffix("weight") + ("scale" if "norm." in key else "kernel")
                found[key] = family.layout(key, x)
                break
        else:
            unknown.append(name)
    return found, unknown


def differences(model: ViT, family: Family, name: str) -> list[str]:
    """One line for each option of `model` that differs from that of the checkpoint's authors."""
    block = model.encoder.blocks[0]
    mlp = "swiglu" if block.mlp.gate is not None else "gelu_erf" if block.mlp.exact else "gelu"
    here = {"mlp": mlp, "norm_epsilon": model.encoder.norm.epsilon}
    return [
        f"  {name} has {option}={getattr(family, option)}, here it is {value}: "
        f"the option {option}={getattr(family, option)} computes the same as there"
        for option, value in here.items()
        if value != getattr(family, option)
    ]


def check_heads(model: ViT, tensors: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Raises ValueError if a linen checkpoint, whose projections have a head axis, has other heads than `model`."""
    heads = getattr(model.encoder.blocks[0].mixer, "heads", None)
    for name, x in tensors.items():
        if name.endswith("/query/kernel") and x.ndim == 3 and heads not in (None, x.shape[1]):
            raise ValueError(f"{name} has {x.shape[1]} heads in {path} and {heads} here")


def fit_positions(model: ViT, found: Tensors) -> list[str]:
    """Fits the position embeddings in `found` to the grid and the class token of `model`; returns lines that report it.

    Some checkpoints also have an embedding for the class token. For others (big_vision since 2022, DeiT III) it is
    zero.
    """
    if "learned" not in found or model.learned is None:
        return []
    height, width, _ = model.image_shape
    new = height // model.patch_size, width // model.patch_size
    table = found["learned"]
    old = math.isqrt(len(table))
    first, grid = table[: len(table) - old**2], table[len(table) - old**2 :]
    if len(first) > 1:
        raise ValueError(f"learned has {len(table)} positions: neither a square of patches nor one more than that")
    lines = []
    if new != (old, old):
        factors = (new[0] / old, new[1] / old, 1)
        grid = zoom(grid.reshape(old, old, -1).astype(np.float32), factors, order=1).reshape(new[0] * new[1], -1)
        lines = [f"  position embeddings resized from {old} × {old} to {new[0]} × {new[1]}"]
    if model.cls is None:
        first = first[:0]
    elif not len(first):
        first = np.zeros_like(grid[:1])
    found["learned"] = np.concatenate([first, grid])
    return lines
