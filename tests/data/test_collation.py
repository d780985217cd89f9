"""A mistake in an example is one line, before the value could become another one."""

import dataclasses

import numpy as np
import pytest

from efficient_tx.data.batching import check_examples, evaluation_batches, train_batches
from efficient_tx.data.collation import ExampleError, collate
from efficient_tx.task import Objective, Task

pytestmark = pytest.mark.quick

SEED = 5  # with it, the first batch of two examples has them in their order
OBJECTIVE = Objective(None, metrics=("error",), best="error", higher_is_better=False, label_dtype="float32")
COUNTS = dataclasses.replace(OBJECTIVE, label_dtype="int32")
GOOD = {
    "tokens": {"inputs": np.array([3, 1, 2]), "label": 1},
    "token_pairs": {"inputs": np.array([3, 1, 2]), "inputs2": np.array([4]), "label": 1},
    "token_labels": {"inputs": np.array([3, 1, 2]), "label": np.array([0, 1, 2])},
    "image": {"inputs": np.zeros((2, 3, 1), np.float32), "label": 1},
}


def task_of(kind, example, **changes):
    sizes = {"vocab_size": None if kind == "image" else 5, "image_shape": (2, 3, 1) if kind == "image" else None}
    split = [GOOD[kind], example]
    return Task(split, split, split, kind, 3, max_len=6, name="toy", source="made here", **{**sizes, **changes})


