"""What a Pallas kernel needs of the listed blocks: what is added to their logits, and the lists of the other direction.

All of it is linear in the number of listed blocks.
"""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.block_attention.options import Options


def added(options: Options, mask: jax.Array | None, blocks: jax.Array, bias: jax.Array | None) -> jax.Array | None:
    """What is added to the logits of every listed key, float32 `[batch, heads or 1, query blocks, n, block_size]`.

    It is the bias, and −inf at masked keys; None without either. The keys beyond the last one are masked if others are.
    """
    if mask is None and bias is None:
        return None
    size = options.block_size
    rows = 0.0 if bias is None else bias
    if mask is not None:
        batch = len(mask)
        real = mask.reshape(batch, -1, size)[jnp.arange(batch)[:, None, None, None], jnp.maximum(blocks, 0)]
        rows = jnp.where(real, rows, -jnp.inf)
    return jnp.broadcast_to(rows, (*rows.shape[:-1], size)).astype(jnp.float32)


def with_repeats(index: jax.Array) -> jax.Array:
    """`index` `[..., steps, slots]` with ~j for −1, where j ≥ 0 is the last index before it in its slot.

    A block that is asked for again is not loaded again.
    """
    step = jax.lax.broadcasted_iota(jnp.int32, index.shape, index.ndim - 2)
    last = jax.lax.cummax(jnp.where(index < 0, 0, step), axis=index.ndim - 2)
    return jnp.where(index < 0, ~jnp.maximum(jnp.take_along_axis(index, last, axis=-2), 0), index)


def by_key_block(blocks: jax.Array, key_blocks: int) -> tuple[jax.Array, jax.Array]:
    """The entries of `blocks` `[..., query blocks, n]` in the order of the key blocks that they list.

    Returns:
      The entries' numbers, int32 `[..., query blocks · n]`, and where those of each key block start, `[..., key_blocks
      + 1]`: entry e is number e % n in the list of query block e // n. Entries of −1 come last.
    """
    *lead, queries, n = blocks.shape
    listed = blocks.reshape(-1, queries * n)
    number = jax.lax.broadcasted_iota(jnp.int32, listed.shape, 1)
    listed, entries = jax.lax.sort((jnp.where(listed < 0, key_blocks, listed), number), num_keys=1)
    starts = jax.vmap(lambda x: jnp.searchsorted(x, jnp.arange(key_blocks + 1)))(listed)
    return entries.reshape(*lead, -1), starts.astype(jnp.int32).reshape(*lead, -1)


def transposed(blocks: jax.Array, key_blocks: int, slots: int) -> tuple[jax.Array, jax.Array]:
    """The lists of the key blocks, which query blocks list them, cut into steps of `slots` entries of one key block.

    Returns:
      The key block of each step in ascending order, int32 `[..., steps]`, every key block at least once; and the
      entries of the steps as in `by_key_block`, `[..., steps, slots]`, −1 for none.
    """
    *lead, queries, n = blocks.shape
    entries, starts = (x.reshape(-1, x.shape[-1]) for x in by_key_block(blocks, key_blocks))
    steps = -(-queries * n // slots) + key_blocks

    def one(entries, starts):
        counts = starts[1:] - starts[:-1]
        each = jnp.maximum(-(-counts // slots), 1)
        first = jnp.cumsum(each) - each
        step = jnp.arange(steps, dtype=jnp.int32)
        key = jnp.searchsorted(first, step, side="right").astype(jnp.int32) - 1
        rank = (step - first[key])[:, None] * slots + jnp.arange(slots)
        found = entries.at[starts[key][:, None] + rank].get(mode="clip")
        return key, jnp.where(rank < counts[key][:, None], found, -1).astype(jnp.int32)

    key, found = jax.vmap(one)(entries, starts)
    return key.reshape(*lead, steps), found.reshape(*lead, steps, slots)
