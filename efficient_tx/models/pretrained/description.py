"""Description: what the config.json beside a published checkpoint says about its model."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from efficient_tx.models.pretrained.tensors import reading

# Names of transformers' activations that our MLP has: GELU with the error function, and its tanh form.
ACTIVATIONS = {
    "gelu": "gelu_erf", "gelu_python": "gelu_erf", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_accurate": "gelu",
    "gelu_pytorch_tanh": "gelu", "gelu_python_tanh": "gelu",
}  # fmt: skip


class Description(NamedTuple):
    """Options of a published model; None for those of which nothing is said.

    Attributes:
      path: the file that says them.
      activation: transformers' name of the activation between the layers of the MLPs.
      pooler_activation: the same of the layer between pooling and logits.
      norm_epsilon: number added to the variance in the norms.
      heads: number of heads.
      model_type: transformers' name of the architecture.
      is_decoder: whether a token sees the tokens before it only.
      image: height and width of the images in pixels.
    """

    path: Path
    activation: str | None = None
    pooler_activation: str | None = None
    norm_epsilon: float | None = None
    heads: int | None = None
    model_type: str | None = None
    is_decoder: bool | None = None
    image: tuple[int, int] | None = None

    @property
    def mlp(self) -> str | None:
        """Our kind of MLP with that activation.

        Raises:
          ValueError: one line: ours has no such activation.
        """
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act is {self.activation!r} in {self.path}: the MLP here has {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS.get(self.activation)


def describe(checkpoint: Path) -> Description:
    """What the config.json of transformers or timm beside a checkpoint says, if there is one.

    Raises:
      ValueError: one line: it is no JSON, or a value in it has another type than transformers and timm write.
    """
    path = checkpoint.with_name("config.json")
    if not path.is_file():
        return Description(path)
    with reading(path):
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("it is no object")

        def said(key: str, *kinds: type) -> Any:
            value = config.get(key)
            if value is not None and type(value) not in kinds:
                raise ValueError(f"{key} is {value!r}")
            return value

        image = said("image_size", int, list)
        if timm := said("pretrained_cfg", dict):
            image = (timm.get("input_size") or [])[1:] or image
        if image is not None:
            height, width = (image, image) if isinstance(image, int) else image
            image = int(height), int(width)
        return Description(
            path,
            activation=said("hidden_act", str),
            pooler_activation=said("pooler_act", str),
            norm_epsilon=said("layer_norm_eps", float, int),
            heads=said("num_attention_heads", int),
            model_type=said("model_type", str),
            is_decoder=said("is_decoder", bool),
            image=image,
        )
