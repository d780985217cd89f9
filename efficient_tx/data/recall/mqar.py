"""Multi-query associative recall (Arora et al. 2023, Zoology, arXiv 2312.04927)."""

import dataclasses

import numpy as np

from efficient_tx.data.recall.draws import distinct, integers, weighted_distinct
from efficient_tx.data.recall.kind import BLANK, FIRST, Kind, answered


@dataclasses.dataclass(frozen=True)
class Mqar(Kind):
    """`pairs` keys, each followed by its value. Then every key comes again, once; the answer there is its value.

        inputs  k₁ v₁ k₂ v₂ … _ _ k₂ _ _ _ k₁ _        labels  v₂ at the second k₂, v₁ at the second k₁

    After the pairs a key stands at an even distance 2g from their end. The distances differ and are drawn with p(g) ∝
    (g + 1)^(gap_power − 1). The value does not follow the second key, so that a model that sees both directions cannot
    read it. Keys differ within an example, and so do values. Published: 8,192 tokens; lengths 64, 128, 256 and 512 with
    4, 8, 16 and 64 pairs; gap_power 0.01.

    Args:
      max_len: tokens of every example.
      vocab_size: number of token ids; keys are the first half of those after the blank, values the second.
      pairs: key-value pairs to remember.
      gap_power: above 0; 1 is uniform, less puts queries nearer to the pairs.
      noise: the other places hold random tokens, keys and values too, instead of blanks.
    """

    vocab_size: int = 130
    pairs: int = 8
    gap_power: float = 0.01
    noise: bool = False

    def __post_init__(self):
        if self.pairs < 1 or 4 * self.pairs > self.max_len:
            raise ValueError(
                f"pairs is {self.pairs}: with max_len={self.max_len} it must be in [1, {self.max_len // 4}], four "
                "tokens a pair"
            )
        if self.first_value - FIRST < self.pairs:
            raise ValueError(
                f"vocab_size is {self.vocab_size}: {self.pairs} different keys and values need at least "
                f"{2 * self.pairs + FIRST}"
            )
        if not self.gap_power > 0:
            raise ValueError(f"gap_power is {self.gap_power}: it must be above 0; 1 is a uniform gap")

    @property
    def first_value(self) -> int:
        return FIRST + (self.vocab_size - FIRST) // 2

    @property
    def num_classes(self) -> int:
        return self.vocab_size - self.first_value

    def guess(self) -> dict[str, float]:
        """Accuracy of a guess among the values of the example."""
        return {"one of its values": 1 / self.pairs}

    def example(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        keys = distinct(rng, FIRST, self.first_value, self.pairs)
        values = distinct(rng, self.first_value, self.vocab_size, self.pairs)
        start = 2 * self.pairs
        slots = np.arange(1, (self.max_len - start) // 2 + 1)
        queries = start + 2 * weighted_distinct(rng, slots ** (self.gap_power - 1.0), self.pairs)
        inputs = np.full(self.max_len, BLANK, np.int32)
        if self.noise:
            inputs[start:] = integers(rng, FIRST, self.vocab_size, self.max_len - start)
        inputs[:start:2], inputs[1:start:2], inputs[queries] = keys, values, keys
        return answered(inputs, queries, values - self.first_value)
