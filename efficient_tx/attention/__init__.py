"""Attention variants: each a pure function and a token mixer. Adding one is a file and a row of `ATTENTION`."""

from collections.abc import Callable

import jax

from efficient_tx.attention.adapter import adapt
from efficient_tx.attention.blocks import BigBird, Local, Longformer, Sparse, bigbird, local, longformer, sparse
from efficient_tx.attention.cosformer import Cosformer, cosformer
from efficient_tx.attention.fourier import Fourier, fourier
from efficient_tx.attention.gla import GLA, gla, gla_step
from efficient_tx.attention.hyper import Hyper, hyper
from efficient_tx.attention.kernelized import Kernelized, kernelized
from efficient_tx.attention.lev import Lev, lev
from efficient_tx.attention.lev_stream import LevState, lev_init, lev_step
from efficient_tx.attention.linear import LinearAttention, linear
from efficient_tx.attention.linformer import Linformer, linformer
from efficient_tx.attention.mixer import Mixer
from efficient_tx.attention.multihead import MultiHead
from efficient_tx.attention.nystromformer import Nystromformer, nystromformer
from efficient_tx.attention.performer import Performer, performer
from efficient_tx.attention.pool import Pool, pool
from efficient_tx.attention.s3 import S3, s3
from efficient_tx.attention.sigmoid import Sigmoid, sigmoid
from efficient_tx.attention.skeinformer import Skeinformer, skeinformer
from efficient_tx.attention.skyformer import Skyformer, skyformer
from efficient_tx.attention.soft import Soft, soft
from efficient_tx.attention.softmax import Softmax, softmax
from efficient_tx.attention.strassen import Strassen, strassen
from efficient_tx.attention.tensor import Tensor, tensor
from efficient_tx.attention.vmean import VMean, vmean

ATTENTION: dict[str, type[Mixer]] = {
    "softmax": Softmax,
    "kernelized": Kernelized,
    "sigmoid": Sigmoid,
    "skyformer": Skyformer,
    "soft": Soft,
    "nystromformer": Nystromformer,
    "skeinformer": Skeinformer,
    "s3": S3,
    "linformer": Linformer,
    "linear": LinearAttention,
    "performer": Performer,
    "cosformer": Cosformer,
    "gla": GLA,
    "lev": Lev,
    "hyper": Hyper,
    "tensor": Tensor,
    "strassen": Strassen,
    "fourier": Fourier,
    "local": Local,
    "longformer": Longformer,
    "bigbird": BigBird,
    "sparse": Sparse,
    "vmean": VMean,
    "pool": Pool,
}


def as_attention_fn(name: str, **options) -> Callable[..., jax.Array]:
    """The variant `name` with the signature that flax's attention modules call.

    For `flax.linen.MultiHeadDotProductAttention(attention_fn=...)` and `flax.nnx.MultiHeadAttention(attention_fn=...)`:
    query `[batch, q_length, heads, head_dim]`, key and value `[batch, length, groups, head_dim]`, mask
    `[batch, 1, 1, length]` for any variant and a full `[batch, heads or 1, q_length, length]` for the dense ones.

    Methods that sample do so with the module's `dropout_rng` where it passes one (flax's modules do so only while
    their own dropout_rate is above 0, which is refused here), and with the fixed evaluation key otherwise.

    Args:
      name: a key of `ATTENTION`.
      **options: of the variant's function (`landmarks=64`), arrays of parameters included (linformer's `e` and `f`).

    Raises:
      ValueError: an unknown name or option; a variant that needs more than queries, keys and values of its tokens;
        later, when called: a bias, attention dropout, several batch axes, a causal call of a variant that has no causal
        form, a full mask in a variant that takes key masks only.
    """
    return adapt(ATTENTION, name, **options)


__all__ = [
    "ATTENTION",
    "GLA",
    "S3",
    "BigBird",
    "Cosformer",
    "Fourier",
    "Hyper",
    "Kernelized",
    "Lev",
    "LevState",
    "LinearAttention",
    "Linformer",
    "Local",
    "Longformer",
    "Mixer",
    "MultiHead",
    "Nystromformer",
    "Performer",
    "Pool",
    "Sigmoid",
    "Skeinformer",
    "Skyformer",
    "Soft",
    "Softmax",
    "Sparse",
    "Strassen",
    "Tensor",
    "VMean",
    "as_attention_fn",
    "bigbird",
    "cosformer",
    "fourier",
    "gla",
    "gla_step",
    "hyper",
    "kernelized",
    "lev",
    "lev_init",
    "lev_step",
    "linear",
    "linformer",
    "local",
    "longformer",
    "nystromformer",
    "performer",
    "pool",
    "s3",
    "sigmoid",
    "skeinformer",
    "skyformer",
    "soft",
    "softmax",
    "sparse",
    "strassen",
    "tensor",
    "vmean",
]
