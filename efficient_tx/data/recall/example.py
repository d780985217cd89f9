"""What the examples of all kinds have in common."""

import numpy as np

# Token ids: 0 is the padding, which does not occur; 1 stands where there is nothing to read; the others follow.
BLANK, FIRST = 1, 2


def answered(inputs: np.ndarray, places: np.ndarray | slice, answers: np.ndarray | int) -> dict[str, np.ndarray]:
    """An example with these answers, of weight 1; all other tokens have weight 0."""
    label, weight = np.zeros(len(inputs), np.int32), np.zeros(len(inputs), np.float32)
    label[places], weight[places] = answers, 1.0
    return {"inputs": inputs, "label": label, "weight": weight}
