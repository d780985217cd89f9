"""Attention variants, each a pure function and a token mixer. A new variant is one file and one row of `ATTENTION`."""

from collections.abc import Callable
from typing import Any

import jax

from efficient_tx.attention.base.adapter import KeySource, adapt
from efficient_tx.attention.base.mixer import Mixer
from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.block_sparse.bigbird import BigBird, bigbird
from efficient_tx.attention.block_sparse.local import Local, local
from efficient_tx.attention.block_sparse.longformer import Longformer, longformer
from efficient_tx.attention.block_sparse.sparse import Sparse, sparse
from efficient_tx.attention.exact.custom import Custom, custom
from efficient_tx.attention.exact.kernelized import Kernelized, kernelized
from efficient_tx.attention.exact.sigmoid import Sigmoid, sigmoid
from efficient_tx.attention.exact.softmax import Softmax, softmax
from efficient_tx.attention.feature.cosformer import Cosformer, cosformer
from efficient_tx.attention.feature.linear import LinearAttention, linear
from efficient_tx.attention.feature.performer import Performer, performer
from efficient_tx.attention.fixed.fourier import Fourier, fourier
from efficient_tx.attention.fixed.pool import Pool, pool
from efficient_tx.attention.fixed.vmean import VMean, vmean
from efficient_tx.attention.higher_order.strassen import Strassen, strassen
from efficient_tx.attention.higher_order.tensor import Tensor, tensor
from efficient_tx.attention.low_rank.linformer import Linformer, linformer
from efficient_tx.attention.low_rank.nystromformer import Nystromformer, nystromformer
from efficient_tx.attention.low_rank.s3 import S3, s3
from efficient_tx.attention.low_rank.skyformer import Skyformer, skyformer
from efficient_tx.attention.low_rank.soft import Soft, soft
from efficient_tx.attention.recurrent.delta import Delta, delta
from efficient_tx.attention.recurrent.gated_delta import GatedDelta, gated_delta
from efficient_tx.attention.recurrent.gla import GLA, gla, gla_step
from efficient_tx.attention.recurrent.hgrn import HGRN, hgrn
from efficient_tx.attention.recurrent.kda import KDA, kda
from efficient_tx.attention.recurrent.mamba2 import Mamba2, mamba2
from efficient_tx.attention.recurrent.mega import Mega, mega
from efficient_tx.attention.recurrent.mlgru import MLGRU
from efficient_tx.attention.recurrent.retnet import RetNet, retnet
from efficient_tx.attention.recurrent.s4d import S4D, s4d
from efficient_tx.attention.sampled.hyper import Hyper, hyper
from efficient_tx.attention.sampled.lev import Lev, lev
from efficient_tx.attention.sampled.lev_stream import LevState, lev_init, lev_step
from efficient_tx.attention.sampled.skeinformer import Skeinformer, skeinformer

ATTENTION: dict[str, type[Mixer]] = {
    "softmax": Softmax,
    "kernelized": Kernelized,
    "sigmoid": Sigmoid,
    "custom": Custom,
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
    "retnet": RetNet,
    "mamba2": Mamba2,
    "delta": Delta,
    "gated_delta": GatedDelta,
    "kda": KDA,
    "hgrn": HGRN,
    "mlgru": MLGRU,
    "s4d": S4D,
    "mega": Mega,
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


def as_attention_fn(name: str, *, key: KeySource | None = None, **options: Any) -> Callable[..., jax.Array]:
    """The variant `name` with the signature that flax's attention modules call.

    For `flax.linen.MultiHeadDotProductAttention(attention_fn=...)` and `flax.nnx.MultiHeadAttention(attention_fn=...)`.
    The shapes are: query `[batch, q_length, heads, head_dim]`, key and value `[batch, length, groups, head_dim]`, mask
    `[batch, 1, 1, length]`. Dense variants also take a full mask `[batch, heads or 1, q_length, length]`. A mask is
    True, or 1, for real tokens. Flax makes masks of float32: other values than 0 and 1 raise, and where they are traced
    the output is NaN.

    With `is_causal=True`, one query (decoding) is the last token. Several queries, but not as many as keys, are
    refused: our functions align the last query with the last key, `jax.nn.dot_product_attention` and flax's function
    the first query with the first key.

    Args:
      name: a key of `ATTENTION`.
      key: where sampling methods (those whose class `draws`) get a key for each call. An `nnx.Rngs` or one of its
        streams: then the result is an nnx module with a stream of its own, which draws unless it is `deterministic`, as
        `nnx.Dropout` does. Or a function that returns a key, or None for the fixed evaluation key; in a method of a
        Linen module, `lambda: self.make_rng("landmarks")`. None: always the evaluation key, with a warning if that is
        differentiated, for flax's modules do not pass their `dropout_rng` without dropout.
      **options: options of the variant's function (`landmarks=64`) and its parameter arrays (linformer's `e` and `f`).

    Raises:
      ValueError: an unknown name or option; a variant that needs more than queries, keys and values. When called: a
        bias, attention dropout, several batch axes, a causal call of a variant without causal form or of several
        queries for another number of keys, a full mask in a variant that takes key masks only, a mask that is none.
    """
    return adapt(ATTENTION, name, key, options)


__all__ = [
    "ATTENTION",
    "GLA",
    "HGRN",
    "KDA",
    "MLGRU",
    "S3",
    "S4D",
    "BigBird",
    "Cosformer",
    "Custom",
    "Delta",
    "Fourier",
    "GatedDelta",
    "Hyper",
    "Kernelized",
    "Lev",
    "LevState",
    "LinearAttention",
    "Linformer",
    "Local",
    "Longformer",
    "Mamba2",
    "Mega",
    "Mixer",
    "MultiHead",
    "Nystromformer",
    "Performer",
    "Pool",
    "RetNet",
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
    "custom",
    "delta",
    "fourier",
    "gated_delta",
    "gla",
    "gla_step",
    "hgrn",
    "hyper",
    "kda",
    "kernelized",
    "lev",
    "lev_init",
    "lev_step",
    "linear",
    "linformer",
    "local",
    "longformer",
    "mamba2",
    "mega",
    "nystromformer",
    "performer",
    "pool",
    "retnet",
    "s3",
    "s4d",
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
