"""Kind: base class of the generators of recall tasks."""

import dataclasses

import numpy as np

from efficient_tx.checks import at_least

# Token ids: 0 is the padding, which does not occur; 1 is the blank; the others follow.
BLANK, FIRST = 1, 2


@dataclasses.dataclass(frozen=True)
class Kind:
    """A subclass has its options as fields, raises ValueError for options out of range, and implements `example`.

    Args:
      max_len: tokens of every example.

    Attributes:
      vocab_size: token ids are in [1, vocab_size).
      num_classes: answers are in [0, num_classes).
    """

    max_len: int

    def __post_init__(self):
        at_least(1, max_len=self.max_len)

    def guess(self) -> dict[str, float]:
        """Accuracies, by name, of guesses that do not remember the answer."""
        return {}

    def example(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """{"inputs": int32, "label": int32, "weight": float32}, `[max_len]` each."""
        raise NotImplementedError


def answered(inputs: np.ndarray, places: np.ndarray | slice, answers: np.ndarray | int) -> dict[str, np.ndarray]:
    """An example with these answers at `places`, of weight 1; all other tokens have weight 0."""
    label, weight = np.zeros(len(inputs), np.int32), np.zeros(len(inputs), np.float32)
    label[places], weight[places] = answers, 1.0
    return {"inputs": inputs, "label": label, "weight": weight}
