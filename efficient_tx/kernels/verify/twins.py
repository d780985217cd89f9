"""Attention kernels written by hand, one score and its derivative after another: twins of those derived from a Score.

They have the tiling and the layout of the derived ones, and nothing else of them: no mask, as many keys as queries,
heads of 2ⁿ dims, lengths of whole blocks. What a derived kernel costs beyond its twin is the price of deriving it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from efficient_tx.kernels.flash_attention import pallas_gpu, pallas_tpu

SCORES = ("softmax", "sigmoid", "gaussian")
LANES = 128
LEAST = -1e38
# Axes of a product of blocks: x y, x yᵀ.
PLAIN, TRANSPOSED = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))


def gradient(score, platform, sizes, q, k, v, d_out, interpret=False):
    """Output and cotangents of q, k and v, all `[batch, length, heads, dim]`; `sizes` as the derived kernels have."""
    passes = {"tpu": (on_tpu, tpu_forward, tpu_queries, tpu_keys)}
    passes["cuda"] = (on_gpu, gpu_forward, gpu_queries, gpu_keys)
    call, forward, queries, keys = passes[platform]
    call = partial(call, score, sizes, q.shape[-1] ** -0.5, interpret)
    if platform == "tpu":
        q, k, v, d_out = (x.transpose(0, 2, 3, 1) for x in (q, k, v, d_out))
    ours, theirs = {"q": q}, {"k": k, "v": v}
    if score == "gaussian" and platform == "cuda":
        for side, name, x in ((ours, "q", q), (theirs, "k", k)):
            side[f"{name}_norm"] = q.shape[-1] ** -0.5 / 2 * jnp.square(x.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    out, *saved = call(forward, "flash_attention", ours, theirs, like=(q,), statistics=int(score == "softmax"))
    ours["d_out"] = d_out
    if saved:
        axis = {"tpu": 2, "cuda": 3}[platform]
        delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis, keepdims=True)
        ours |= {"saved": saved[0], "delta": delta if platform == "tpu" else delta[..., 0].swapaxes(1, 2)}
    (d_q,) = call(queries, "flash_attention_queries", ours, theirs, like=(q,))
    d_k, d_v = call(keys, "flash_attention_keys", theirs, ours, like=(k, v))
    found = out, d_q, d_k, d_v
    return tuple(x.transpose(0, 3, 1, 2) for x in found) if platform == "tpu" else found


def sizes_of(platform, q):
    """The sizes that the derived kernels choose for themselves."""
    return {"tpu": pallas_tpu, "cuda": pallas_gpu}[platform].sizes(None, q, q, q)


def product(x, y, axes):
    return jax.lax.dot_general(x.astype(y.dtype), y, axes, preferred_element_type=jnp.float32)


def pull(score, s, d_weights, norm, other_norm, saved, delta):
    """The weights of a block and the cotangents of its scaled products `s`, from those of the weights."""
    if score == "softmax":
        weights = jnp.exp(s - saved)
        return weights, weights * (d_weights - delta)
    if score == "sigmoid":
        weights = jax.nn.sigmoid(s)
        return weights, weights * (1 - weights) * d_weights
    weights = jnp.exp(jnp.minimum(s - norm - other_norm, 0))
    return weights, weights * d_weights


# GPUs: a program owns rows of one head, and goes over the columns.


def on_gpu(score, sizes, scale, interpret, kernel, name, ours, theirs, like, statistics=0):
    batch, length, heads, _ = like[0].shape
    rows, columns = (sizes.queries, sizes.keys) if name == "flash_attention" else (sizes.stays, sizes.visits)

    def spec(x):
        if x.ndim == 4:
            return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda i, h, b: (b, 0, h, 0))
        return pl.BlockSpec((None, None, x.shape[2]), lambda i, h, b: (b, h, 0))

    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like]
    results += [jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)] * statistics
    return pl.pallas_call(
        partial(kernel, score, scale, rows, columns, length // columns),
        grid=(length // rows, heads, batch),
        in_specs=[jax.tree.map(spec, ours), jax.tree.map(spec, theirs)],
        out_specs=[spec(x) for x in results],
        out_shape=results,
        compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=interpret,
        name=name,
    )(ours, theirs)


def block_of(refs, number, size):
    at = pl.ds(number * size, size)
    return {name: plgpu.load(ref.at[at, :] if ref.ndim == 2 else ref.at[at]) for name, ref in refs.items()}


def put(ref, x, number):
    at = pl.ds(number * x.shape[0], x.shape[0])
    plgpu.store(ref.at[at, :] if x.ndim == 2 else ref.at[at], x.astype(ref.dtype))


def gpu_forward(score, scale, rows, columns, count, ours, theirs, out, *saved):
    i = pl.program_id(0)
    own = block_of(ours, i, rows)

    def step(j, carry):
        acc, total, peak = carry
        other = block_of(theirs, j, columns)
        s = scale * product(own["q"], other["k"], TRANSPOSED)
        if score == "softmax":
            top = jnp.maximum(peak, s.max(1))
            weights, fade = jnp.exp(s - top[:, None]), jnp.exp(peak - top)
            acc, total, peak = acc * fade[:, None], total * fade + weights.sum(1), top
        elif score == "sigmoid":
            weights = jax.nn.sigmoid(s)
        else:
            weights = jnp.exp(jnp.minimum(s - own["q_norm"][:, None] - other["k_norm"][None], 0))
        return acc + product(weights, other["v"], PLAIN), total, peak

    statistics = (jnp.zeros(rows), jnp.full(rows, LEAST)) if saved else (None, None)
    acc, total, peak = jax.lax.fori_loop(0, count, step, (jnp.zeros((rows, out.shape[1])), *statistics))
    if saved:
        acc = acc / total[:, None]
        put(saved[0], jnp.log(total) + peak, i)
    put(out, acc, i)


def gpu_queries(score, scale, rows, columns, count, ours, theirs, d_q):
    i = pl.program_id(0)
    own = block_of(ours, i, rows)
    at = [own[name][:, None] if name in own else None for name in ("saved", "delta")]

    def step(j, carry):
        acc, norm = carry
        other = block_of(theirs, j, columns)
        s = scale * product(own["q"], other["k"], TRANSPOSED)
        d_weights = product(own["d_out"], other["v"], TRANSPOSED)
        norms = (own["q_norm"][:, None], other["k_norm"][None]) if score == "gaussian" else (None, None)
        _, d_s = pull(score, s, d_weights, *norms, *at)
        return acc + product(d_s, other["k"], PLAIN), None if norm is None else norm + d_s.sum(1)

    norm = jnp.zeros(rows) if score == "gaussian" else None
    acc, norm = jax.lax.fori_loop(0, count, step, (jnp.zeros((rows, d_q.shape[1])), norm))
    put(d_q, scale * (acc if norm is None else acc - own["q"].astype(jnp.float32) * norm[:, None]), i)


def gpu_keys(score, scale, rows, columns, count, ours, theirs, d_k, d_v):
    j = pl.program_id(0)
    own = block_of(ours, j, rows)

    def step(i, carry):
        k_sum, v_sum, norm = carry
        other = block_of(theirs, i, columns)
        s = scale * product(own["k"], other["q"], TRANSPOSED)
        d_weights = product(own["v"], other["d_out"], TRANSPOSED)
        norms = (other["q_norm"][None], own["k_norm"][:, None]) if score == "gaussian" else (None, None)
        at = [other[name][None] if name in other else None for name in ("saved", "delta")]
        weights, d_s = pull(score, s, d_weights, *norms, *at)
        k_sum, v_sum = k_sum + product(d_s, other["q"], PLAIN), v_sum + product(weights, other["d_out"], PLAIN)
        return k_sum, v_sum, None if norm is None else norm + d_s.sum(1)

    zeros = jnp.zeros((rows, d_k.shape[1])), jnp.zeros((rows, d_v.shape[1]))
    norm = jnp.zeros(rows) if score == "gaussian" else None
    k_sum, v_sum, norm = jax.lax.fori_loop(0, count, step, (*zeros, norm))
    put(d_k, scale * (k_sum if norm is None else k_sum - own["k"].astype(jnp.float32) * norm[:, None]), j)
    put(d_v, v_sum, j)


# TPUs: arrays `[batch, heads, dim, length]`; rows are transposed once, the last axis of the grid goes over the columns.


def on_tpu(score, sizes, scale, interpret, kernel, name, ours, theirs, like, statistics=0):
    batch, heads, dim, length = like[0].shape
    backward = name != "flash_attention"
    sizes = (sizes.backward_queries, sizes.backward_keys) if backward else (sizes.queries, sizes.keys)
    rows, columns = sizes[::-1] if name == "flash_attention_keys" else sizes

    def spec(x, size, axis):
        return pl.BlockSpec((None, None, x.shape[2], size), lambda *at: (at[0], at[1], 0, at[axis]))

    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like]
    results += [jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)] * statistics
    number = pltpu.VMEM((rows, LANES), jnp.float32)
    scratch = {f"sum{n}": pltpu.VMEM((rows, dim), jnp.float32) for n in range(len(like))}
    if statistics:
        scratch |= {"total": number, "peak": number}
    if backward and score == "gaussian":
        scratch["norm"] = number
    own = {n: pltpu.VMEM((rows, x.shape[2] if x.shape[2] > 1 else LANES), x.dtype) for n, x in ours.items()}
    return pl.pallas_call(
        partial(tpu_body, kernel, score, scale),
        grid=(batch, heads, length // rows, length // columns),
        in_specs=[{n: spec(x, rows, 2) for n, x in ours.items()}, {n: spec(x, columns, 3) for n, x in theirs.items()}],
        out_specs=[spec(x, rows, 2) for x in results],
        out_shape=results,
        scratch_shapes=[own, scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        interpret=interpret,
        name=name,
    )(ours, theirs)


def tpu_body(kernel, score, scale, ours, theirs, *rest):
    *out, own, sums = rest

    @pl.when(pl.program_id(3) == 0)
    def _():
        for x in sums.values():
            x[...] = jnp.zeros_like(x)
        if "peak" in sums:
            sums["peak"][...] = jnp.full_like(sums["peak"], LEAST)
        for name, ref in ours.items():
            x = ref[...]
            own[name][...] = x.T if x.shape[0] > 1 else jnp.broadcast_to(x, (LANES, x.shape[1])).T

    finish = kernel(score, scale, own, {name: ref[...] for name, ref in theirs.items()}, sums, out)
    pl.when(pl.program_id(3) == pl.num_programs(3) - 1)(finish)


def half_norms(scale, rows, columns):
    """Of rows `[size, dim]` as a column and of columns `[dim, size]` as a row."""
    return tuple(
        scale / 2 * jnp.square(x.astype(jnp.float32)).sum(axis, keepdims=True) for x, axis in ((rows, 1), (columns, 0))
    )


def across(x, width):
    """One number a row, in all of 128 lanes, as `[size, width]`."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def add(ref, x):
    ref[...] += jnp.broadcast_to(x, ref.shape)


