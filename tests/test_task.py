"""A Task says what it is, or is refused in one line."""

import dataclasses
import pathlib

import numpy as np
import pytest

from efficient_tx.task import Objective, Task, check_sizes

pytestmark = pytest.mark.quick

GOOD = Task((), (), (), kind="image", num_classes=2, vocab_size=None, max_len=6, name="x", source="y")
OBJECTIVE = Objective(None, metrics=(), best="loss", higher_is_better=False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "texts"}, "kind is 'texts': choose one of tokens, token_pairs, image, token_labels"),
        *(
            ({name: value}, f"{name} is {value!r}: it must be a whole number above 0 and below 2^31")
            for name in ("num_classes", "vocab_size", "max_len")
            for value in (0, -1, 2.0, "2", np.float64(2), 10**12)
        ),
        ({"num_classes": None}, "num_classes is None: it must be a whole number"),
        ({"image_shape": (2, 3)}, "image_shape is (2, 3): it must be (height, width, channels)"),
        ({"image_shape": [2, 3, 1]}, "image_shape is [2, 3, 1]: it must be (height, width, channels)"),
        ({"image_shape": (2, 3, 0)}, "image channels is 0: it must be a whole number"),
        ({"name": None}, "name is None: it must be a string"),
        ({"source": pathlib.PurePosixPath("x")}, "source is PurePosixPath('x'): it must be a string"),
        ({"objective": "mse"}, "objective is 'mse': it must be an efficient_tx.task.Objective"),
        ({"baselines": [0.5]}, "baselines is [0.5]: it must be a dict of scores by name"),
        ({"baselines": {"constant": "0.5"}}, "the baseline 'constant' is '0.5': it must be a finite number"),
        ({"baselines": {"constant": np.nan}}, "the baseline 'constant' is nan: it must be a finite number"),
        ({"symbols": "ab"}, "symbols is 'ab': it must be a list of texts, one for each token id"),
        ({"symbols": 5}, "symbols is 5: it must be a list of texts, one for each token id"),
        ({"symbols": ["a", 1]}, "the symbol 1 is no text"),
        ({"vocab_size": 3, "symbols": ["a", "b"]}, "there are 2 symbols: vocab_size is 3"),
    ],
)
def test_a_wrong_attribute_is_one_line(changes, says):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(GOOD, **changes)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["flaot", "str", "bool", None.__class__])
def test_labels_of_an_objective_are_numbers(dtype):
    with pytest.raises(ValueError, match=r"^label_dtype is .*: labels are numbers"):
        dataclasses.replace(OBJECTIVE, label_dtype=dtype)


def test_what_is_right_is_not_refused():
    integers = {"num_classes": np.int64(3), "vocab_size": np.uint8(5), "max_len": 2**20}
    dataclasses.replace(GOOD, **integers, symbols=list("abcde"))
    dataclasses.replace(GOOD, **integers, image_shape=(2, 3, 1), baselines={"one": np.float32(0.5), "two": 1})
    for dtype in ("int32", "uint8", "float32", np.float64):
        dataclasses.replace(GOOD, objective=dataclasses.replace(OBJECTIVE, label_dtype=dtype))


def test_sizes_are_those_that_a_model_needs():
    sizes = {"num_classes": 2, "vocab_size": 5, "max_len": 6}
    check_sizes("tokens", sizes)
    check_sizes("tokens", sizes | {"own_masks": True})
    check_sizes("image", sizes | {"vocab_size": None, "image_shape": (2, 3, 1)})
    for kind, wrong, says in [
        ("tokens", None, "sizes() gives None, not a dict of num_classes, vocab_size, max_len"),
        (
            "tokens",
            {"num_classes": 2, "vocab_size": 5},
            "sizes() gives no max_len, which a model for the kind",
        ),
        ("tokens", sizes | {"vocab_size": None}, "sizes() gives no vocab_size, which a model for the kind 'tokens'"),
        ("image", sizes, "sizes() gives no image_shape, which a model for the kind 'image' needs"),
        ("tokens", sizes | {"length": 3}, "sizes() gives 'length', which no task has: it gives num_classes,"),
    ]:
        with pytest.raises(ValueError) as error:
            check_sizes(kind, wrong)
        assert str(error.value).startswith(says)
