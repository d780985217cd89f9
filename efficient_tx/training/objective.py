"""Classification: the default objective of a task."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from efficient_tx.task import Objective, Task


def classification(logits: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Cross-entropy (nats) and correct answers: sums over the rows of a batch, each with the sum of weights.

    Logits are `[B, classes]`, or `[B, L, classes]` if label and weight are `[B, L]`. If the batch has `mix`, the loss
    of an example is mix · loss(label) + (1 − mix) · loss(label2); the correct answer is `label`.
    """
    weight = batch["weight"].astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    if "mix" in batch:
        other = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label2"])
        loss = batch["mix"] * loss + (1 - batch["mix"]) * other
    # Rows of weight 0 only fill up the batch: the loss stays finite for any labels and logits in them.
    loss = jnp.where(weight > 0, loss, 0.0)
    right = jnp.argmax(logits, -1) == batch["label"]
    total = weight.sum()
    return {"loss": ((loss * weight).sum(), total), "accuracy": ((right * weight).sum(), total)}


CLASSIFICATION = Objective(classification, metrics=("accuracy",), best="accuracy", higher_is_better=True)


def objective_of(task: Task) -> Objective:
    """The task's own objective, else classification."""
    return task.objective or CLASSIFICATION
