"""Batches are a pure function of (seed, step); evaluation counts every item exactly once."""

import collections
import dataclasses

import grain
import numpy as np
import pytest

from efficient_tx.data.batching import collate, evaluation_batches, train_batches
from efficient_tx.task import Task

pytestmark = pytest.mark.quick

LENGTH = 12


def sequence(item):
    """Item `item` of the toy split: a length in 1..LENGTH, the item's number first, zeros among its values."""
    inputs = np.arange(item % LENGTH + 1) % 3
    inputs[0] = item
    return {"inputs": inputs.astype(np.uint8), "label": item % 5}


def toy(count, kind="tokens", example=sequence, **changes):
    split = [example(item) for item in range(count)]
    task = Task(split, split, split, kind, 5, 256, LENGTH, "toy", "made here")
    return dataclasses.replace(task, **changes)


def items(batch):
    return batch["inputs"][:, 0].tolist()


def same(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one
    )


def test_a_batch_is_padded_by_length():
    batch = train_batches(toy(30), batch_size=8, seed=0)[0]
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "inputs": ("int32", (8, LENGTH)),
        "mask": ("bool", (8, LENGTH)),
        "label": ("int32", (8,)),
        "weight": ("float32", (8,)),
    }
    for row, item in enumerate(items(batch)):
        expected = sequence(item)
        length = len(expected["inputs"])
        assert batch["inputs"][row].tolist() == expected["inputs"].tolist() + [0] * (LENGTH - length)
        assert batch["mask"][row].tolist() == [True] * length + [False] * (LENGTH - length)
        assert batch["label"][row] == expected["label"]
        assert batch["weight"][row] == 1.0


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (7, 3), (5, 12), (6, 6), (1, 2)])
def test_every_epoch_holds_each_item_once(count, batch_size):
    batches = train_batches(toy(count), batch_size=batch_size, seed=3)
    stream = [item for step in range(count * 3 // batch_size + 1) for item in items(batches[step])]
    epochs = [stream[start : start + count] for start in range(0, 3 * count, count)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 3
    assert count < 5 or (epochs[0] != epochs[1] != epochs[2] != list(range(count)))


def test_shuffling_is_uniform():
    # Where item 0 of 4 stands in 4,000 epochs: 1,000 each, standard deviation sqrt(4000 x 1/4 x 3/4) = 27.
    batches = train_batches(toy(4), batch_size=4, seed=1)
    places = collections.Counter(items(batches[step]).index(0) for step in range(4000))
    assert all(abs(places[place] - 1000) < 4 * 27.4 for place in range(4))


def test_a_batch_depends_on_the_seed_and_the_step_only():
    task = toy(50)
    batches, again = (train_batches(task, batch_size=8, seed=5) for _ in range(2))
    late = again[1000]  # asked for first
    assert all(same(batches[step], again[step]) for step in (0, 6, 7, 40))
    assert same(batches[1000], late)
    other = train_batches(task, batch_size=8, seed=6)
    shifted = [items(batches[step]) for step in range(20)]
    assert not any(items(other[step]) in shifted for step in range(3))


def test_the_order_stays_as_it_is():
    # Not an oracle but a seal: who has to change these numbers changes what a resumed run goes on with.
    batches = train_batches(toy(20), batch_size=6, seed=0)
    assert items(batches[0]) == [17, 6, 11, 14, 3, 8]
    assert items(batches[3]) == [13, 0, 15, 14, 12, 16]
    assert items(batches[10**6]) == [7, 3, 4, 0, 6, 19]


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_share_the_global_batch(processes):
    whole = train_batches(toy(20), batch_size=6, seed=2)
    parts = [
        train_batches(toy(20), batch_size=6, seed=2, process_index=process, process_count=processes)
        for process in range(processes)
    ]
    for step in (0, 3, 11):
        for process, part in enumerate(parts):
            mine = {key: value[process::processes] for key, value in whole[step].items()}
            assert same(part[step], mine)


@pytest.mark.parametrize(("threads", "buffered"), [(0, 0), (1, 4), (3, 5), (16, 50)])
@pytest.mark.parametrize("start", [0, 17])
def test_prefetching_and_resuming_change_nothing(threads, buffered, start):
    batches = train_batches(toy(20), batch_size=6, seed=2)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffered)
    iterator = iter(batches[start:].to_iter_dataset(options))
    assert all(same(next(iterator), batches[step]) for step in range(start, start + 25))


@pytest.mark.parametrize("count", [1, 5, 11, 12, 13])
@pytest.mark.parametrize(("batch_size", "processes"), [(4, 1), (4, 2), (6, 3), (24, 2)])
def test_evaluation_counts_every_item_once(count, batch_size, processes):
    task = toy(count)
    parts = [
        evaluation_batches(task.test, task, batch_size=batch_size, process_index=process, process_count=processes)
        for process in range(processes)
    ]
    assert {len(part) for part in parts} == {-(-count // batch_size)}
    found = []
    for part in parts:
        for batch in part:
            assert len(batch["inputs"]) == batch_size // processes
            assert batch["mask"].any(1).all()  # a filler is a real example
            assert set(batch["weight"]) <= {0.0, 1.0}
            found += [item for item, weight in zip(items(batch), batch["weight"]) if weight]
    assert sorted(found) == list(range(count))


def test_nothing_to_evaluate_is_no_batch():
    task = toy(0)
    assert list(evaluation_batches(task.test, task, batch_size=4)) == []


def test_pairs():
    task = toy(30, "token_pairs", lambda item: sequence(item) | {"inputs2": sequence(29 - item)["inputs"]})
    batch = train_batches(task, batch_size=7, seed=0)[1]
    second = collate([{"inputs": sequence(29 - item)["inputs"], "label": 0} for item in items(batch)], toy(1))
    np.testing.assert_array_equal(batch["inputs2"], second["inputs"])
    np.testing.assert_array_equal(batch["mask2"], second["mask"])
    assert batch["label"].shape == (7,)


def test_an_example_may_bring_its_mask():
    def example(item):
        one = sequence(item)
        return one | {"mask": one["inputs"] > 1}

    task = dataclasses.replace(toy(30, example=example), own_masks=True)
    batch = train_batches(task, batch_size=5, seed=0)[1]
    np.testing.assert_array_equal(batch["mask"], batch["inputs"] > 1)
    assert ((batch["inputs"] == 1).any(), batch["positions"].dtype) == (True, np.int32)
    np.testing.assert_array_equal(batch["positions"], [range(LENGTH)] * 5)
    assert "positions" not in collate([sequence(3)], toy(1))
    with pytest.raises(ValueError, match="an example of toy brings a mask: its task must have own_masks=True"):
        collate([example(3)], toy(1))


@pytest.mark.parametrize("weighted", [False, True])
def test_labels_per_token(weighted):
    def example(item):
        inputs = sequence(item)["inputs"]
        labels = {"inputs": inputs, "label": inputs % 4 + 1}
        return labels | {"weight": np.arange(len(inputs)) * 0.5} if weighted else labels

    task = toy(5, "token_labels", example)
    (batch,) = evaluation_batches(task.test, task, batch_size=6)
    np.testing.assert_array_equal(batch["label"], np.where(batch["mask"], batch["inputs"] % 4 + 1, 0))
    expected = np.where(batch["mask"], np.arange(LENGTH) * 0.5 if weighted else 1.0, 0.0)
    expected[5] = 0.0
    np.testing.assert_array_equal(batch["weight"], expected)
    assert (batch["label"].dtype, batch["weight"].dtype) == (np.int32, np.float32)


def test_an_example_may_carry_its_weight():
    task = toy(5, example=lambda item: sequence(item) | {"weight": item / 4})
    (batch,) = evaluation_batches(task.test, task, batch_size=6)
    assert batch["weight"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 0.0]


def test_real_valued_sequences_and_images():
    signal = np.linspace(-1, 1, 7)
    task = toy(2, example=lambda item: {"inputs": signal, "label": 1}, vocab_size=None)
    batch = collate(task.train, task)
    assert batch["inputs"].dtype == np.float32
    np.testing.assert_array_equal(batch["inputs"][1], np.append(signal, np.zeros(5)).astype(np.float32))
    images = np.random.default_rng(0).random((3, 4, 5, 3), np.float32)
    task = toy(3, "image", lambda item: {"inputs": images[item], "label": item}, vocab_size=None)
    batch = collate(task.train, task)
    np.testing.assert_array_equal(batch["inputs"], images)
    assert batch.keys() == {"inputs", "label", "weight"}


def test_a_row_is_augmented_alike_on_any_number_of_processes():
    """And differently in another row, step or run; evaluation sees the example as it is."""

    def augment(example, generator):
        mixed = {"mix": generator.random(), "label2": generator.integers(5)}
        return {"inputs": example["inputs"], "label": example["label"], **mixed}

    task = toy(20, augment=augment)
    whole = train_batches(task, batch_size=6, seed=1)
    parts = [train_batches(task, batch_size=6, seed=1, process_index=p, process_count=2) for p in range(2)]
    for step in (5, 0, 3):
        for p, part in enumerate(parts):
            assert same(part[step], {key: value[p::2] for key, value in whole[step].items()})
    assert (whole[0]["mix"].dtype, whole[0]["label2"].dtype) == (np.float32, np.int32)
    other = train_batches(task, batch_size=6, seed=2)
    draws = np.concatenate([batches[step]["mix"] for batches in (whole, other) for step in range(50)])
    assert len(set(draws.tolist())) == len(draws)
    assert abs(draws.mean() - 0.5) < 4 * 0.012  # 600 uniform draws: standard deviation 1/sqrt(12 x 600)
    assert items(whole[0]) == items(train_batches(toy(20), batch_size=6, seed=1)[0])
    assert "mix" not in evaluation_batches(task.train, task, batch_size=6)[0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_size": 0, "seed": 0}, "batch_size=0"),
        ({"batch_size": 7, "seed": 0, "process_count": 2}, "batch_size=7: must be a positive multiple of the 2"),
        ({"batch_size": 4, "seed": 0, "process_index": 2, "process_count": 2}, r"process_index=2: must be in \[0, 2\)"),
        ({"batch_size": 4, "seed": -1}, "seed is -1: it must be at least 0"),
    ],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        train_batches(toy(3), **settings)


def test_wrong_examples_are_named():
    with pytest.raises(ValueError, match="train split of toy is empty"):
        train_batches(toy(0), batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"an example of toy has 12 tokens, more than task.max_len=11"):
        train_batches(toy(20, max_len=11), batch_size=20, seed=0)[0]
