"""A task of Long Range Arena in a training loop of your own: plain JAX and optax, no trainer and no module system.

Command:   python examples/reuse_task_jax.py
Needs:     `pip install '.[data]'`
Duration:  ten seconds on 2 CPU cores
Expected:  test accuracy 0.58 on a ListOps of at most 23 tokens, one seed; the best constant answer has 0.13, the best
           guess from the root operator 0.30
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before jax is imported: its CPU solvers and XLA share the cores

import jax
import jax.numpy as jnp
import optax

from efficient_tx.attention import softmax
from efficient_tx.data.batching import evaluation_batches, train_batches
from lra import listops

FEATURES, HEADS, STEPS = 64, 4, 400


def init(key, task):
    draw = iter(jax.random.split(key, 8))

    def normal(*shape, scale):
        return scale * jax.random.normal(next(draw), shape)

    inner = FEATURES**-0.5
    return {
        "tokens": normal(task.vocab_size, FEATURES, scale=1.0),
        "positions": normal(task.max_len, FEATURES, scale=1.0),
        "qkv": normal(3, FEATURES, HEADS, FEATURES // HEADS, scale=inner),
        "up": normal(2 * FEATURES, FEATURES, scale=inner),
        "head": jnp.zeros((FEATURES, task.num_classes)),
    }


def logits_of(parameters, inputs, mask):
    """One layer of attention, the mean of the real tokens, and a hidden layer: `[batch, classes]`."""
    x = parameters["tokens"][inputs] + parameters["positions"]
    q, k, v = jnp.einsum("blf,pfhd->pblhd", x, parameters["qkv"])
    attended = softmax(q, k, v, mask=mask).reshape(x.shape)  # a function of the package, or any of yours
    x = jnp.concatenate([x, attended], -1) @ parameters["up"]
    x = jnp.where(mask[..., None], jax.nn.gelu(x), 0).sum(1) / mask.sum(1)[:, None]
    return x @ parameters["head"]


def main():
    # Generated on first use, under $EFFICIENT_TX_DATA; sizes as in the arena are the defaults.
    task = listops.get_task(train_size=20_000, val_size=500, test_size=1000, min_len=4, max_len=24)
    batches = train_batches(task, batch_size=64, seed=0)  # batch i is a function of the seed and i: arrays of numpy
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 5e-3, 50, STEPS))
    parameters = init(jax.random.key(0), task)
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters, state, inputs, mask, label):
        def loss_of(parameters):
            logits = logits_of(parameters, inputs, mask)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        loss, gradients = jax.value_and_grad(loss_of)(parameters)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, loss

    for number in range(STEPS):
        batch = batches[number]
        parameters, state, loss = step(parameters, state, batch["inputs"], batch["mask"], batch["label"])
        if number in (0, STEPS - 1):
            print(f"step {number + 1}: loss {loss:.3f}")

    right = count = 0.0
    predict = jax.jit(logits_of)
    for batch in evaluation_batches(task.test, task, batch_size=250):
        answers = predict(parameters, batch["inputs"], batch["mask"]).argmax(-1)
        right += ((answers == batch["label"]) * batch["weight"]).sum()  # rows of weight 0 fill up the last batch
        count += batch["weight"].sum()
    to_beat = ", ".join(f"{name} {score:.3f}" for name, score in task.baselines.items())
    print(f"test accuracy {right / count:.3f}; to beat: {to_beat}")


if __name__ == "__main__":
    main()
