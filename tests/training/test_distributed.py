"""The same run on 1 device, 4 devices, 2 processes and 4 micro-batches, with dropout and sampling on.

Run as a script, this file is one process of a distributed run: `python test_distributed.py PORT PROCESS`.
"""

import functools
import json
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from efficient_tx.attention import ATTENTION
from efficient_tx.models import Classifier
from efficient_tx.numerics.random import dropout, evaluation_keys, fold, sample_tokens
from efficient_tx.training import metrics
from efficient_tx.training.objective import CLASSIFICATION
from efficient_tx.training.optimizer import make_optimizer
from efficient_tx.training.step import (
    AXIS,
    clear_window,
    init_state,
    make_eval_step,
    make_train_step,
    replicate,
    split_batch,
    train_step,
)

BATCH, LENGTH, VOCAB, CLASSES, STEPS = 16, 12, 17, 10, 4
# Losses of about 3 summed over 16 rows, in another order: a few roundings of 6e-8 each, carried through 4 updates.
CLOSE = {"rtol": 2e-6}


class Sampler(nnx.Module):
    """Embedding, dropout, attention to 4 sampled tokens, mean over the real tokens."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.tokens = nnx.Embed(VOCAB, 16, rngs=rngs)
        self.query = nnx.Linear(16, 16, rngs=rngs)
        self.logits = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, inputs, *, mask, key=None):
        x = dropout(self.tokens(inputs), 0.3, fold(key, 0))
        keys = evaluation_keys(len(inputs)) if key is None else fold(key, 1)
        position, real = sample_tokens(keys, mask, 4)
        landmark = jnp.take_along_axis(x, position[..., None], axis=1)
        score = jnp.where(real[:, None], jnp.einsum("blf,bkf->blk", self.query(x), landmark), -jnp.inf)
        x = x + jnp.einsum("blk,bkf->blf", jax.nn.softmax(score), landmark)
        return self.logits(jnp.where(mask[..., None], x, 0).sum(1) / mask.sum(1)[:, None])


def global_batch(index, rows=BATCH):
    rng = np.random.default_rng(index)
    return {
        "inputs": rng.integers(1, VOCAB, (rows, LENGTH)).astype(np.int32),
        "mask": np.arange(LENGTH) < rng.integers(3, LENGTH + 1, (rows, 1)),
        "label": rng.integers(0, CLASSES, rows).astype(np.int32),
        "weight": rng.choice([0.5, 1.0, 2.0], rows).astype(np.float32),
    }


def local_rows(batch, index, count):
    return {name: array[index::count] for name, array in batch.items()}


def adam():
    return make_optimizer(steps=STEPS, learning_rate=0.01, warmup=2, schedule="constant", eps=1e-3)[0]


@functools.cache
def train(devices=None, grad_accum=1, seed=0, index=0, count=1, model=Sampler):
    """The loss of each step, and the parameters at the end."""
    model, optimizer = model(), adam()
    devices = jax.local_devices() if devices is None else jax.local_devices()[:devices]
    step = make_train_step(
        nnx.split(model)[0], optimizer, seed=seed, grad_accum=grad_accum, devices=devices,
        process_index=index, process_count=count,
    )  # fmt: skip
    state, losses = init_state(model, optimizer), []
    for i in range(STEPS):
        state = step(clear_window(state), split_batch(local_rows(global_batch(i), index, count), devices))
        losses.append(metrics.means(state.window)["loss"])
    assert int(state.step) == STEPS and int(state.bad_step) == -1
    return losses, [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]


ITEMS = 37


def evaluate(devices=None, index=0, count=1):
    """Exact sums over 37 items of weight 1, in batches of 16 filled up with items of weight 0."""
    model = Sampler()
    devices = jax.local_devices() if devices is None else jax.local_devices()[:devices]
    graphdef, params = nnx.split(model)
    step, params = make_eval_step(graphdef, devices=devices), replicate(params, devices)
    total = {"loss": (0.0, 0.0), "accuracy": (0.0, 0.0)}
    for start in range(0, ITEMS, BATCH):
        batch = global_batch(100 + start)
        batch["weight"] = (np.arange(start, start + BATCH) < ITEMS).astype(np.float32)
        total = metrics.add(total, metrics.fetch(step(params, split_batch(local_rows(batch, index, count), devices))))
    return total


def process(port, index):
    """One of two processes with two devices each; prints what it saw."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    losses, params = train(grad_accum=2, index=index, count=2)
    print(json.dumps([losses, [p.tolist() for p in params], evaluate(index=index, count=2)]))


