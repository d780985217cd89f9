"""Pyramid: images, through four stages of coarser and coarser grids, to logits of one label per image."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.checks import OptionError, at_least
from efficient_tx.models.transformer import Block, make_norm, run_blocks
from efficient_tx.numerics.random import check_rate, dropout, example_keys, fold

# The published sizes by stage. For "small" the authors' code has 20 blocks in the third stage, which gives 38.9 M
# parameters; with 7 blocks it has the published 24 M and 3.3 G.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "tiny": {"features": (64, 128, 320, 512), "depths": (1, 2, 3, 2), "heads": (2, 4, 10, 16)},
    "small": {"features": (64, 128, 320, 512), "depths": (1, 3, 7, 4), "heads": (2, 4, 10, 16)},
    "medium": {"features": (64, 128, 288, 512), "depths": (1, 3, 29, 5), "heads": (2, 4, 9, 16)},
    "large": {"features": (64, 128, 320, 512), "depths": (1, 3, 40, 5), "heads": (2, 4, 10, 16)},
    "huge": {"features": (64, 128, 352, 512), "depths": (1, 5, 49, 5), "heads": (2, 4, 11, 16)},
}
STEM = 32  # channels of the first two convolutions


class Convolution(nnx.Module):
    """relu(norm(x ∗ W + b)), W 3 × 3: `[batch, height, width, channels]` -> `[batch, ⌈height/stride⌉, …, features]`.

    LayerNorm over the channels of a pixel replaces the published BatchNorm, with the same number of parameters.
    """

    def __init__(self, channels: int, features: int, stride: int, *, dtype: jnp.dtype | None, rngs: nnx.Rngs):
        self.conv = nnx.Conv(channels, features, (3, 3), strides=stride, padding=1, dtype=dtype, rngs=rngs)
        self.norm = make_norm("layer", features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x)))


class Stage(nnx.Module):
    """Convolutions to a grid of tokens, then learnt positions and blocks: `[batch, height, width, channels]` -> tokens.

    Args:
      convolutions: (channels, features, stride) of each convolution.
      side: side of the resulting grid.
      blocks: factories of the blocks, called with (features, rngs=).
      class_token: whether to put a learnt token in front of the tokens of the grid.
      dropout: dropout rate on the tokens before the blocks.
      remat: whether to recompute blocks in the backward pass.
      dtype: dtype of the computation; parameters are float32.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        convolutions: Sequence[tuple[int, int, int]],
        side: int,
        blocks: Sequence[Callable[..., Block]],
        *,
        class_token: bool,
        dropout: float,
        remat: bool,
        dtype: jnp.dtype | None,
        rngs: nnx.Rngs,
    ):
        features = convolutions[-1][1]
        self.convolutions = nnx.List(Convolution(*sizes, dtype=dtype, rngs=rngs) for sizes in convolutions)
        self.cls = (
            nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, features), jnp.float32)) if class_token else None
        )
        self.positions = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (side * side + class_token, features), jnp.float32)
        )
        self.blocks = nnx.List(block(features, rngs=rngs) for block in blocks)
        self.side = side
        self.dropout = dropout
        self.remat = remat

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """`x` and `key` `[batch]` or None -> `[batch, side · side, features]`, one more token with `class_token`."""
        for convolution in self.convolutions:
            x = convolution(x)
        batch, _, _, features = x.shape
        x = x.reshape(batch, -1, features)
        if self.cls is not None:
            x = jnp.concatenate([jnp.broadcast_to(self.cls[...].astype(x.dtype), (batch, 1, features)), x], axis=1)
        x = dropout(x + self.positions[...].astype(x.dtype), self.dropout, fold(key, 0))
        return run_blocks(self.blocks, x, keys=fold(key, 1), remat=self.remat)


