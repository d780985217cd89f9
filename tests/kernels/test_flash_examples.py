"""FlexAttention's published examples as scores and masks of a few lines, against plain formulas in float64.

They are those of its paper (Dong et al. 2024, arXiv 2412.05496), of its announcement (pytorch.org/blog/flexattention)
and of its gallery (github.com/meta-pytorch/attention-gym). Not here: paged attention, which is about where keys are
stored; biases of an example, which are no arrays of heads; latent attention, whose rotary part joins q and k.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.flash_attention import SCORES, Mask, Score, causal, documents, padding, prefix, window
from efficient_tx.kernels.flash_attention.options import Options

SIDE, HEADS, DIM = 6, 2, 4
LENGTH = SIDE**2  # tokens of a text, or of a square image


@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """Every nth key of a window."""

    size: int
    dilation: int

    def allowed(self, i, j, q_segment, k_segment):
        return (abs(i - j) <= self.size) & (abs(i - j) % self.dilation == 0)


@dataclasses.dataclass(frozen=True)
class Neighbourhood(Mask):
    """The size × size nearest of an image's patches, row by row (Hassani et al. 2023, arXiv 2204.07143).

    With a tile above 1: tiles of patches, one after another, see tiles (Zhang et al. 2025, arXiv 2502.04507).
    """

    side: int
    size: int
    tile: int = 1

    def allowed(self, i, j, q_segment, k_segment):
        i, j, count, half = i // self.tile**2, j // self.tile**2, self.side // self.tile, self.size // 2
        near = [
            abs(jnp.clip(x, half, count - 1 - half) - y) <= half
            for x, y in ((i // count, j // count), (i % count, j % count))
        ]
        return near[0] & near[1]


@dataclasses.dataclass(frozen=True)
class Morton(Mask):
    """Patches in the order of a Z curve: a patch sees those of at most one row and one column away."""

    def allowed(self, i, j, q_segment, k_segment):
        def every_second_bit(x):
            return (x & 1) | ((x >> 1) & 2) | ((x >> 2) & 4)

        return (abs(every_second_bit(i) - every_second_bit(j)) <= 1) & (
            abs(every_second_bit(i >> 1) - every_second_bit(j >> 1)) <= 1
        )


@dataclasses.dataclass(frozen=True)
class Temporal(Mask):
    """A prompt, then frames: like places in all frames (Xi et al. 2025, arXiv 2502.01776)."""

    prompt: int
    frame: int
    width: int

    def allowed(self, i, j, q_segment, k_segment):
        near = abs((i - self.prompt) % self.frame - (j - self.prompt) % self.frame) < self.width
        return near | (i < self.prompt) | (j < self.prompt)


@dataclasses.dataclass(frozen=True)
class Distance(Score):
    def logits(self, dot, q_norm, k_norm, i, j, head):
        return dot + 0.1 * (i - j)


@dataclasses.dataclass(frozen=True)
class Checkerboard(Score):
    def logits(self, dot, q_norm, k_norm, i, j, head):
        return jnp.where(abs(i - j) % 2 == 1, 0.5 * dot, jnp.where(i == j, 2 * dot, dot))


@dataclasses.dataclass(frozen=True)
class FirstHeadOnly(Score):
    """Of which the first head is plain."""

    slope: float

    def logits(self, dot, q_norm, k_norm, i, j, head):
        return jnp.where(head == 0, dot, dot - self.slope * abs(i - j))


@dataclasses.dataclass(frozen=True)
class CappedAlibi(Score):
    """Two in one: soft-capping, then a bias."""

    slopes: Any
    cap: float

    def logits(self, dot, q_norm, k_norm, i, j, head):
        return self.cap * jnp.tanh(dot / self.cap) - self.slopes * abs(i - j)


@dataclasses.dataclass(frozen=True)
class Scaled(Score):
    """One number for every query, one for every key, one for the head."""

    of_queries: Any
    of_keys: Any
    of_heads: Any

    def logits(self, dot, q_norm, k_norm, i, j, head):
        return self.of_heads * dot * self.of_queries[i] + self.of_keys[j]


class Example(NamedTuple):
    """A score, a mask, and what they say of a pair in other words.

    Attributes:
      logits: of inner products `[heads, queries, keys]`, positions, and the score's arrays, which have two axes more.
      seen: whether query i sees key j of example b, all of them Python's integers; None: every query every key.
    """

    score: Score = SCORES["softmax"]()
    mask: Mask | None = None
    logits: Callable[..., jax.Array] = lambda s, i, j: s
    seen: Callable[[int, int, int], bool] | None = None


def nearest(x: int, size: int, side: int) -> range:
    """The `size` places nearest to x, all of them within 0, ..., side − 1."""
    start = min(max(x - size // 2, 0), side - size)
    return range(start, start + size)


def near_in_image(i: int, j: int, size: int, side: int) -> bool:
    return all(b in nearest(a, size, side) for a, b in zip(divmod(i, side), divmod(j, side)))


def z_curve(place: int) -> tuple[int, int]:
    """Row and column, from the binary digits of a place in turn."""
    digits = f"{place:06b}"
    return int(digits[::2], 2), int(digits[1::2], 2)


def words(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


DOCUMENTS = np.sort(np.random.default_rng(0).integers(0, 4, size=(2, LENGTH)), axis=1)
# Numbers of images between words, whose number is 0; a word is of no image, not even with itself.
IMAGES = np.repeat([[0, 1, 0, 2], [3, 0, 0, 1]], LENGTH // 4, axis=1)
MEDIA = np.cumsum(np.arange(LENGTH) % 10 == 3)[None]  # the image before a text's token; an image is four patches
LENGTHS = (LENGTH, 20)
SLOPES, TABLE = np.array([0.3, 0.05]), words(1, HEADS, 9)
NUMBERS = 1 + 0.3 * words(2, HEADS, LENGTH), words(3, HEADS, LENGTH), np.array([1.2, 0.7])  # of queries, keys, heads

EXAMPLES = {
    "document masking, causal": Example(
        mask=causal() & documents(DOCUMENTS), seen=lambda b, i, j: j <= i and DOCUMENTS[b, i] == DOCUMENTS[b, j]
    ),
    "alibi": Example(
        SCORES["alibi"](SLOPES), causal(), lambda s, i, j, slopes: s + slopes * (j - i), lambda b, i, j: j <= i
    ),
    "neighbourhood attention": Example(
        mask=Neighbourhood(SIDE, 3), seen=lambda b, i, j: near_in_image(i, j, 3, SIDE)
    ),
    "relative bias, sliding window": Example(
        SCORES["relative"](TABLE), causal() & window(9),
        lambda s, i, j, table: s + table[:, 0, 0][:, np.clip(j - i, -4, 4) + 4],
        lambda b, i, j: i - 9 < j <= i,
    ),
    "prefix LM": Example(mask=causal() | prefix(7), seen=lambda b, i, j: j <= i or j < 7),
    "attention sinks": Example(
        mask=causal() & (window(5) | prefix(2)), seen=lambda b, i, j: j <= i and j in {0, 1, *range(i - 4, i + 1)}
    ),
    "dilated window": Example(mask=Dilated(6, 2), seen=lambda b, i, j: j in range(i - 6, i + 7, 2)),
    "sliding tiles": Example(
        mask=Neighbourhood(SIDE, 1, tile=2), seen=lambda b, i, j: near_in_image(i // 4, j // 4, 1, 3)
    ),
    "z curve": Example(
        mask=Morton(), seen=lambda b, i, j: max(abs(x - y) for x, y in zip(z_curve(i), z_curve(j))) <= 1
    ),
    "spatial and temporal heads": Example(
        mask=Temporal(4, 8, 2), seen=lambda b, i, j: min(i, j) < 4 or abs((i - 4) % 8 - (j - 4) % 8) < 2
    ),
    "transfusion": Example(
        mask=causal() | documents(IMAGES - (IMAGES == 0), IMAGES),
        seen=lambda b, i, j: j <= i or IMAGES[b, i] == IMAGES[b, j] > 0,
    ),
    "flamingo": Example(
        mask=documents(MEDIA, np.arange(LENGTH)[None] // 4), seen=lambda b, i, j: j // 4 == MEDIA[0, i]
    ),
    "jagged": Example(
        mask=causal() & padding(np.arange(LENGTH) < np.array(LENGTHS)[:, None]),
        seen=lambda b, i, j: j <= i and j < LENGTHS[b],
    ),
    "distance": Example(Distance(), None, lambda s, i, j: s + (i - j) / 10),
    "soft-capping": Example(SCORES["soft_cap"](0.5), None, lambda s, i, j: 0.5 * jnp.tanh(2 * s)),
    "checkerboard": Example(
        Checkerboard(), ~window(2) | window(1), lambda s, i, j: s * np.where(i == j, 2, 1) * (1 - ((i + j) % 2) / 2),
        lambda b, i, j: abs(i - j) != 1,
    ),
    "of some heads": Example(
        FirstHeadOnly(0.2), None, lambda s, i, j: s - np.array([0, 0.2])[:, None, None] * abs(i - j)
    ),
    "soft-capping and alibi in documents": Example(
        CappedAlibi(SLOPES, 0.7), documents(DOCUMENTS) & window(6),
        lambda s, i, j, slopes: 0.7 * jnp.tanh(s / 0.7) - slopes * np.maximum(i - j, j - i),
        lambda b, i, j: DOCUMENTS[b, i] == DOCUMENTS[b, j] and abs(i - j) < 6,
    ),
    "learnt numbers of queries, keys and heads": Example(
        Scaled(*NUMBERS), causal(),
        lambda s, i, j, of_queries, of_keys, of_heads: of_heads * s * of_queries[:, 0, 0, :, None] + of_keys[:, 0],
        lambda b, i, j: j <= i,
    ),
}  # fmt: skip


def plain(arrays, parameters, example):
    """All pairs at once."""
    q, k, v = arrays
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    s = jnp.einsum("bihd,bjhd->bhij", q, k) / DIM**0.5
    logits = example.logits(s, i, j, *(x[:, None, None] for x in parameters))
    if example.seen is not None:
        seen = [[[example.seen(b, x, y) for y in range(LENGTH)] for x in range(LENGTH)] for b in range(2)]
        logits = jnp.where(np.array(seen)[:, None], logits, -jnp.inf)
    weights = jnp.exp(logits)  # of small inner products
    return jnp.einsum("bhij,bjhd->bihd", weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-300), v)


def value_and_gradients(run, dtype):
    """Of a random sum of the outputs, by q, k, v and the parameters."""
    w = words(7, 2, LENGTH, HEADS, DIM)

    def loss(arrays, parameters):
        out = run(arrays, parameters)
        return jnp.vdot(out, w.astype(dtype)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def check(name, dtype, atol, **options):
    example = EXAMPLES[name]
    arrays = [words(seed, 2, LENGTH, HEADS, DIM) for seed in (4, 5, 6)]
    parameters, tree = jax.tree.flatten(example.score)
    with jax.enable_x64(True):
        expected = value_and_gradients(lambda *of: plain(*of, example), np.float64)(arrays, parameters)

    def ours(arrays, parameters):
        return flash_attention(*arrays, score=jax.tree.unflatten(tree, parameters), mask=example.mask, **options)

    with jax.enable_x64(dtype == np.float64):
        found = value_and_gradients(ours, dtype)(*jax.tree.map(lambda x: x.astype(dtype), (arrays, parameters)))
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected))):
        assert np.isfinite(theirs).all() and np.abs(theirs).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, atol=atol * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.first(1)
def test_blockwise(name, monkeypatch):
    """Several blocks, the last one ragged; sums of 36 terms of order 1 in float64."""
    xla = importlib.import_module("efficient_tx.kernels.flash_attention.xla")
    monkeypatch.setattr(xla, "SQUARE", (16, 16))
    monkeypatch.setattr(xla, "TALL", (32, 16))
    check(name, np.float64, 1e-12, implementation="xla")


KERNELS = {"pallas_tpu": (128, 128, 128, 128), "pallas_gpu": (16, 16, 16, 16, 4)}
BY_KERNELS = ("transfusion", "soft-capping and alibi in documents", "neighbourhood attention")


@pytest.mark.parametrize("name", BY_KERNELS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.slow
def test_in_a_kernel(kernel, name):
    """Interpreted, in float32."""
    sizes = importlib.import_module(f"efficient_tx.kernels.flash_attention.{kernel}").BlockSizes(*KERNELS[kernel])
    check(name, np.float32, 2e-6, implementation=kernel, interpret=True, block_sizes=sizes)


@pytest.mark.quick
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_example_without_a_table_has_kernels(kernel):
    x = jax.ShapeDtypeStruct((2, LENGTH, HEADS, DIM), jnp.float32)
    module = importlib.import_module(f"efficient_tx.kernels.flash_attention.{kernel}")
    options = Options(scale=1.0, bias=0.0, precision=jax.lax.Precision.HIGHEST)
    reasons = {
        name: module.unsupported(options, x, x, x, jax.tree.map(jnp.asarray, example.score), example.mask, None)
        for name, example in EXAMPLES.items()
    }
    refused = {name for name, reason in reasons.items() if reason}
    assert refused == {"relative bias, sliding window", "learnt numbers of queries, keys and heads"}, reasons
