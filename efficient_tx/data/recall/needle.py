"""A needle in a haystack: one fact somewhere in a long text (Kamradt 2023; Hsieh et al. 2024, arXiv 2404.06654)."""

import dataclasses

import numpy as np

from efficient_tx.data.recall.draws import distinct, integers
from efficient_tx.data.recall.kind import FIRST, Kind, answered


@dataclasses.dataclass(frozen=True)
class Needle(Kind):
    """`needles` keys, each followed by a word, at random places in a text of random words. The last token is one key.

        inputs  w w w k₁ a w w w w w k₂ b w w … w k₁        label  a at the end

    The answer is the word after this key. All words are equally likely everywhere: only the key marks the needle.

    Args:
      max_len: tokens of every example; 2^20 and more work, in memory linear in it.
      vocab_size: number of token ids; keys are the first half of those after the blank, words the second.
      needles: how many, of which one is asked for.
    """

    vocab_size: int = 66
    needles: int = 1

    def __post_init__(self):
        if self.needles < 1 or 2 * self.needles >= self.max_len:
            raise ValueError(
                f"needles is {self.needles}: with max_len={self.max_len} it must be in [1, {(self.max_len - 1) // 2}]"
            )
        if self.vocab_size < FIRST + 4 or self.first_word - FIRST < self.needles:
            raise ValueError(
                f"vocab_size is {self.vocab_size}: {self.needles} different keys and two words or more need at least "
                f"{FIRST + 2 * max(self.needles, 2)}"
            )

    @property
    def first_word(self) -> int:
        return FIRST + (self.vocab_size - FIRST) // 2

    @property
    def num_classes(self) -> int:
        return self.vocab_size - self.first_word

    def example(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        inputs = integers(rng, self.first_word, self.vocab_size, self.max_len)
        keys = distinct(rng, FIRST, self.first_word, self.needles)
        # A needle takes two places. Draw places among the rest and move each by one for every needle before it: all
        # arrangements are equally likely.
        free = self.max_len - 1 - self.needles
        ranks = np.sort(distinct(rng, 0, free, self.needles))
        places = ranks + np.arange(self.needles)
        inputs[places] = keys
        asked = int(self.needles * rng.random())
        inputs[-1] = keys[asked]
        return answered(inputs, slice(-1, None), inputs[places[asked] + 1] - self.first_word)