class Pyramid(nnx.Module):
    """The hierarchical backbone of SOFT (Lu et al. 2021, arXiv 2110.11945; SOFT++ 2207.03341), with any mixer.

    Three 3 × 3 convolutions give a grid with a quarter of the image's side; one more before each later stage halves it.
    All stages except the last have post-norm blocks. The last has pre-norm blocks and a class token, whose normalised
    vector gives the logits. The published models have the mixers "soft*3,softmax", with a convolution bottleneck of 49
    tokens (windows of 8, 4 and 2 at 224 × 224) and convolutions of the values of size 9, 5 and 3:
    `grid=True, bottleneck="convolution", landmarks=49, value_conv=-1`.

    Parameters and multiplications at 224 × 224 with 1000 classes; published numbers in brackets. Multiplications count
    convolutions, linear layers and the products of attention, without the solve with the bottleneck's kernel.
    Parameters agree within 2 %; multiplications too, except medium (2.6 %) and large (2.1 %):

        tiny     13.07 M (13)    1.93 G (1.9)
        small    24.11 M (24)    3.35 G (3.3)
        medium   45.81 M (45)    7.39 G (7.2)
        large    64.70 M (64)   11.23 G (11.0)
        huge     87.11 M (87)   16.01 G (16.3)

    Facts are from fudan-zvg/SOFT, `models/softmax_free_vision_transformer.py` (3bac5fe) and
    `models/softmax_free_transformer.py` (2296f34). Unlike there: LayerNorm instead of BatchNorm; `drop_path` drops a
    whole branch (there single entries, in the post-norm blocks); one form of GELU and one epsilon in all stages.

    Args:
      num_classes: labels are in [0, num_classes).
      image_shape: (height, width, channels) of a square image. Sides that are no multiples of the strides are padded
        with zeros, as the convolutions pad every image.
      mixers: factories of token mixers, one per stage, repeated; called with (features, heads=, max_len=, dropout=,
        dtype=, rngs=).
      linear: factory of the MLPs' linear layers, with the signature of `nnx.Linear`.
      size: size of the model, "tiny", "small", "medium", "large" or "huge": sets features, depths and heads if they are
        None.
      features: width of the tokens in each stage.
      depths: number of blocks in each stage.
      heads: number of heads of the mixers in each stage.
      mlp_ratio: width inside the MLPs divided by the width of the stage. It is 4 in every published stage; the lists 8,
        8, 4, 4 in the authors' code only affect the last stage.
      mlp: kind of MLP: "gelu", "gelu_erf" or "swiglu".
      dropout: dropout rate on the embeddings and on the output of every mixer and MLP.
      drop_path: rate at which an example skips a branch of the last block; it increases linearly from 0 in the first
        block.
      remat: whether to recompute blocks in the backward pass.
      dtype: dtype of the computation; parameters are float32.
      rngs: source of the initial parameters.

    Raises:
      ValueError: a name or a size that does not fit; an image that is not square.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mixers: Sequence[Callable[..., nnx.Module]],
        linear: Callable = nnx.Linear,
        size: str = "tiny",
        features: tuple | None = None,
        depths: tuple | None = None,
        heads: tuple | None = None,
        mlp_ratio: int = 4,
        mlp: str = "gelu",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        features, depths, heads = stage_sizes(size, features=features, depths=depths, heads=heads)
        at_least(1, mlp_ratio=mlp_ratio)
        check_rate(drop_path, "drop_path")
        height, width, channels = image_shape
        if height != width:
            raise ValueError(f"image_shape is {tuple(image_shape)}: Pyramid reads square images; crop or pad them")

        last = len(features) - 1
        side = -(-height // 4)
        convolutions = [(channels, STEM, 2), (STEM, STEM, 1), (STEM, features[0], 2)]
        rates = iter([drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        self.stages = nnx.List()
        for i, depth in enumerate(depths):
            mixer = partial(mixers[i % len(mixers)], heads=heads[i], max_len=side * side + (i == last))
            block = partial(
                Block,
                mixer=mixer,
                mlp_features=mlp_ratio * features[i],
                linear=linear,
                mlp=mlp,
                dropout=dropout,
                post_norm=i != last,
                dtype=dtype,
            )
            blocks = [partial(block, drop_path=rate) for rate in itertools.islice(rates, depth)]
            self.stages.append(
                Stage(
                    convolutions,
                    side,
                    blocks,
                    class_token=i == last,
                    dropout=dropout,
                    remat=remat,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            convolutions = [(features[i], features[min(i + 1, last)], 2)]
            side = -(-side // 2)
        self.norm = make_norm("layer", features[last], dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(features[last], num_classes, rngs=rngs)
        self.image_shape = tuple(image_shape)

    def __call__(self, inputs: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Logits, float32 `[batch, num_classes]`.

        Args:
          inputs: images, float `[batch, height, width, channels]`.
          key: None at evaluation; in training one key per example `[batch]`, or a single key, folded per example.

        Raises:
          ValueError: images of another shape.
        """
        if inputs.shape[1:] != self.image_shape:
            raise ValueError(f"images have shape {inputs.shape[1:]}: this Pyramid was built for {self.image_shape}")
        keys = example_keys(key, inputs.shape[0])
        *stages, last = self.stages
        x = inputs
        for i, stage in enumerate(stages):
            x = stage(x, fold(keys, i)).reshape(len(x), stage.side, stage.side, -1)
        first = self.norm(last(x, fold(keys, len(stages)))[:, 0])
        return self.head(first.astype(jnp.promote_types(first.dtype, jnp.float32)))


def stage_sizes(size: str, **given: tuple[int, ...] | None) -> list[tuple[int, ...]]:
    """The sizes by stage, as given, else those of `size`.

    Raises:
      ValueError: an unknown `size`, a number below 1, or different numbers of stages.
    """
    if size not in SIZES:
        raise OptionError("size", size, f"choose one of {', '.join(SIZES)}")
    sizes = {name: SIZES[size][name] if value is None else tuple(value) for name, value in given.items()}
    for name, values in sizes.items():
        for i, value in enumerate(values):
            if not isinstance(value, int):
                raise ValueError(f"{name}[{i}] is {value!r}: it must be a number")
            at_least(1, **{f"{name}[{i}]": value})
    if len({len(values) for values in sizes.values()}) != 1 or not sizes["depths"]:
        told = ", ".join(f"{name} {values}" for name, values in sizes.items())
        raise ValueError(f"the stages have {told}: give as many of each, and one at least")
    return list(sizes.values())
