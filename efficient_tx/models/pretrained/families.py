"""Families: the names and layouts of the same tensors by different publishers.

Facts are from google-research/big_vision `models/vit.py`, google-research/vision_transformer `checkpoint.py`,
huggingface/pytorch-image-models `timm/models/vision_transformer.py` and transformers' ViT and Dinov2 (5.24): `.npz`
files of big_vision, scanned or not, and AugReg; `.safetensors` of timm, which DeiT shares; and those of Hugging Face,
under the names that `save_pretrained` writes and those that `state_dict` has since transformers 5.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from efficient_tx.models.pretrained.tensors import Tensors, weights


class Family(NamedTuple):
    """Names and layouts of a family of checkpoints.

    Attributes:
      embedding: name of the tensor that identifies the family.
      renamed: pairs (pattern of a name, our name with the pattern's groups in braces), tried in this order.
      words: translation of the groups to words in our names, if they differ.
      axes: our name -> the number of axes of the tensor in the file.
      layout: (our name, tensor) -> the tensor in our layout.
      mlp, norm_epsilon: options with which such checkpoints were trained.
      patch: of a ViT, the axes of height, width and channels of that tensor.
      tanh: of a ViT, whether the tanh layer, if there is one, is in front of the head; Hugging Face's pooler is beside.
      before: of a ViT, numbers of positions that may stand in front of those of the patches if there is a class token.
    """

    embedding: str
    renamed: list[tuple[str, str]]
    words: dict[str, str]
    axes: Callable[[str], int]
    layout: Callable[[str, np.ndarray], np.ndarray]
    mlp: str
    norm_epsilon: float
    patch: tuple[int, int, int] = (0, 0, 0)
    tanh: bool = False
    before: tuple[int, ...] = ()


def torch_axes(name: str) -> int:
    """Two axes of a kernel, four of the patches', a first one of length one of tokens."""
    return {"embedding.kernel": 4, "cls": 3, "learned": 3}.get(name, 2 if name.endswith(".kernel") else 1)


def linen_axes(name: str) -> int:
    """As in torch, and one more for heads."""
    return torch_axes(name) + (".mixer." in name and not name.endswith(".out.bias"))


def linen_layout(name: str, x: np.ndarray) -> np.ndarray:
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
# A block in transformers' files and, since its version 5, in its modules.
LAYER = r"(?:encoder\.layer|layers)\.(\d+)\."
FAMILIES = {
    "big_vision": Family(
        embedding="embedding/kernel",
        patch=(0, 1, 2),
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
        axes=linen_axes,
        layout=linen_layout,
        mlp="gelu",
        norm_epsilon=1e-6,
        tanh=True,
        before=(0, 1),
    ),
    "timm": Family(
        embedding="patch_embed.proj.weight",
        patch=(2, 3, 1),
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
        axes=torch_axes,
        layout=torch_layout,
        mlp="gelu_erf",
        norm_epsilon=1e-6,
        tanh=True,
        before=(0, 1),
    ),
    "Hugging Face": Family(
        embedding="embeddings.patch_embeddings.projection.weight",
        patch=(2, 3, 1),
        renamed=[
            (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", "embedding.{}"),
            (r"embeddings\.cls_token", "cls"),
            (r"embeddings\.position_embeddings", "learned"),
            (LAYER + r"(layernorm_before|layernorm_after|norm1|norm2)\.(weight|bias)", f"{BLOCK}.{{}}.{{}}"),
            (LAYER + r"attention\.attention\.(query|key|value)\.(weight|bias)", f"{BLOCK}.mixer.{{}}.{{}}"),
            (LAYER + r"attention\.([qkvo]_proj)\.(weight|bias)", f"{BLOCK}.mixer.{{}}.{{}}"),
            (LAYER + r"attention\.output\.dense\.(weight|bias)", f"{BLOCK}.mixer.out.{{}}"),
            (LAYER + r"(intermediate|output)\.dense\.(weight|bias)", f"{BLOCK}.mlp.{{}}.{{}}"),
            (
                LAYER + r"mlp\.(fc1|fc2|gate_proj|up_proj|down_proj|weights_out)\.(weight|bias)",
                f"{BLOCK}.mlp.{{}}.{{}}",
            ),
            (LAYER + r"(layer_scale[12])\.lambda1", f"{BLOCK}.{{}}"),
            (r"layernorm\.(weight|bias)", "encoder.norm.{}"),
            (r"pooler\.dense\.(weight|bias)", "representation.{}"),
            (r"classifier\.(weight|bias)", "head.{}"),
        ],
        words={
            "layernorm_before": "mixer_norm", "norm1": "mixer_norm", "layernorm_after": "mlp_norm", "norm2": "mlp_norm",
            "query": "q", "key": "k", "value": "v", "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out",
            "intermediate": "up", "fc1": "up", "up_proj": "up", "output": "down", "fc2": "down", "down_proj": "down",
            "weights_out": "down", "gate_proj": "gate", "layer_scale1": "mixer_scale", "layer_scale2": "mlp_scale",
        },
        axes=torch_axes,
        layout=torch_layout,
        mlp="gelu_erf",
        norm_epsilon=1e-12,
        tanh=False,
        before=(1,),
    ),
}  # fmt: skip
PREFIXES = ("", "params/", "opt/target/", "vit.", "deit.", "dinov2.", "dinov2_with_registers.", "ijepa.", "model.")
# Pieces of one tensor along its first axis: q, k and v in timm, both halves of SwiGLU in Hugging Face's Dinov2.
JOINT = {
    ".attn.qkv.": (".attn.q.", ".attn.k.", ".attn.v."),
    ".mlp.weights_in.": (".mlp.gate_proj.", ".mlp.up_proj."),
}


def identify(tensors: Tensors, path: Path) -> tuple[str, str]:
    """The family of a checkpoint, and the common prefix of its names."""
    for name, family in FAMILIES.items():
        for prefix in PREFIXES:
            if prefix + family.embedding in tensors:
                return name, prefix
    looked = ", ".join(family.embedding for family in FAMILIES.values())
    raise ValueError(f"{path} is no checkpoint of a ViT: of the patches' embeddings it has none of {looked}")


def split(tensors: Tensors, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors, one for each of ours: those that hold several, or the same of all blocks, are split.

    Raises:
      ValueError: one line: the first axis of one that holds several does not have so many parts.
    """
    for name, x in tensors.items():
        joint = next((joint for joint in JOINT if joint in name), None)
        scanned = "Transformer/encoderblock/" in name
        count = len(JOINT[joint]) if joint else 1
        if (joint or scanned) and (not x.ndim or len(x) % count):
            raise ValueError(f"{name} has the shape {x.shape} in {path}: its first axis should have {count} parts")
        if joint:
            yield from zip((name.replace(joint, part) for part in JOINT[joint]), np.split(x, count))
        elif scanned:
            yield from ((name.replace("/encoderblock/", f"/encoderblock_{i}/"), piece) for i, piece in enumerate(x))
        else:
            yield name, x


def our_name(name: str, family: Family) -> str | None:
    """Our name of a tensor of the family; None if we have none."""
    for pattern, ours in family.renamed:
        if match := re.fullmatch(pattern, name):
            key = ours.format(*(family.words.get(word, word) for word in match.groups()))
            if family.layout is torch_layout and key.endswith(".weight"):
                key = key.removesuffix("weight") + ("scale" if "norm." in key else "kernel")
            return key
    return None


def rename(
    tensors: Iterable[tuple[str, np.ndarray]], family: Family, prefix: str, path: Path
) -> tuple[Tensors, list[str]]:
    """The tensors in float32 with our names and layout, and the names of those that we have no name for.

    Raises:
      ValueError: one line: a tensor is no array of weights, has a wrong number of axes, or is there twice.
    """
    found: Tensors = {}
    unknown = []
    for name, x in tensors:
        key = our_name(name.removeprefix(prefix), family)
        if key is None:
            unknown.append(name)
            continue
        if key in found:
            raise ValueError(f"{name} is there twice in {path}, under different names")
        if x.ndim != (axes := family.axes(key)):
            raise ValueError(f"{name} has the shape {x.shape} in {path}: it should have {axes} axes")
        if key in ("cls", "learned") and len(x) > 1:
            raise ValueError(f"{name} has the shape {x.shape} in {path}: its first axis should be of length 1")
        found[key] = family.layout(key, weights(name, x, path))
    return found, unknown