def tpu_forward(score, scale, own, other, sums, out):
    q, acc = own["q"][...], sums["sum0"]
    s = scale * product(q, other["k"], PLAIN)
    if score == "softmax":
        peak = sums["peak"][...]
        top = jnp.maximum(peak, s.max(1, keepdims=True))
        weights, fade = jnp.exp(s - across(top, s.shape[1])), jnp.exp(peak - top)
        acc[...] = acc[...] * across(fade, acc.shape[1]) + product(weights, other["v"], TRANSPOSED)
        sums["total"][...] = sums["total"][...] * fade + weights.sum(1, keepdims=True)
        sums["peak"][...] = top
    else:
        q_norm, k_norm = half_norms(scale, q, other["k"])
        weights = jax.nn.sigmoid(s) if score == "sigmoid" else jnp.exp(jnp.minimum(s - q_norm - k_norm, 0))
        acc[...] += product(weights, other["v"], TRANSPOSED)

    def finish():
        if score != "softmax":
            out[0][...] = acc[...].T.astype(out[0].dtype)
            return
        total = sums["total"][...]
        out[0][...] = (acc[...] / across(total, acc.shape[1])).T.astype(out[0].dtype)
        out[1][...] = (jnp.log(total) + sums["peak"][...]).T[:1]

    return finish


