"""eval.py's --set: which config comes out, and that it brings no training example into an evaluation."""

import contextlib
import json
import re

import pytest

from efficient_tx.config import ConfigError, build, evaluation, load, make_config, resolve, stored


@pytest.mark.quick
def test_settings_of_an_evaluation():
    made = make_config("lra.listops", "skyformer", seed=3, model={"head_dim": 16})
    kept = json.loads(made.to_json())
    assert stored.restore(kept).to_json() == made.to_json()
    changed = evaluation.apply_settings(kept, {"attention.skyformer.landmarks": "32"})
    assert changed.attention.skyformer.landmarks == 32
    other = evaluation.apply_settings(kept, {"attention.linformer.rank": "4", "mixers": "linformer"})
    assert other.attention.to_dict() == {"linformer": {"rank": 4, "conv": 0}}
    assert evaluation.apply_settings(kept, {"task.data_dir": "5", "task.drop_brackets": "true"}).task.data_dir == "5"


@contextlib.contextmanager
def refused(key, fault):
    """A ConfigError of this key, whose fault matches."""
    with pytest.raises(ConfigError, match=fault) as caught:
        yield
    assert caught.value.key == key and "--" not in str(caught.value)


def test_no_setting_of_an_evaluation_tests_on_training_examples():
    kept = make_config("lra.listops", "", task={"train_size": 10, "val_size": 4, "test_size": 4}).to_dict()

    def evaluated(split="test", **settings):
        return evaluation.apply_settings(kept, {f"task.{key}": x for key, x in settings.items()}, split).task

    def seed(**settings):
        return evaluated(**settings).seed

    assert seed(test_size="9") == seed(max_len="2000") == 0  # nothing else moves
    far = seed(max_len="300")
    assert far == seed(train_size="5", val_size="9") == seed(val_size="9", split="validation") == 2**31
    assert seed(max_len="300", seed="7") == 7
    assert seed(train_size="5", split="train") == 0  # the first five of those trained on
    with refused("task.val_size", "is 9: training examples would be in the test split, keep 4"):
        evaluated(val_size="9", seed="0")

    texts = make_config("lra.text", "", task={"source": "spam"}).to_dict()
    for key, split in (("val_size", "validation"), ("seed", "validation"), ("seed", "test")):
        with refused(f"task.{key}", f"is 9: training examples would be in the {split} split"):
            evaluation.apply_settings(texts, {f"task.{key}": "9"}, split)
    assert (
        evaluation.apply_settings(texts, {"task.val_size": "9"}).task.val_size == 9
    )  # none of the test split's affair
    assert evaluation.apply_settings(texts, {"task.test_size": "9", "task.max_len": "50"}).task.test_size == 9
    assert evaluation.apply_settings(texts, {"task.source": "/mine", "task.seed": "9"}).task.seed == 9
    with refused("task.source", "names other data, whose test split alone is known to be new"):
        evaluation.apply_settings(texts, {"task.source": "/mine"}, "validation")

    drawn = make_config("lra.pathfinder", "", task={"source": "/mine"}).to_dict()
    for source in ("/mine", "/mine/", "/their/../mine"):
        with refused("task.seed", "is 9: training examples would be in the test split"):
            evaluation.apply_settings(drawn, {"task.source": source, "task.seed": "9"})

    files = make_config("lra.listops", "", task={"source": "/mine"}).to_dict()
    shorter = evaluation.apply_settings(files, {"task.max_len": "900", "task.seed": "3"}).task
    assert (shorter.max_len, shorter.seed) == (900, 3)  # files have splits of their own


def test_no_expression_of_another_length_was_trained_on(tmp_path):
    """Shorter ones of the same stream would be: here all of the test split."""
    options = {
        "train_size": 300,
        "val_size": 5,
        "test_size": 20,
        "min_len": 8,
        "max_len": 40,
        "data_dir": str(tmp_path),
    }
    kept = make_config("lra.listops", "", task=options).to_dict()
    longer = evaluation.apply_settings(kept, {"task.max_len": "90"})
    task, other = build.build_task(stored.restore(kept)), build.build_task(longer)
    trained = {item["inputs"].tobytes() for item in task.train}
    long_enough = [item["inputs"] for item in other.test if len(item["inputs"]) > 20]  # short ones repeat by chance
    assert len(long_enough) > 3 and not any(inputs.tobytes() in trained for inputs in long_enough)


def test_the_model_may_be_another_one_that_has_options_of_the_same_names():
    """A ViT has one number of features and heads, a pyramid a tuple of them."""
    pyramid = resolve.resolve(load.load("vit_fashion:softmax"), {"model.name": "pyramid", "task.image_size": 64})
    back = evaluation.apply_settings(json.loads(pyramid.to_json()), {"model.name": "vit", "model.heads": "2"})
    assert (back.model.features, back.model.heads) == (384, 2)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("attention.skyformer.landmark", "32", "nearest is attention.skyformer.landmarks"),
        ("attention.skyformer.landmarks", "many", "takes a value of type int, not 'many'"),
        ("model.head_dim", "abc", "takes a value of type int, not 'abc'"),
        ("mixers", "skyfromer", "nearest: 'skyformer'"),
        (
            "protocol",
            "skyformer",
            "has no part in an evaluation: it depends on mixers, attention, linear",
        ),
        ("optimizer.learning_rate", "1", "has no part in an evaluation"),
    ],
)
def test_settings_that_an_evaluation_cannot_have_are_named(key, value, words):
    kept = json.loads(make_config("lra.listops", "skyformer").to_json())
    with refused(key, re.escape(words)):
        evaluation.apply_settings(kept, {key: value})