MIXED = {"mix": 0.5, "label2": 2}
MASKED = {"own_masks": True}
MISTAKES = [
    # kind, what the second example has in its place, what the task has, what is said
    ("tokens", {"label": 3}, {}, "the label 3: the task's are in [0, 3)"),
    ("tokens", {"label": -1}, {}, "the label -1: the task's are in [0, 3)"),
    ("tokens", {"label": 259}, {}, "the label 259: the task's are in [0, 3)"),
    ("tokens", {"label": 2**32}, {}, "the label 4294967296: the task's are in [0, 3)"),
    ("tokens", {"label": np.int64(2**32 + 1)}, {}, "the label 4294967297: the task's"),
    ("tokens", {"label": 0.7}, {}, "the label 0.7: the task's labels are whole numbers"),
    ("tokens", {"label": np.nan}, {}, "the label nan: the task's labels are whole numbers"),
    ("tokens", {"label": "1"}, {}, "has 'label' of <U1 []: one number"),
    ("tokens", {"label": None}, {}, "has 'label' of object []: one number"),
    ("tokens", {"label": [1]}, {}, "has 'label' of int64 [1]: one number"),
    ("tokens", {"label": 2**33}, {"objective": COUNTS}, "the label 8589934592: the task's are int32"),
    ("tokens", {"label": np.inf}, {"objective": OBJECTIVE}, "the label inf: labels are finite"),
    ("tokens", {"label": 1e300}, {"objective": OBJECTIVE}, "the label 1e+300: labels are finite"),
    ("tokens", {"inputs": [1, 5]}, {}, "the token id 5: the task's are in [0, 5)"),
    ("tokens", {"inputs": [1, -1]}, {}, "the token id -1: the task's are in [0, 5)"),
    ("tokens", {"inputs": np.array([1, 2**32 + 1])}, {}, "the token id 4294967297: the task's"),
    ("tokens", {"inputs": np.array([1, 2**63], np.uint64)}, {}, "the token id 9.2"),  # beside an int64
    ("tokens", {"inputs": [1.0, 0.7]}, {}, "has 'inputs' of float64 [2]: token ids are whole numbers [length]"),
    ("tokens", {"inputs": "abc"}, {}, "has 'inputs' of <U3 []: token ids"),
    ("tokens", {"inputs": [[1, 2]]}, {}, "has 'inputs' of int64 [1, 2]: token ids are whole numbers [length]"),
    ("tokens", {"inputs": [1, [2, 3]]}, {}, "has 'inputs' of lists that differ in length"),
    ("token_labels", {"label": [[0], 1, 2]}, {}, "has 'label' of lists that differ in length"),
    ("tokens", {"inputs": 3}, {}, "has 'inputs' of int64 []: token ids are whole numbers [length]"),
    ("tokens", {"inputs": [1] * 7}, {}, "has 7 tokens, more than task.max_len=6"),
    ("tokens", {"inputs": [0.5, np.nan]}, {"vocab_size": None}, "the input nan: inputs are finite"),
    ("tokens", {"inputs": [[0.5], [1]]}, {"vocab_size": None}, "of float64 [2, 1]: numbers [length] are expected"),
    ("tokens", {"weight": -1}, {}, "the weight -1.0: weights are finite and not negative"),
    ("tokens", {"weight": np.nan}, {}, "the weight nan: weights are finite"),
    ("tokens", {"mask": [True]}, {}, "brings a mask: its task must have own_masks=True"),
    ("tokens", {"inputs2": [1]}, {}, "brings inputs2: its task must have kind='token_pairs'"),
    ("tokens", {"mask": [True] * 2}, MASKED, "has 'mask' of bool [2]: True or False for each of the 3 tokens"),
    ("tokens", {"mask": [1, 0, 1]}, MASKED, "has 'mask' of int64 [3]: True or False for each of the 3 tokens"),
    ("tokens", {"mix": 0.5}, {}, "has no 'label2', but 'inputs', 'label', 'mix'"),
    ("tokens", {**MIXED, "label2": 3}, {}, "the label 3: the task's are in [0, 3)"),
    ("tokens", {**MIXED, "mix": 1.5}, {}, "the mix 1.5: it is a weight in [0, 1]"),
    ("token_pairs", {"inputs2": [5]}, {}, "the token id 5: the task's"),
    ("token_pairs", {"inputs2": ...}, {}, "has no 'inputs2', but 'inputs', 'label'"),
    ("token_labels", {"label": 1}, {}, "has 'label' of int64 []: one number for each of the 3 tokens"),
    ("token_labels", {"label": [1, 2]}, {}, "has 'label' of int64 [2]: one number for each of the 3 tokens"),
    ("token_labels", {"label": [1, 2, 3]}, {}, "the label 3: the task's are in [0, 3)"),
    ("token_labels", {"label": [1, 2, 0.5]}, {}, "the label 0.5: the task's labels are whole numbers"),
    ("token_labels", {"weight": [1, 1]}, {}, "has 'weight' of int64 [2]: one number for each of the 3 tokens"),
    ("image", {"inputs": np.zeros((3, 2, 1))}, {}, "an image of float64 [3, 2, 1]: numbers [2, 3, 1] are expected"),
    ("image", {"inputs": np.zeros((2, 3))}, {}, "an image of float64 [2, 3]: numbers [2, 3, 1] are expected"),
    ("image", {"inputs": np.full((2, 3, 1), np.inf)}, {}, "the pixel inf: pixels are finite"),
    ("image", {"label": 3}, {}, "the label 3: the task's are in [0, 3)"),
]


@pytest.mark.parametrize(("kind", "change", "options", "says"), MISTAKES, ids=[f"{m[0]} {m[3][:40]}" for m in MISTAKES])
def test_a_wrong_example_is_one_line(kind, change, options, says):
    example = {name: part for name, part in (GOOD[kind] | change).items() if part is not ...}
    task = task_of(kind, example, **options)
    # What the task asks of all of its examples, the good one has.
    added = (MIXED if "mix" in change else {}) | ({"mask": np.ones(3, bool)} if task.own_masks else {})
    task.train[0] = task.train[0] | added
    collate(task.train[:1], task)
    with pytest.raises(ExampleError) as error:
        collate(task.train, task)
    assert str(error.value).startswith("an example of toy ") and says in str(error.value)
    assert error.value.row == 1 and "\n" not in str(error.value)
    # So it is said before a run, and in training and evaluation if it could not be known.
    where = "(example 1 of the train split)"
    with pytest.raises(ValueError, match="an example of toy") as before:
        check_examples(task)
    with pytest.raises(ValueError, match="an example of toy") as in_training:
        train_batches(task, batch_size=2, seed=SEED)[0]
    with pytest.raises(ValueError, match="an example of toy") as in_evaluation:
        evaluation_batches(task.train, task, batch_size=2)[0]
    assert {str(e.value) for e in (before, in_training, in_evaluation)} == {f"{error.value} {where}"}


