"""Steps at the length that a micro-batch needs, against steps at the full length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION
from efficient_tx.models import Classifier, DualEncoder, TokenClassifier
from efficient_tx.training import metrics
from efficient_tx.training.lengths import at_needed_length, ends, steps_to
from efficient_tx.training.step import clear_window, init_state, make_train_step, split_batch
from tests.support.mixers import SHARED

LENGTH, VOCAB, CLASSES = 96, 17, 10  # computed at 32, 64 or 96
SIZES = {"vocab_size": VOCAB, "max_len": LENGTH, "features": 16, "mlp_features": 32, "layers": 1, "dropout": 0.2}
TOKENS = np.array([5, 96, 40, 31, 32, 64, 33, 2])


def batch_of(tokens, label=(), *, pairs=None):
    rng = np.random.default_rng(0)
    rows = len(tokens)

    def sequences(counts):
        mask = np.arange(LENGTH) < np.asarray(counts)[:, None]
        return np.where(mask, rng.integers(1, VOCAB, (rows, LENGTH)), 0).astype(np.int32), mask

    inputs, mask = sequences(tokens)
    batch = {
        "inputs": inputs,
        "mask": mask,
        "label": rng.integers(0, CLASSES, (rows, *label)).astype(np.int32),
        "weight": mask.astype(np.float32) if label else np.ones(rows, np.float32),
    }
    return batch if pairs is None else batch | dict(zip(("inputs2", "mask2"), sequences(pairs)))


@pytest.mark.quick
def test_lengths_are_few_and_end_with_the_full_one():
    assert steps_to(2000, 4) == [512, 1024, 1504, 2000]
    assert steps_to(96, 3) == [32, 64, 96] and steps_to(96, 1) == [96] and steps_to(20, 8) == [20]
    assert steps_to(65, 2) == [65] and steps_to(130, 4) == [64, 96, 130]
    for length in range(1, 400, 7):
        for count in (1, 2, 5, 100):
            sizes = steps_to(length, count)
            assert 1 <= len(sizes) <= count and sizes[-1] == length
            assert sizes == sorted(set(sizes)) and all(size % 32 == 0 for size in sizes[:-1])


@pytest.mark.quick
def test_an_example_ends_with_the_last_real_or_labelled_token_of_both():
    mask, other = np.zeros((3, 8), bool), np.zeros((3, 8), bool)
    mask[0, [1, 4]] = other[0, 2] = mask[1, 0] = other[1, 7] = True
    examples, tokens = np.ones(3), np.zeros((3, 8))
    tokens[2, 5] = 0.5
    np.testing.assert_array_equal(ends({"mask": mask, "mask2": other, "weight": examples}), [5, 8, 0])
    np.testing.assert_array_equal(ends({"mask": mask, "weight": examples}), [5, 1, 0])
    np.testing.assert_array_equal(ends({"mask": mask, "weight": tokens}), [5, 1, 6])


@pytest.mark.quick
@pytest.mark.parametrize(("longest", "length"), [(0, 32), (1, 32), (32, 32), (33, 64), (64, 64), (65, 96), (96, 96)])
def test_the_shortest_length_that_holds_the_longest_row_is_taken(longest, length):
    batch = batch_of([0, longest], (LENGTH,))
    found = jax.jit(lambda batch: at_needed_length(lambda cut: (cut["inputs"].shape[1], cut["label"].sum()), batch, 3))
    taken, labels = found(batch)
    assert taken == length and labels == batch["label"][:, :length].sum()


@pytest.mark.parametrize(
    ("devices", "grad_accum", "at"),
    [
        pytest.param(1, 4, [32, 32, 64, 96], id="the shortest rows together"),
        pytest.param(2, 2, [32, 96, 32, 64], id="on each device"),
        pytest.param(1, 1, [96], id="one micro-batch"),
    ],
)
def test_micro_batches_hold_rows_of_similar_length(devices, grad_accum, at):
    """A model that breaks the promise, for its output is the length it sees: the loss tells at which ones it ran."""

    class Tells(nnx.Module):
        def __init__(self):
            self.unused = nnx.Param(jnp.zeros(()))

        def __call__(self, inputs, *, mask, key=None):
            ones = jnp.full((len(inputs), 1), inputs.shape[1] / LENGTH) + self.unused[...]
            return jnp.concatenate([ones, jnp.zeros_like(ones)], axis=1)

    model, batch = Tells(), batch_of(TOKENS) | {"label": np.zeros(8, np.int32)}
    local = jax.local_devices()[:devices]
    optimizer = optax.sgd(0.1)
    graphdef = nnx.split(model)[0]
    step = make_train_step(graphdef, optimizer, seed=0, grad_accum=grad_accum, lengths=3, devices=local)
    state = step(init_state(model, optimizer), split_batch(batch, local))
    expected = np.mean(np.log1p(np.exp(-np.array(at) / LENGTH)))
    assert metrics.means(state.window)["loss"] == pytest.approx(expected, rel=1e-6)


def train(build, batch, lengths):
    """The loss of each of two steps, and the parameters at the end."""
    model, devices = build(), jax.local_devices()[:1]
    optimizer = optax.adam(1e-2, eps=1e-3)
    graphdef = nnx.split(model)[0]
    step = make_train_step(graphdef, optimizer, seed=0, grad_accum=4, lengths=lengths, devices=devices)
    state, losses = init_state(model, optimizer), []
    for _ in range(2):
        state = step(clear_window(state), split_batch(batch, devices))
        losses.append(metrics.means(state.window)["loss"])
    return losses, state.params


def assert_nothing_changes(build, batch):
    """Losses are sums of eight rows in another order; Adam divides small gradients by their own size and by 1e-3."""
    (losses, params), (expected, reference) = train(build, batch, 2), train(build, batch, 1)
    np.testing.assert_allclose(losses, expected, rtol=5e-6)
    for ours, theirs in zip(*map(jax.tree.leaves, (params, reference)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=3e-5)


def classifier(name):
    return Classifier(num_classes=CLASSES, **SIZES, mixers=[ATTENTION[name]], rngs=nnx.Rngs(0))


# The others' outputs beside other padding are those of tests/attention/test_promises.py.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "skyformer" else pytest.mark.slow) for name in SHARED]
)
def test_the_length_changes_nothing(name):
    """With dropout, and what a mixer draws in training."""
    assert_nothing_changes(functools.partial(classifier, name), batch_of(TOKENS))


def test_nor_with_a_label_for_each_token():
    def build():
        return TokenClassifier(num_classes=CLASSES, **SIZES, mixers=[ATTENTION["gla"]], causal=True, rngs=nnx.Rngs(0))

    batch = batch_of(TOKENS, (LENGTH,))
    assert_nothing_changes(build, batch)
    # Masks of the examples' own leave out tokens, whose labels count all the same.
    assert_nothing_changes(build, batch | {"mask": batch["mask"] & (np.arange(LENGTH) < 30)})


def test_nor_for_pairs():
    def build():
        return DualEncoder(num_classes=2, **SIZES, mixers=[ATTENTION["softmax"]], rngs=nnx.Rngs(0))

    batch = batch_of(TOKENS, pairs=TOKENS[::-1])
    assert_nothing_changes(build, batch | {"label": batch["label"] % 2})
