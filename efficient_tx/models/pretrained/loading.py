"""Loading: gives a model the tensors of a published checkpoint, and says what was and was not given."""

from pathlib import Path

from efficient_tx.models.bert import Bert
from efficient_tx.models.pretrained.bert import load_bert
from efficient_tx.models.pretrained.tensors import weights_file
from efficient_tx.models.pretrained.vit import load_vit
from efficient_tx.models.vit import ViT


def load_pretrained(model: ViT | Bert, path: str | Path) -> list[str]:
    """Loads the tensors of a published checkpoint into a ViT or a Bert with dense linear layers.

    Weights are float64, float32, float16 or bfloat16 and become float32. What the families have of their own is said in
    `load_vit` and `load_bert`.

    Args:
      model: the model to change; on errors it is unchanged.
      path: a file with the extension .npz or .safetensors. One of several shards stands for all of them, if the
        .safetensors.index.json that names them is beside it; so does that index. A folder stands for its
        model.safetensors.

    Returns:
      Lines of a report: the family; options of `model` that differ; one line for each parameter that is missing in the
      file (it stays as initialised) and for each tensor that has no place in the model.

    Raises:
      ValueError: one line: the file is missing, unreadable or of another family; it is one shard without the others; a
        weight is not of one of these dtypes or not finite; a weight of a block is missing; it has parts that ours does
        not have; the activation, the number of heads or blocks or any other shape differs.
      TypeError: the model is neither a ViT nor a Bert.
    """
    for kind, load in ((ViT, load_vit), (Bert, load_bert)):
        if isinstance(model, kind):
            return load(model, weights_file(path))
    raise TypeError(f"{type(model).__name__} has no published checkpoints here: load one into a ViT or a Bert")