@pytest.fixture(scope="module")
def two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", __file__, str(port), str(index)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs):
        assert worker.returncode == 0, errors
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in outputs]


def same(run, reference):
    np.testing.assert_allclose(run[0], reference[0], **CLOSE)
    for a, b in zip(run[1], reference[1], strict=True):
        # Adam divides small gradients by their own size: their roundings come back as parts of the learning rate.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("devices", "grad_accum"),
    [pytest.param(4, 1, marks=pytest.mark.slow), pytest.param(1, 4, marks=pytest.mark.slow), (2, 2)],
)
def test_devices_and_micro_batches_change_nothing(devices, grad_accum):
    same(train(devices, grad_accum), train(1))


def skyformer():
    return Classifier(
        num_classes=CLASSES,
        vocab_size=VOCAB,
        max_len=LENGTH,
        mixers=[functools.partial(ATTENTION["skyformer"], landmarks=4)],
        features=16,
        mlp_features=32,
        dropout=0.2,
        rngs=nnx.Rngs(0),
    )


@pytest.mark.slow
def test_a_real_model_does_not_notice_either():
    """Dropout everywhere and landmarks drawn anew at each step."""
    same(train(4, 2, model=skyformer), train(1, model=skyformer))


def test_draws_matter_in_these_runs():
    """Another seed moves the losses by far more than the tolerance, so equal losses mean equal draws.

    By chance two seeds may come near each other in one of the four steps, not in most of them.
    """
    losses, _ = train(1, seed=1)
    assert np.median(np.abs(np.array(losses) / train(1)[0] - 1)) > 1e-3


@pytest.mark.slow
def test_a_run_repeats_bit_for_bit():
    first, again = train(4), train.__wrapped__(4)
    assert first[0] == again[0]
    for a, b in zip(first[1], again[1]):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_two_processes_change_nothing(two_processes):
    """Two devices each, two micro-batches on each device."""
    for losses, params, _ in two_processes:
        same((losses, params), train(1))


@pytest.mark.slow
def test_shard_map_gives_the_same():
    model, optimizer = Sampler(), adam()
    parts = {
        "graphdef": nnx.split(model)[0],
        "optimizer": optimizer,
        "objective": CLASSIFICATION,
        "grad_accum": 2,
    }
    step = jax.jit(
        jax.shard_map(
            functools.partial(train_step, **parts),
            mesh=Mesh(np.array(jax.local_devices()), (AXIS,)),
            in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )
    state, losses = init_state(model, optimizer), []
    rows = {"row": np.arange(BATCH, dtype=np.int32), "seed": np.zeros(BATCH, np.uint32)}
    for i in range(STEPS):
        state = step(clear_window(state), {**global_batch(i), **rows})
        losses.append(metrics.means(state.window)["loss"])
    same((losses, jax.tree.leaves(state.params)), train(1))


def expected_sums():
    """(loss, right answers) of the items, by plain numpy."""
    model = Sampler()
    loss = right = 0.0
    for start in range(0, ITEMS, BATCH):
        batch, real = global_batch(100 + start), np.arange(start, start + BATCH) < ITEMS
        logits = np.asarray(model(batch["inputs"], mask=batch["mask"]), np.float64)
        loss += (np.log(np.exp(logits).sum(1)) - logits[np.arange(BATCH), batch["label"]])[real].sum()
        right += (logits.argmax(1) == batch["label"])[real].sum()
    return loss, right


def assert_counted_once(runs):
    loss, right = expected_sums()
    for total in runs:
        assert tuple(total["accuracy"]) == (right, ITEMS) and total["loss"][1] == ITEMS
        assert total["loss"][0] == pytest.approx(loss, rel=1e-6)


def test_evaluation_counts_every_item_once():
    assert_counted_once([evaluate(devices) for devices in (1, 4)])


@pytest.mark.slow
def test_two_processes_count_every_item_once(two_processes):
    assert_counted_once([total for *_, total in two_processes])


if __name__ == "__main__":
    process(int(sys.argv[1]), int(sys.argv[2]))