@pytest.mark.parametrize("kind", GOOD)
def test_no_right_example_is_refused(kind):
    check_examples(task_of(kind, GOOD[kind]))


def test_what_is_allowed_beside_the_plain_form():
    plain = collate([{"inputs": np.array([3, 1], np.int64), "label": 1}], task_of("tokens", None))
    other = {"inputs": [3, 1], "label": np.uint8(1), "name": "other keys are the user's own"}
    for example in (other, other | {"label": 1.0}, other | {"inputs": (3, 1), "label": True}):
        batch = collate([example], task_of("tokens", None))
        assert all((batch[key] == plain[key]).all() and batch[key].dtype == plain[key].dtype for key in plain)
    assert collate([{"inputs": [], "label": 0}], task_of("tokens", None))["mask"].sum() == 0
    # Labels of weight 0 may be out of range, as those that mark a token without an answer.
    labels = {"inputs": [1, 2], "label": [-100, 2], "weight": [0, 1]}
    assert collate([labels], task_of("token_labels", None))["label"][0, :2].tolist() == [-100, 2]


class Lazy:
    """A source that is no list: its items are read one by one."""

    def __init__(self, items):
        self.items, self.read = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.read.append(index)
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def test_what_is_known_before_a_run():
    """Of a source that is no list, the first example; a list in whole; and what is no split."""
    good = GOOD["tokens"]
    task = task_of("tokens", good)
    lazy = Lazy([good, good | {"label": 7}])
    check_examples(dataclasses.replace(task, train=lazy, validation=(good, good)))
    assert lazy.read == [0]
    for part, says in [
        ([], "the validation split of toy is empty"),
        (3, "the validation split of toy is a int: it needs len() and [i]"),
        ((good, good | {"label": 7}), "label 7: the task's are in [0, 3) (example 1 of the validation split)"),
        (Lazy([good | {"label": 7}]), "label 7: the task's are in [0, 3) (example 0 of the validation split)"),
        ([*[good] * 999, {}], "an example of toy has no 'inputs', but nothing (example 999 of the validation split)"),
        ([np.arange(3)], "an example of toy is a ndarray, not a dict with inputs and label (example 0 of"),
        (Lazy([KeyError("text")]), "example 0 of the validation split of toy cannot be read: KeyError: 'text'"),
    ]:
        with pytest.raises(ValueError) as error:
            check_examples(dataclasses.replace(task, validation=part))
        assert says in str(error.value) and "\n" not in str(error.value)

    def augment(example, generator):
        raise RuntimeError("lost")

    with pytest.raises(ValueError, match=r"^the examples of toy cannot be augmented: RuntimeError: lost$"):
        check_examples(dataclasses.replace(task, augment=augment))
    with pytest.raises(ValueError, match=r"the mix 2\.0"):
        check_examples(dataclasses.replace(task, augment=lambda example, _: example | {"mix": 2.0, "label2": 1}))


@pytest.mark.parametrize("bucket", [False, True])
def test_an_item_that_cannot_be_read_is_named(bucket):
    good = GOOD["tokens"]
    task = dataclasses.replace(task_of("tokens", good), train=Lazy([good, IndexError("gone\nfor good")]), bucket=bucket)
    line = "^example 1 of the train split of toy cannot be read: IndexError: gone for good$"
    with pytest.raises(ValueError, match=line):
        train_batches(task, batch_size=2, seed=0)[0]
    with pytest.raises(ValueError, match=line):
        evaluation_batches(task.train, task, batch_size=2)[0]
    with pytest.raises(ValueError, match=r"^example 1 of a split of toy cannot"):
        evaluation_batches(Lazy(task.train.items), task, batch_size=2)[0]
