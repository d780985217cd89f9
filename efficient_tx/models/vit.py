"""ViT: images, as patches through the shared transformer, to logits of one label per image."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.checks import OptionError, at_least
from efficient_tx.models.transformer import Encoder
from efficient_tx.numerics.random import dropout, example_keys, fold

POOLS = ("cls", "mean")
POSITIONS = ("learned", "sincos", "rope2d", "none")


def patches(images: jax.Array, size: int) -> jax.Array:
    """`[batch, height, width, channels]` -> `[batch, patches, size · size · channels]`, patches in row-major order.

    Order within a patch: rows, columns, channels, as in a convolution kernel `[size, size, channels, features]` whose
    first three axes are merged.
    """
    batch, height, width, channels = images.shape
    grid = images.reshape(batch, height // size, size, width // size, size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)


def sincos(rows: int, columns: int, features: int) -> np.ndarray:
    """Sines and cosines of column, then row: float32 `[rows · columns, features]` (Beyer et al. 2022, 2205.01580).

    Each of the four gets a quarter of the channels; frequencies decrease geometrically from 1 to 1/10,000.

    Raises:
      ValueError: `features` is no multiple of four, or below 8.
    """
    if features % 4 or features < 8:
        raise OptionError("features", features, "sincos positions need a multiple of 4, at least 8")
    frequency = 10000.0 ** -np.linspace(0, 1, features // 4)
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [coordinate[:, None] * frequency for coordinate in (column, row)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


class ViT(nnx.Module):
    """Vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929), with any mixer and any linear layer.

    Patches are projected, get positions and pass through the `Encoder`. A linear layer of its first token ("cls") or of
    the mean of its tokens gives the logits; it starts at zero, as in the authors' code. Published models are settings
    of this one:

    - AugReg (Steiner et al. 2021, arXiv 2106.10270) and the original: the defaults.
    - Plain ViT-S/16 (Beyer et al. 2022, arXiv 2205.01580): pool="mean", positions="sincos", representation=features.
    - DeiT (Touvron et al. 2020, arXiv 2012.12877) without distillation, and other torch models: mlp="gelu_erf"; those
      of Hugging Face also have norm_epsilon=1e-12.
    - Dinov2 (Oquab et al. 2023, arXiv 2304.07193) without registers: mlp="gelu_erf" or, the largest, "swiglu", with
      layer_scale=1.0.

    A mixer that treats its tokens as a square grid (`pool`, `soft` with value_conv) needs pool="mean" and a square
    image.

    Args:
      num_classes: labels are in [0, num_classes).
      image_shape: (height, width, channels).
      mixers: factories of token mixers, called with (features, heads=, head_dim=, positions=, max_len=, dropout=,
        dtype=, rngs=) and repeated to depth.
      linear: factory of the MLP's linear layers, with the signature of `nnx.Linear`.
      patch_size: side of a patch in pixels; must divide height and width.
      features: width of the tokens.
      layers: number of blocks.
      heads: number of heads of each mixer.
      head_dim: width of a head; None means features // heads.
      mlp_features: width inside the MLPs.
      dropout: dropout rate on the embeddings and on the output of every mixer and MLP.
      drop_path: rate at which an example skips a branch of the last block; it increases linearly from 0 in the first
        block.
      layer_scale: initial value of a learnt factor per channel of every branch; None means no factor.
      pool: pooling to one vector: "cls" (a learnt token in front of the patches) or "mean" (over the patches).
      positions: position encoding: "learned" (also for the class token), "sincos" (fixed, none for the class token),
        "rope2d" (in the mixers) or "none".
      representation: width of a tanh layer between pooling and logits; None means no such layer.
      norm: normalisation: "layer" or "rms".
      norm_epsilon: number added to the variance in the norms.
      mlp: kind of MLP: "gelu", "gelu_erf" or "swiglu".
      remat: whether to recompute blocks in the backward pass.
      dtype: dtype of the computation; parameters are float32.
      rngs: source of the initial parameters.

    Raises:
      ValueError: a name or a size that does not fit; "rope2d" with a class token or with patches that form no square.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mixers: Sequence[Callable[..., nnx.Module]],
        linear: Callable = nnx.Linear,
        patch_size: int = 16,
        features: int = 384,
        layers: int = 12,
        heads: int = 6,
        head_dim: int | None = None,
        mlp_features: int = 1536,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        pool: str = "cls",
        positions: str = "learned",
        representation: int | None = None,
        norm: str = "layer",
        norm_epsilon: float = 1e-6,
        mlp: str = "gelu",
        remat: bool = False,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        at_least(1, patch_size=patch_size, representation=representation)
        for name, value, known in [("pool", pool, POOLS), ("positions", positions, POSITIONS)]:
            if value not in known:
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(known)}")
        height, width, channels = image_shape
        if height % patch_size or width % patch_size:
            raise OptionError("patch_size", patch_size, f"it must divide the sides of an image of {height} × {width}")
        rows, columns = height // patch_size, width // patch_size
        if positions == "rope2d" and (pool == "cls" or rows != columns):
            raise ValueError(
                f"positions is 'rope2d', for a square of patches and nothing else, with {rows} × {columns} patches and "
                f"pool={pool!r}: use a square image and pool='mean', or other positions"
            )
        tokens = rows * columns + (pool == "cls")
        self.embedding = nnx.Linear(patch_size * patch_size * channels, features, dtype=dtype, rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, features), jnp.float32)) if pool == "cls" else None
        self.learned = (
            nnx.Param(0.02 * jax.random.normal(rngs.params(), (tokens, features), jnp.float32))
            if positions == "learned"
            else None
        )
        if positions == "sincos":
            sincos(rows, columns, features)  # raises here instead of at the first call
        sizes = {
            "heads": heads,
            "head_dim": head_dim,
            "positions": "rope2d" if positions == "rope2d" else None,
            "max_len": tokens,
        }
        self.encoder = Encoder(
            features,
            layers=layers,
            mixers=[partial(mixer, **sizes) for mixer in mixers],
            mlp_features=mlp_features,
            linear=linear,
            mlp=mlp,
            norm=norm,
            norm_epsilon=norm_epsilon,
            dropout=dropout,
            drop_path=drop_path,
            layer_scale=layer_scale,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
        self.representation = nnx.Linear(features, representation, rngs=rngs) if representation else None
        self.head = nnx.Linear(
            representation or features, num_classes, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )
        self.image_shape = tuple(image_shape)
        self.patch_size = patch_size
        self.positions = positions
        self.dropout = dropout

    def encode(self, inputs: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The encoder's output tokens for images, `[batch, tokens, features]`; arguments as in `__call__`."""
        if inputs.shape[1:] != self.image_shape:
            raise ValueError(f"images have shape {inputs.shape[1:]}: this ViT was built for {self.image_shape}")
        batch, size = inputs.shape[0], self.patch_size
        x = self.embedding(patches(inputs, size).reshape(-1, self.embedding.in_features))
        x = x.reshape(batch, -1, self.embedding.out_features)
        if self.positions == "sincos":
            height, width, _ = self.image_shape
            x = x + jnp.asarray(sincos(height // size, width // size, x.shape[-1]), x.dtype)
        if self.cls is not None:
            x = jnp.concatenate([jnp.broadcast_to(self.cls[...].astype(x.dtype), (batch, 1, x.shape[-1])), x], axis=1)
        if self.learned is not None:
            x = x + self.learned[...].astype(x.dtype)
        keys = example_keys(key, batch)
        return self.encoder(dropout(x, self.dropout, fold(keys, 0)), key=fold(keys, 1))

    def __call__(self, inputs: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Logits, float32 `[batch, num_classes]`.

        Args:
          inputs: images, float `[batch, height, width, channels]`.
          key: None at evaluation; in training one key per example `[batch]`, or a single key, folded per example.

        Raises:
          ValueError: images of another shape.
        """
        x = self.encode(inputs, key)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x.mean(axis=1) if self.cls is None else x[:, 0]
        return self.head(x if self.representation is None else jnp.tanh(self.representation(x)))
