"""Others' attention kernels beside flash_attention: compiled for the same chips, and run on one that is there.

Those of jax itself: for TPUs its flash and its splash attention (both as jax ships them, and flash attention with our
blocks too, as its own of 128 are small), for GPUs the one for Triton. And that of tokamax where it is installed: for a
TPU its splash attention, for a GPU its kernels for Triton, with blocks by its rules, as its tuned ones are of devices
that are there; those of Mosaic ask a GPU for its compute capability, which a described chip does not tell. On a device
also `jax.nn.dot_product_attention`, with cuDNN on a GPU.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.kernels.case import Values
from efficient_tx.kernels.flash_attention import flash_attention
from efficient_tx.kernels.verify.program import Program, compiled
from efficient_tx.kernels.verify.targets import TARGETS

BATCH, LENGTH, HEADS, DIMS = 2, 4096, 8, (64, 128)
BLOCK = 512  # of our kernels on a TPU

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def ours(causal: bool) -> Attention:
    return partial(flash_attention, causal=causal)


def tpu_flash(causal: bool, block: int | None = None) -> Attention:
    from jax.experimental.pallas.ops.tpu import flash_attention as module

    names = (
        "block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv", "block_k_dkv", "block_q_dkv",
        "block_k_major_dq", "block_k_dq", "block_q_dq",
    )  # fmt: skip
    sizes = block and module.BlockSizes(block_b=1, **dict.fromkeys(names, block))

    def attend(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        return module.flash_attention(q, k, v, causal=causal, sm_scale=scale, block_sizes=sizes).swapaxes(1, 2)

    return attend


def tpu_splash(causal: bool) -> Attention:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as module
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def attend(q, k, v):
        length, heads, dim = q.shape[1:]
        one = masks.CausalMask((length, length)) if causal else masks.FullMask((length, length))
        call = module.make_splash_mha(masks.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=1)
        q, k, v = (x.swapaxes(1, 2) for x in (q * dim**-0.5, k, v))
        return jax.vmap(call)(q, k, v).swapaxes(1, 2)

    return attend


def gpu_triton(causal: bool) -> Attention:
    with warnings.catch_warnings():
        # Newer versions of jax point to tokamax, which is here as well.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as module

    return lambda q, k, v: module.mha(q, k, v, None, sm_scale=q.shape[-1] ** -0.5, causal=causal)


def of_tokamax(causal: bool) -> Attention:
    import tokamax
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # or it takes this program's arguments for its own
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns at length that its blocks are not tuned ones
    return partial(tokamax.dot_product_attention, is_causal=causal)


PEERS: dict[str, dict[str, Callable[[bool], Attention]]] = {
    "v5e": {
        "ours": ours,
        "jax flash": tpu_flash,
        f"jax flash, blocks of {BLOCK}": partial(tpu_flash, block=BLOCK),
        "jax splash": tpu_splash,
        "tokamax": of_tokamax,
    },
    "h100": {"ours": ours, "jax Triton": gpu_triton, "tokamax": of_tokamax},
}


# Longer sequences have more weights than an accelerator has memory for.
LONGEST_DENSE = 16384


def beside(operation: str, values: Values, platform: str) -> dict[str, Attention]:
    """What others have for a case on a device of this platform ("cpu", "gpu", "tpu"), by name."""
    known = operation == "flash_attention" and values["score"] == "softmax" and values["keys"] == "all"
    if not known or values["mask"] not in ("none", "causal"):
        return {}
    causal = values["mask"] == "causal"
    found: dict[str, Attention] = {}
    if values["length"] <= LONGEST_DENSE:
        found["jax.nn"] = partial(jax.nn.dot_product_attention, is_causal=causal)
    if platform == "gpu":
        found["cuDNN"] = partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    if "/" not in values["heads"]:  # jax's kernels have as many heads of keys as of queries
        chip = {"gpu": "h100", "tpu": "v5e"}.get(platform, "")
        found |= {name: make(causal) for name, make in PEERS.get(chip, {}).items() if make not in (ours, of_tokamax)}
    if importlib.util.find_spec("tokamax"):
        found["tokamax"] = of_tokamax(causal)
    return found


def gradient(make: Callable[[bool], Attention], causal: bool, dim: int, target: str) -> Program:
    """Output and cotangents of queries, keys and values, in bfloat16."""
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, dim), jnp.bfloat16)

    def run(q, k, v, d_out):
        out, pull = jax.vjp(make(causal), q, k, v)
        return out, pull(d_out)

    # tokamax asks the default device what it is.
    with jax.default_device(TARGETS[target].devices()[0]):
        return compiled(run, x, x, x, x, target=TARGETS[target])


def compared(target: str, progress: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """Yields a row for each peer, mask and head size: its program, or under "failed" why there is none."""
    for dim in DIMS:
        for causal in (False, True):
            for name, make in PEERS[target].items():
                row = {"target": target, "dim": dim, "mask": "causal" if causal else "none", "name": name}
                progress(" ".join(map(str, row.values())))
                try:
                    yield row | {"program": gradient(make, causal, dim, target)}
                except Exception as error:  # of another's kernel: there is no figure
                    yield row | {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"}
