"""Measures: the numbers of a method from which its place is predicted, each with the side on which it is better."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from efficient_tx.config.build import build_model
from efficient_tx.data.batching import first_examples
from efficient_tx.predict.curve import extrapolate
from efficient_tx.predict.short import short_run, steps_of
from efficient_tx.predict.untrained import alignment, approximation, gradsign
from efficient_tx.task import Task
from efficient_tx.training.errors import NonFinite
from efficient_tx.training.objective import objective_of
from efficient_tx.training.summary import parameter_count

# Training examples, the first ones, on which an untrained model is scored.
EXAMPLES = 32


class Measure(NamedTuple):
    """Attributes:
    sign: 1 if more of it is taken to be better, else -1.
    words: what it is.
    """

    sign: int
    words: str


MEASURES = {
    "parameters": Measure(1, "number of parameters"),
    "seen": Measure(1, "validation score after the short run (the accuracy, or how low the loss is)"),
    "validation_loss": Measure(-1, "validation loss after the short run"),
    "mean_loss": Measure(-1, "mean training loss of the short run (Ru et al. 2020, arXiv 2006.04492)"),
    "extrapolated": Measure(-1, "its learning curve, extrapolated to the last step"),
    "gradsign": Measure(1, "agreement of the examples' gradients before training (arXiv 2110.08616)"),
    "alignment": Measure(1, "alignment of the tangent kernel with the labels before training (arXiv 1203.0550)"),
    "error": Measure(-1, "error of the attention against the exact one before training"),
}
# What somebody without a predictor would go by.
TRIVIAL = ("parameters", "seen")


def measure(config: ConfigDict, task: Task, budget: float, say: Callable[[str], None]) -> dict[str, Any]:
    """The MEASURES of a method and what they took; None is one that it does not have.

    Args:
      config: of the whole run; its model starts from new parameters.
      budget: the share of its steps that are taken.

    Returns:
      Also `low` and `high` of the extrapolated loss, `steps`, `seconds` of a step, and `fault`, a line on a run that is
      not finite, which has no more than `parameters`.
    """
    objective, steps = objective_of(task), steps_of(config, budget)
    model = build_model(config, task)
    found: dict[str, Any] = dict.fromkeys(MEASURES) | {"parameters": parameter_count(model), "steps": steps}
    say("scores before training")
    batch = first_examples(task.train, task, EXAMPLES)
    found |= {
        "gradsign": gradsign(model, objective, batch),
        "alignment": alignment(model, batch),
        "error": approximation(model, batch),
    }
    try:
        short = short_run(config, task, model, steps, say)
    except NonFinite as error:
        return found | {"fault": str(error)}
    forecast = extrapolate(short.losses, config.steps)
    score = short.validation[objective.best]
    return found | {
        "seen": score if objective.higher_is_better else -score,
        "validation_loss": short.validation["loss"],
        "mean_loss": float(np.mean(short.losses)),
        "extrapolated": forecast.median,
        "low": forecast.low,
        "high": forecast.high,
        "seconds": short.seconds,
    }
