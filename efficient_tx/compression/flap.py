"""FLAP: channels whose activations fluctuate little are removed, and their mean goes into a bias.

With the inputs x of the layer that reads them and its weight W `[in, out]`, the score of channel c is
Var(x_c) · ‖W_c‖², standardised over the channels of a layer so that layers can be compared (An et al. 2023, arXiv
2312.11983). A head has the mean over its channels.
"""

from collections.abc import Sequence

import numpy as np

from efficient_tx.compression.cutting import Cutting, expand
from efficient_tx.compression.method import Setting
from efficient_tx.compression.model import Heads, Units, bias_of, kernel_of
from efficient_tx.compression.statistics import Inputs
from efficient_tx.linear.replacement import Path, find


def fluctuation(inputs: Inputs, kernel: np.ndarray) -> np.ndarray:
    """The score of each input channel of a layer, Var(x_c) · ‖W_c‖², `[in]`."""
    return inputs.variance * np.sum(kernel**2, axis=1)


def standardised(scores: np.ndarray) -> np.ndarray:
    """(scores − mean) / standard deviation; zeros if all are the same."""
    spread = scores.std()
    return (scores - scores.mean()) / spread if spread > 0 else np.zeros_like(scores)


class Flap(Cutting):
    """Neurons and heads of all layers by one threshold on the standardised fluctuation score.

    A channel that never changes has the score 0 before standardising; removing it changes nothing, because the bias
    takes its mean. As published, the scores of mixers are squared before they are standardised, and what a unit costs
    counts against the budget but not in its rank. One unit of each MLP and mixer stays.
    """

    paper = "An et al. 2023, arXiv 2312.11983"
    computes = "Var(x_c) · ‖W_c‖², means into a bias"
    adds_bias = True

    def order(self, setting: Setting, found: Sequence[Units]) -> list[tuple[Path, np.ndarray]]:
        ranked = []
        for one in found:
            scores = fluctuation(setting.inputs[one.reading], kernel_of(find(setting.model, one.reading)))
            heads = isinstance(one, Heads)
            scores = standardised(scores**2 if heads else scores).reshape(one.count, one.size).mean(1)
            # The best unit of each stays.
            for index in np.argsort(scores, kind="stable")[:-1]:
                ranked.append((scores[index], one.path, np.array([index])))
        ranked.sort(key=lambda entry: entry[0])
        return [(path, indices) for _, path, indices in ranked]

    def correct(self, one: Units, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        layer = find(self.setting.model, one.reading)
        kernel, bias = kernel_of(layer), bias_of(layer)
        channels = expand(kept, one.size)
        gone = np.setdiff1d(np.arange(len(kernel)), channels)
        mean = self.setting.inputs[one.reading].mean
        return kernel[channels], (0 if bias is None else bias) + mean[gone] @ kernel[gone]
