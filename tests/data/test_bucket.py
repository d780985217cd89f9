"""Length bucketing: short batches for short sequences, at the same evaluation results."""

import collections
import dataclasses
import types

import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import Hyper, Skyformer
from efficient_tx.data.batching import SHORTEST_BUCKET, WINDOW, evaluation_batches, train_batches
from efficient_tx.models import Classifier, DualEncoder
from efficient_tx.task import Task
from efficient_tx.training import loop as loop_module
from efficient_tx.training.evaluation import make_evaluate
from tests.support import toy

LONGEST = 300
COUNT = 96


def split(count, pairs=False):
    """Sequences of 1 to 300 tokens; token 0 of item i is i. Every eighth one is longer than 64."""
    generator = np.random.default_rng(0)
    lengths = np.where(np.arange(count) % 8, generator.integers(1, 65, count), generator.integers(65, 301, count))
    examples = []
    for item, length in enumerate(lengths):
        inputs = generator.integers(1, COUNT, length)
        inputs[0] = item
        other = {"inputs2": generator.integers(1, COUNT, 5 + 7 * (item % 16 == 1) * 20)} if pairs else {}
        examples.append({"inputs": inputs, "label": item % 3, **other})
    return examples


def task(kind="tokens", **changes):
    examples = split(COUNT, kind == "token_pairs")
    return dataclasses.replace(Task(*[examples] * 3, kind, 3, COUNT, LONGEST, "toy", "here", bucket=True), **changes)


def longest(batch):
    return max(batch[name].sum(1).max() for name in ("mask", "mask2") if name in batch)


@pytest.mark.parametrize("kind", ["tokens", "token_pairs"])
def test_batches_are_as_long_as_a_power_of_two_that_fits(kind):
    batches = train_batches(task(kind), batch_size=6, seed=0)
    lengths = collections.Counter()
    for step in range(2 * WINDOW):
        batch = batches[step]
        length = batch["inputs"].shape[1]
        lengths[length] += 1
        assert {batch[name].shape[1] for name in batch if batch[name].ndim > 1} == {length}
        assert length in (SHORTEST_BUCKET, 128, 256, LONGEST)
        assert longest(batch) <= length and (length == SHORTEST_BUCKET or 2 * longest(batch) > length)
    # Without sorting, a batch of 6 would be all short in 0.875^6 = 45 % of the cases.
    assert lengths[SHORTEST_BUCKET] > 0.75 * 2 * WINDOW
    assert len(lengths) > 1


def test_a_window_holds_the_items_of_its_epochs():
    """64 batches of 6 are four epochs of 96."""
    batches = train_batches(task(), batch_size=6, seed=0)
    for window in (0, 3):
        steps = [batches[window * WINDOW + i] for i in range(WINDOW)]
        counts = collections.Counter(item for batch in steps for item in batch["inputs"][:, 0].tolist())
        assert counts == dict.fromkeys(range(COUNT), 4)
        lengths = [batch["inputs"].shape[1] for batch in steps]
        assert lengths != sorted(lengths)
    again, other = (train_batches(task(), batch_size=6, seed=seed)[200] for seed in (0, 1))
    np.testing.assert_array_equal(again["inputs"], batches[200]["inputs"])
    assert not np.array_equal(again["inputs"][:, 0], other["inputs"][:, 0])


def test_processes_share_batches_of_one_length():
    parts = [train_batches(task(), batch_size=6, seed=2, process_index=p, process_count=2) for p in range(2)]
    whole = train_batches(task(), batch_size=6, seed=2)
    evaluated = [
        evaluation_batches(task().test, task(), batch_size=10, process_index=p, process_count=2) for p in range(2)
    ]
    everything = evaluation_batches(task().test, task(), batch_size=10)
    for all_rows, shares, steps in ((whole, parts, range(9)), (everything, evaluated, range(10))):
        for step in steps:
            for p, share in enumerate(shares):
                np.testing.assert_array_equal(share[step]["inputs"], all_rows[step]["inputs"][p::2])
                np.testing.assert_array_equal(share[step]["weight"], all_rows[step]["weight"][p::2])


@pytest.mark.parametrize("batch_size", [7, 96, 100])
def test_evaluation_counts_every_item_once(batch_size):
    batches = list(evaluation_batches(task().test, task(), batch_size=batch_size))
    found = [i for batch in batches for i, w in zip(batch["inputs"][:, 0], batch["weight"]) if w]
    assert sorted(found) == list(range(COUNT))
    lengths = [batch["inputs"].shape[1] for batch in batches]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize(
    ("kind", "model", "mixer"),
    [
        pytest.param("tokens", Classifier, Hyper, marks=pytest.mark.slow),
        pytest.param("token_pairs", DualEncoder, Skyformer, marks=pytest.mark.slow),
    ],
)
def test_it_changes_no_evaluation_result(kind, model, mixer):
    """Of mixers that sort, sample and draw landmarks; the accuracies are shares of equal counts."""
    module = model(
        num_classes=3, vocab_size=COUNT, max_len=LONGEST, mixers=[mixer], features=16, layers=1, rngs=nnx.Rngs(0)
    )
    graphdef, params = nnx.split(module)
    results = [
        make_evaluate(graphdef)(params, evaluation_batches(one.test, one, batch_size=16))
        for one in (task(kind), task(kind, bucket=False))
    ]
    assert results[0].count == results[1].count == COUNT
    assert results[0].means["accuracy"] == results[1].means["accuracy"]
    assert results[0].means["loss"] == pytest.approx(
        results[1].means["loss"], rel=1e-6
    )  # float32: other groupings of sums


@pytest.mark.slow
def test_a_run_compiles_each_length_once_and_tells_of_it(tmp_path, capsys):
    examples = [{"inputs": np.full(3 + 97 * (i % 4 == 0), 1 + i % 2), "label": i % 2} for i in range(40)]
    plain = dataclasses.replace(toy.TASK, train=examples, max_len=200)
    loop = toy.make_loop(tmp_path, task=dataclasses.replace(plain, bucket=True), steps=40, eval_every=40)
    loop.run()
    said = capsys.readouterr().out
    assert said.count("with compilation") == 2 and "first step of length" in said
    train = [line for line in loop._history.of("train") if line["examples_per_second"]]
    assert sum(line["seconds"] for line in train) > 0
    assert all(0 <= line["data_seconds"] <= line["seconds"] for line in train)


def test_waiting_for_a_batch_of_a_new_length_counts_as_waiting(tmp_path, monkeypatch):
    """Else the share of data_seconds would be smallest where a window of batches is being prepared."""
    batches = [{"inputs": np.zeros((1, 8, length))} for length in (64, 64, 128, 64)]
    loop = toy.make_loop(tmp_path)
    clock = iter(float(i) for i in range(1000))
    monkeypatch.setattr(loop_module, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(loop, "_train_step", lambda state, batch: state)
    monkeypatch.setattr(loop, "_cost", lambda state, batch: "of no interest here")
    state, stream = np.zeros(()), iter(batches)
    for _ in batches:
        state = loop._advance(state, stream)
    # The clock ticks at every look: a batch that is waited for takes one second, of the second to the fourth step.
    assert loop._watch.data_seconds == 3
    assert loop._watch.steps == 2
