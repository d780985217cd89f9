"""What it costs that a kernel is derived from a score: each beside its twin written by hand."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.kernels.flash_attention import flash_attention
from efficient_tx.kernels.verify import twins
from efficient_tx.kernels.verify.program import Kernel, compiled
from efficient_tx.kernels.verify.targets import Target

# Most of what a derived kernel may have, as a multiple of its twin's.
MOST = 1.1
FIGURES = ("instructions", "registers", "spills")
DIMS = (64, 128)
BATCH, LENGTH, HEADS = 2, 4096, 8


class Pair(NamedTuple):
    """A derived kernel and its twin, of one score, head size and target."""

    score: str
    dim: int
    target: str
    derived: Kernel
    twin: Kernel

    def figures(self) -> dict[str, tuple[int, int]]:
        """Of both, those that the platform has."""
        both = {name: (getattr(self.derived, name), getattr(self.twin, name)) for name in FIGURES}
        return {name: pair for name, pair in both.items() if None not in pair}

    def faults(self) -> list[str]:
        """What the derived kernel has more of than it may, a line each."""
        return [
            f"{self.derived.name}, {self.score}, {self.dim} dims, {self.target}: {ours} {name}, by hand {theirs}"
            for name, (ours, theirs) in self.figures().items()
            if ours > MOST * theirs
        ]


def pairs(score: str, dim: int, target: Target) -> Iterator[Pair]:
    """The three kernels of forward and backward, without a mask, in bfloat16."""
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, dim), jnp.bfloat16)

    def derived(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(partial(flash_attention, score=score), q, k, v)
        return out, pull(d_out)

    by_hand = partial(twins.gradient, score, target.platform, twins.sizes_of(target.platform, x))
    ours, theirs = (
        {kernel.name: kernel for kernel in compiled(run, x, x, x, x, target=target).kernels}
        for run in (derived, by_hand)
    )
    for name, kernel in ours.items():
        yield Pair(score, dim, target.name, kernel, theirs[name])