def tpu_queries(score, scale, own, other, sums, out):
    q = own["q"][...]
    s, d_weights = scale * product(q, other["k"], PLAIN), product(own["d_out"][...], other["v"], PLAIN)
    at = [across(own[name][...], s.shape[1]) if name in own else None for name in ("saved", "delta")]
    _, d_s = pull(score, s, d_weights, *half_norms(scale, q, other["k"]), *at)
    sums["sum0"][...] += product(d_s, other["k"], TRANSPOSED)
    if "norm" in sums:
        add(sums["norm"], d_s.sum(1, keepdims=True))

    def finish():
        found = sums["sum0"][...]
        if "norm" in sums:
            found -= q.astype(jnp.float32) * sums["norm"][:, :1]
        out[0][...] = (scale * found).T.astype(out[0].dtype)

    return finish


def tpu_keys(score, scale, own, other, sums, out):
    k = own["k"][...]
    s, d_weights = scale * product(k, other["q"], PLAIN), product(own["v"][...], other["d_out"], PLAIN)
    at = other.get("saved"), other.get("delta")
    weights, d_s = pull(score, s, d_weights, *half_norms(scale, k, other["q"]), *at)
    sums["sum0"][...] += product(d_s, other["q"], TRANSPOSED)
    sums["sum1"][...] += product(weights, other["d_out"], TRANSPOSED)
    if "norm" in sums:
        add(sums["norm"], d_s.sum(1, keepdims=True))

    def finish():
        found = sums["sum0"][...]
        if "norm" in sums:
            found -= k.astype(jnp.float32) * sums["norm"][:, :1]
        out[0][...] = (scale * found).T.astype(out[0].dtype)
        out[1][...] = sums["sum1"][...].T.astype(out[1].dtype)

    return finish
