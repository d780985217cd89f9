"""Bert: gives a Bert the tensors of a published checkpoint, and makes one of the sizes that are in it.

Names are those of transformers' BertModel (5.24) and of the first checkpoints, whose norms have gamma and beta.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from efficient_tx.attention import Softmax
from efficient_tx.models.bert import Bert
from efficient_tx.models.pretrained.description import Description, describe
from efficient_tx.models.pretrained.families import BLOCK, Family, rename, torch_layout
from efficient_tx.models.pretrained.parameters import (
    assign,
    check_blocks,
    check_heads,
    check_shapes,
    differences,
    mlp_of,
    parameters,
)
from efficient_tx.models.pretrained.tensors import Tensors, read, weights_file

TABLES = ("embedding.tokens", "embedding.learned", "embedding.segments")
LEAF = r"(weight|bias|gamma|beta)"
LAYER = r"encoder\.layer\.(\d+)\."
BERT = Family(
    embedding="embeddings.word_embeddings.weight",
    renamed=[
        (r"embeddings\.(word|position|token_type)_embeddings\.weight", "embedding.{}"),
        (rf"embeddings\.LayerNorm\.{LEAF}", "embedding.norm.{}"),
        (LAYER + r"attention\.self\.(query|key|value)\.(weight|bias)", f"{BLOCK}.mixer.{{}}.{{}}"),
        (LAYER + r"attention\.output\.dense\.(weight|bias)", f"{BLOCK}.mixer.out.{{}}"),
        (LAYER + rf"attention\.output\.LayerNorm\.{LEAF}", f"{BLOCK}.mixer_norm.{{}}"),
        (LAYER + r"(intermediate|output)\.dense\.(weight|bias)", f"{BLOCK}.mlp.{{}}.{{}}"),
        (LAYER + rf"output\.LayerNorm\.{LEAF}", f"{BLOCK}.mlp_norm.{{}}"),
    ],
    words={
        "word": "tokens", "position": "learned", "token_type": "segments", "query": "q", "key": "k", "value": "v",
        "intermediate": "up", "output": "down", "gamma": "scale", "beta": "bias",
    },
    axes=lambda name: 2 if name.endswith(".kernel") or name in TABLES else 1,
    layout=torch_layout,
    mlp="gelu_erf",
    norm_epsilon=1e-12,
)  # fmt: skip
PREFIXES = ("", "bert.", "model.")
# What does not take part in computing the tokens: buffers, and layers after the encoder that ours does not have.
BESIDE = re.compile(r"embeddings\.(position_ids|token_type_ids)|(pooler|cls|classifier|qa_outputs)\..*")


def load_bert(model: Bert, path: Path) -> list[str]:
    """Loads the tensors of a published checkpoint into a Bert with dense linear layers; see `load_pretrained`.

    Of the positions the first `max_len` are taken. BERT's layer for pooling and the heads behind it have no place, so
    the head here stays as initialised. A config.json of transformers beside the file says the number of heads, the
    activation and the number in the norms; if there is none, `model` must have the right ones.

    Raises:
      ValueError: one line: the file is no BERT, or another model with its names (RoBERTa, a decoder, relative
        positions); an embedding is missing; there are fewer positions than `max_len`; and as `load_pretrained`.
    """
    found, unknown = read_bert(path)
    said, wanted = describe(path), parameters(model)
    check_architecture(model, said)
    check_blocks(found, wanted, path)
    check_heads(model, said)
    if missing := next((key for key in wanted if key.startswith("embedding.") and key not in found), None):
        raise ValueError(f"{missing} is not in {path}: a part of the checkpoint is missing")
    lines = [f"parameters of {path}, a checkpoint of BERT", *differences("BERT", *options(model, said))]
    if "embedding.learned" in wanted:
        there, here = len(found["embedding.learned"]), len(wanted["embedding.learned"])
        if here > there:
            raise ValueError(f"max_len is {here}, and {path} has {there} positions")
        if here < there:
            found["embedding.learned"] = found["embedding.learned"][:here]
            lines.append(f"  of its {there} positions the first {here} are taken")
    check_shapes(found, wanted, path)
    return lines + assign(found, wanted, unknown)


def pretrained_bert(
    path: str | Path,
    *,
    num_classes: int = 0,
    mixers: Sequence[Callable[..., nnx.Module]] = (Softmax,),
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> Bert:
    """The Bert of a published checkpoint, with its weights: of the sizes in it, and as the config.json beside it says.

    Args:
      path: see `load_pretrained`; a folder as `save_pretrained` writes it, for one.
      num_classes: see `Bert`; 0 is a model without a head.
      mixers: see `Bert`. What one has that softmax has not stays as initialised.
      rngs: source of the parameters that are not in the checkpoint; None is `nnx.Rngs(0)`.
      **options: others of `Bert`, which come before those of the checkpoint.

    Raises:
      ValueError: one line: no config.json beside it says the number of heads; and as `load_pretrained`.
    """
    path = weights_file(path)
    found, said = read_bert(path)[0], describe(path)
    if said.heads is None:
        raise ValueError(f"{said.path} says no num_attention_heads, which is not in {path.name}")
    if missing := {"embedding.learned", "embedding.segments", "encoder.blocks.0.mlp.up.kernel"} - found.keys():
        raise ValueError(f"{min(missing)} is not in {path}: a part of the checkpoint is missing")
    vocab_size, features = found["embedding.tokens"].shape
    sizes = {
        "vocab_size": vocab_size,
        "features": features,
        "max_len": len(found["embedding.learned"]),
        "segments": len(found["embedding.segments"]),
        "layers": len({key.split(".")[2] for key in found if key.startswith("encoder.blocks.")}),
        "mlp_features": found["encoder.blocks.0.mlp.up.kernel"].shape[1],
        "heads": said.heads,
        "mlp": said.mlp or BERT.mlp,
        "norm_epsilon": said.norm_epsilon or BERT.norm_epsilon,
    }

    def make() -> Bert:
        return Bert(num_classes=num_classes, mixers=mixers, rngs=rngs or nnx.Rngs(0), **sizes | options)

    model = nnx.eval_shape(make)
    if parameters(model).keys() - found.keys():
        model = make()  # some of them stay as they are drawn here
    load_bert(model, path)
    return model


def read_bert(path: Path) -> tuple[Tensors, list[str]]:
    """The tensors of a checkpoint with our names and layout, and the names of those that we have no name for.

    Raises:
      ValueError: one line: it is no BERT, or it has a part that ours does not have.
    """
    tensors = read(path)
    prefix = next((prefix for prefix in PREFIXES if prefix + BERT.embedding in tensors), None)
    if prefix is None:
        raise ValueError(f"{path} is no checkpoint of a BERT: it has no {BERT.embedding}")
    found, unknown = rename(tensors.items(), BERT, prefix, path)
    if part := next((name for name in unknown if not BESIDE.fullmatch(name.removeprefix(prefix))), None):
        raise ValueError(f"{path} has {part}: this Bert has no such part")
    return found, unknown


def check_architecture(model: Bert, said: Description) -> None:
    """Raises ValueError if config.json says that the same names stand for another computation."""
    if said.model_type not in (None, "bert"):
        raise ValueError(f"model_type is {said.model_type!r} in {said.path}: this is a Bert")
    if said.is_decoder and not model.encoder.blocks[0].mixer.causal:
        raise ValueError(f"is_decoder is true in {said.path}: its tokens see none after them, and here they do")
    if not model.encoder.blocks[0].post_norm:
        raise ValueError("post_norm is False, and BERT's norms follow the residual sums")


def options(model: Bert, said: Description) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of `model` that decide what is computed, and those of the checkpoint's authors.

    Raises:
      ValueError: one line: no option computes the activation of the checkpoint.
    """
    norm = model.encoder.blocks[0].mlp_norm
    here = {
        "positions": model.embedding.positions,
        "mlp": mlp_of(model),
        "norm": "layer" if isinstance(norm, nnx.LayerNorm) else "rms",
        "norm_epsilon": norm.epsilon,
        "causal": model.encoder.blocks[0].mixer.causal,
    }
    there = {
        "positions": "learned",
        "mlp": said.mlp or BERT.mlp,
        "norm": "layer",
        "norm_epsilon": said.norm_epsilon or BERT.norm_epsilon,
        "causal": bool(said.is_decoder),
    }
    return here, there
