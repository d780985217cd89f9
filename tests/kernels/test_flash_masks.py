"""The masks of flash_attention against predicates in NumPy, and the blocks that they skip."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.flash_attention import Mask, causal, documents, padding, prefix, window
from efficient_tx.kernels.flash_attention.blocks import Sizes, visits

QUERIES, KEYS = 41, 57
FIRST = KEYS - QUERIES  # the position of the first query
I, J = np.arange(QUERIES)[:, None] + FIRST, np.arange(KEYS)
IDS = np.sort(np.random.default_rng(0).integers(0, 4, size=(2, KEYS)), axis=1)
REAL = np.arange(KEYS) < np.array([[33], [0]])


@dataclasses.dataclass(frozen=True)
class Strided(Mask):
    """A user's own: every nth key."""

    stride: int = 3

    def allowed(self, i, j, q_segment, k_segment):
        return (i - j) % self.stride == 0


@dataclasses.dataclass(frozen=True)
class Marked(Mask):
    """A user's own with segments, and no word of blocks."""

    q_segments: jax.Array
    k_segments: jax.Array

    def allowed(self, i, j, q_segment, k_segment):
        return (q_segment == k_segment) | (k_segment == 0)


OF_QUERIES = IDS[:, FIRST:]
SAME = OF_QUERIES[:, :, None] == IDS[:, None]
# Name -> the mask and its pairs, `[batch or 1, queries, keys]`.
MASKS = {
    "causal": (causal(), J <= I),
    "window": (window(9), abs(I - J) < 9),
    "prefix": (causal() | prefix(20), (J <= I) | (J < 20)),
    "sink": (causal() & (window(12) | prefix(2)), (J <= I) & ((abs(I - J) < 12) | (J < 2))),
    "documents": (documents(OF_QUERIES, IDS), SAME),
    "causal documents": (causal() & documents(OF_QUERIES, IDS), (J <= I) & SAME),
    "padding": (padding(REAL), np.broadcast_to(REAL[:, None], (2, QUERIES, KEYS))),
    "not": (~(window(5) | documents(OF_QUERIES, IDS)), ~((abs(I - J) < 5) | SAME)),
    "strided": (Strided(), (I - J) % 3 == 0),
    "far strided": (Strided(4) & ~window(17), ((I - J) % 4 == 0) & (abs(I - J) >= 17)),
    "marked": (Marked(OF_QUERIES, IDS), SAME | (IDS == 0)[:, None]),
    "all": (~prefix(0), np.ones((QUERIES, KEYS), bool)),
    "none": (prefix(0), np.zeros((QUERIES, KEYS), bool)),
}
EXACT = ("causal", "window", "prefix", "sink", "padding", "strided", "far strided", "all", "none")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.first(1)
def test_equals_attention_to_the_pairs_it_allows(name, monkeypatch):
    """Against the reference with an array of all pairs; the gradients too, in float64."""
    xla = importlib.import_module("efficient_tx.kernels.flash_attention.xla")
    monkeypatch.setattr(xla, "SQUARE", (16, 16))
    monkeypatch.setattr(xla, "TALL", (32, 16))
    mask, pairs = MASKS[name]
    pairs = np.broadcast_to(pairs, (2, QUERIES, KEYS))[:, None]
    r = np.random.default_rng(1)
    arrays = [r.normal(size=(2, *shape)) for shape in ((QUERIES, 2, 4), (KEYS, 1, 4), (KEYS, 1, 3))]
    w = r.normal(size=(2, QUERIES, 2, 3))

    def run(mask, implementation):
        def loss(arrays):
            out = flash_attention(*arrays, mask=mask, implementation=implementation)
            return jnp.vdot(out, w), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)

    with jax.enable_x64(True):
        (_, out), gradients = run(mask, "xla")
        (_, plain), _ = run(mask, "reference")
        (_, expected), wanted = run(pairs, "reference")
    np.testing.assert_allclose(plain, expected, atol=1e-12)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    for ours, theirs in zip(gradients, wanted):
        np.testing.assert_allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize(
    "sizes", [Sizes(QUERIES, KEYS, 8, 16), Sizes(QUERIES, KEYS, 16, 8), Sizes(QUERIES, KEYS, 64, 64)]
)
@pytest.mark.parametrize("name", MASKS)
def test_blocks_that_it_empties_are_skipped_and_those_it_fills_are_not_tested(name, sizes):
    mask, pairs = MASKS[name]
    of_rows, of_columns = visits(mask, sizes)
    for seen, allowed, row_size, column_size in (
        (of_rows, pairs, sizes.query_block, sizes.key_block),
        (of_columns, np.swapaxes(pairs, -1, -2), sizes.key_block, sizes.query_block),
    ):
        allowed = allowed if allowed.ndim == 3 else allowed[None]
        rows, columns = allowed.shape[1:]
        for example in range(len(allowed)):
            of = example if len(seen.full) > 1 else 0
            for row in range(-(-rows // row_size)):
                full, some = int(seen.full[of, row]), int(seen.some[of, row])
                order = np.asarray(seen.order)[of, row, :some].tolist()
                assert len({*order}) == some
                for column in range(-(-columns // column_size)):
                    block = allowed[
                        example,
                        row * row_size : (row + 1) * row_size,
                        column * column_size : (column + 1) * column_size,
                    ]
                    whole = block.all() and block.shape == (row_size, column_size)
                    if block.any():
                        assert column in order
                    if column in order[:full]:
                        assert whole
                    if name in EXACT:
                        assert (column in order) == block.any() and (column in order[:full]) == whole


def test_a_users_mask_is_evaluated_once_for_its_sizes():
    """On the host, where all positions are looked at: not again for the passes, platforms and layers of a program."""
    evaluated = []

    @dataclasses.dataclass(frozen=True)
    class Counted(Mask):
        def allowed(self, i, j, q_segment, k_segment):
            if isinstance(i, np.ndarray):
                evaluated.append((int(i[0, 0]), i.size))
            return (i + j) % 7 != 3

    def trace(batch):
        x = jax.ShapeDtypeStruct((batch, 700, 1, 16), jnp.float32)
        return jax.jit(jax.grad(lambda q, k, v: flash_attention(q, k, v, mask=Counted() & causal()).sum())).trace(
            x, x, x
        )

    trace(1)
    first = len(evaluated)
    trace(2)
    assert len(evaluated) == first > 0
    _, seen = np.unique(evaluated, axis=0, return_counts=True)
    assert seen.max() <= 2  # of one block of queries with blocks of keys of two sizes


def test_lists_of_what_is_known_when_traced_are_no_longer_than_needed():
    """A window's lists are as long as the window is wide, at any length: memory and grid are linear."""
    seen, _ = visits(causal() & window(128), Sizes(65536, 65536, 128, 128))
    assert isinstance(seen.order, np.ndarray) and seen.order.shape == (1, 512, 2)
    mixed, _ = visits(causal() & window(128) & padding(jnp.ones((2, 4096), bool)), Sizes(4096, 4096, 128, 128))
    assert mixed.order.shape == (2, 32, 2)


def test_what_is_padding_may_hold_anything_also_in_a_conjunction():
    r = np.random.default_rng(0)
    q, k, v = (r.normal(size=(2, n, 1, 4)).astype(np.float32) for n in (QUERIES, KEYS, KEYS))
    mask = causal() & padding(REAL)
    clean = flash_attention(q, k, v, mask=mask)
    dirty = [np.where(REAL[..., None, None], x, fill) for x, fill in ((k, np.nan), (v, np.inf))]
    np.testing.assert_array_equal(clean, flash_attention(q, *dirty, mask=mask))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: window(0), "size is 0: it must be at least 1"),
        (lambda: prefix(-1), "size is -1: it must be at least 0"),
        (lambda: padding(np.array([[0.0, 1.0]])), "mask has dtype float"),
        (lambda: documents(np.zeros((2, 5), int), IDS), r"mask has q_segments of shape \(2, 5\)"),
        (lambda: np.ones((2, 5), bool), r"mask has shape \(2, 5\): flash_attention takes the key mask, \(2, 57\)"),
        (lambda: Mask(), "Mask must define allowed"),
    ],
)
def test_what_is_no_mask_is_one_line(make, message):
    arrays = [np.zeros((2, n, 1, 4), np.float32) for n in (QUERIES, KEYS, KEYS)]
    with pytest.raises((ValueError, NotImplementedError), match=message) as error:
        flash_attention(*arrays, mask=make())
    assert "\n" not in str(error.value)
