"""Selective copying (Gu and Dao 2023, Mamba, arXiv 2312.00752)."""

import dataclasses

import numpy as np

from efficient_tx.data.recall.draws import distinct, integers
from efficient_tx.data.recall.kind import BLANK, FIRST, Kind, answered

MARKER = FIRST


@dataclasses.dataclass(frozen=True)
class SelectiveCopy(Kind):
    """`tokens` random tokens at random places among blanks, then as many markers. The answers there are these tokens.

        inputs  _ a _ _ c _ b _ ? ? ?        labels  a c b at the ?

    Published: 16 tokens of an alphabet of 16 with the blank, 4,096 places: max_len 4112, vocab_size 18.

    Args:
      max_len: tokens of every example, markers included.
      vocab_size: number of token ids: the padding, the blank, the marker and the alphabet.
      tokens: number of tokens to copy.
    """

    vocab_size: int = 18
    tokens: int = 16

    def __post_init__(self):
        if self.tokens < 1 or 2 * self.tokens > self.max_len:
            raise ValueError(
                f"tokens is {self.tokens}: with max_len={self.max_len} it must be in [1, {self.max_len // 2}]"
            )
        if self.num_classes < 2:
            raise ValueError(f"vocab_size is {self.vocab_size}: an alphabet of two needs at least {MARKER + 3}")

    @property
    def num_classes(self) -> int:
        return self.vocab_size - MARKER - 1

    def example(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        data = integers(rng, 0, self.num_classes, self.tokens)
        start = self.max_len - self.tokens
        inputs = np.full(self.max_len, BLANK, np.int32)
        inputs[np.sort(distinct(rng, 0, start, self.tokens))] = MARKER + 1 + data
        inputs[start:] = MARKER
        return answered(inputs, slice(start, None), data)
