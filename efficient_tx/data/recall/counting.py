"""Parity and counting: tasks that need a state, but no look-up."""

import dataclasses

import numpy as np

from efficient_tx.checks import at_least
from efficient_tx.data.recall.draws import integers
from efficient_tx.data.recall.kind import FIRST, Kind, answered


@dataclasses.dataclass(frozen=True)
class Parity(Kind):
    """Random bits. The answer at every token is the parity of the bits up to it (Hahn 2020, arXiv 1906.06755).

    Args:
      max_len: bits of every example.
    """

    num_classes = 2
    vocab_size = FIRST + 2

    def example(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        bits = integers(rng, 0, 2, self.max_len)
        return answered(FIRST + bits, slice(None), np.cumsum(bits) % 2)


@dataclasses.dataclass(frozen=True)
class Count(Kind):
    """Random symbols. The answer at every token is how often it occurred before, modulo `modulus`.

    The causal form of the histogram of Weiss et al. 2021 (arXiv 2106.06981).

    Args:
      max_len: tokens of every example.
      vocab_size: number of token ids: the padding, the blank and the symbols.
      modulus: number of answers, at least 2.
    """

    vocab_size: int = 10
    modulus: int = 16

    def __post_init__(self):
        super().__post_init__()
        if self.vocab_size <= FIRST:
            raise ValueError(f"vocab_size is {self.vocab_size}: one symbol needs at least {FIRST + 1}")
        at_least(2, modulus=self.modulus)

    @property
    def num_classes(self) -> int:
        return self.modulus

    def example(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        inputs = integers(rng, FIRST, self.vocab_size, self.max_len)
        order = np.argsort(inputs, kind="stable")
        symbols = inputs[order]
        starts = np.searchsorted(symbols, symbols)
        before = np.empty(self.max_len, np.int64)
        before[order] = np.arange(self.max_len) - starts
        return answered(inputs, slice(None), before % self.modulus)
