"""What cannot work is refused before a run: one line that names the key, the value and what would work."""

import copy
import itertools

import pytest

from efficient_tx.config import ConfigError, check, keys, load

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("argument", "typed", "key", "words"),
    [
        ("softmax", {"task.name": "lra.text"}, "task.name", ["is 'lra.text'", "choose the task by its config"]),
        ("skyformer", {"model.causal": True}, "attention.skyformer", ["causal"]),
        ("fourier", {"model.positions": "rope"}, "attention.fourier", ["rope"]),
        ("softmax", {"dtype": "float16"}, "dtype", ["is 'float16'", "bfloat16"]),
        ("softmax", {"grad_accum": 5}, "grad_accum", ["is 5: it must divide batch_size 32"]),
        ("softmax", {"lengths": 2000}, "lengths", ["is 2000: it must be at most 32"]),
        ("softmax", {"loggers": ("wand",)}, "loggers", ["is 'wand'", "nearest: 'wandb'"]),
        ("softmax", {"steps": -1}, "steps", ["is -1: it must be at least 0"]),
        ("softmax", {"seed": -1}, "seed", ["is -1: it must be in [0, 2^32)"]),
        ("softmax", {"model.dropout": 0.999999}, "model", ["dropout is 0.999999"]),
        ("softmax", {"model.head_dim": -4}, "model.head_dim", ["is -4"]),
        ("softmax", {"model.heads": 3}, "model.heads", ["is 3", "64 features"]),
        ("softmax", {"model.head_dim": 5, "model.positions": "rope"}, "model.head_dim", ["is 5", "multiple of 2"]),
        ("gla", {"model.head_dim": 6, "model.positions": "rope"}, "attention.gla.expand_k", ["is 0.5", "3 wide"]),
        ("softmax", {"model.positions": "rope2d"}, "attention.softmax", ["rope2d", "2000 is no square"]),
        ("softmax", {"task.max_len": 10**11}, "task.max_len", ["is 100000000000: it must be at most"]),
        ("softmax", {"task.max_len": 2**24 + 1}, "task.max_len", ["is 16777217: it must be at most 16777216"]),
        ("softmax", {"model.layers": 10**9}, "model.layers", ["is 1000000000: it must be at most 1024"]),
        ("softmax", {"model.features": 10**9}, "model.features", ["is 1000000000: it must be at most 16777216"]),
        ("softmax", {"model.heads": 2**30}, "model.heads", ["is 1073741824: it must be at most 16777216"]),
        ("softmax", {"attention.softmax.conv": 10**6}, "attention.softmax", ["is 1000000: it must be at most 256"]),
        ("softmax", {"steps": 2**31}, "steps", ["is 2147483648: it must be at most 2147483647"]),
        ("softmax", {"optimizer.warmup": 2**63}, "optimizer.warmup", ["it must be at most 2147483647"]),
        (
            "softmax",
            {"optimizer.learning_rate": float("inf")},
            "optimizer.learning_rate",
            ["is inf: it must be"],
        ),
        ("softmax", {"optimizer.clip": float("nan")}, "optimizer.clip", ["is nan: it must be a finite number"]),
        ("softmax", {"optimizer.eps": 1e39}, "optimizer.eps", ["is 1e+39: it must be a finite number"]),
        ("softmax", {"task.max_len": 0}, "task.max_len", ["is 0: it must be at least 1"]),
        ("softmax", {"model.features": 0}, "model.features", ["is 0: it must be at least 1"]),
        ("skyformer", {"attention.skyformer.landmarks": 1}, "attention.skyformer.landmarks", ["is 1"]),
        ("softmax+monarch", {"linear.mlp.blocks": 0}, "linear.mlp.blocks", ["is 0"]),
        ("softmax+monarch", {"densify_at": 5000}, "densify_at", ["is 5000", "less than steps=5000"]),
        ("softmax", {"densify_at": 10}, "densify_at", ["is 10", "no weight is structured"]),
        ("softmax+monarch", {"densify_at": 10, "densify_warmup": -1}, "densify_warmup", ["is -1"]),
        ("softmax", {"optimizer.name": "adamm"}, "optimizer.name", ["is 'adamm'", "nearest: 'adam'"]),
        (
            "softmax+monarch",
            {"densify_at": 10, "optimizer.name": "schedule_free_adamw"},
            "optimizer",
            ["schedule_free_adamw", "densify_at"],
        ),
        (
            "softmax",
            {"optimizer.structured_lr": True, "optimizer.name": "sgd"},
            "optimizer.structured_lr",
            ["is True: there is no rule for sgd"],
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place(argument, typed, key, words):
    with pytest.raises(ConfigError) as caught:
        check.check(load.ConfigFile(f"lra_listops:{argument}").resolve(typed))
    assert caught.value.key.startswith(key), caught.value.key
    for word in words:
        assert word in caught.value.fault
    assert "\n" not in str(caught.value) and "--" not in str(caught.value)


def test_lengths_are_of_what_is_padded():
    with pytest.raises(ConfigError, match=r"lengths is 2: images have no padding, use 1$"):
        check.check(load.ConfigFile("vit_fashion").resolve({"lengths": 2}))


@pytest.mark.parametrize(("key", "most"), [("depths", 1024), ("features", 2**24), ("heads", 2**24)])
def test_sizes_of_stages_have_the_limits_of_single_sizes(key, most):
    with pytest.raises(ConfigError, match=rf"^config\.model\.{key} is {most + 1}: it must be at most {most}$"):
        check.check(load.ConfigFile("soft_fashion").resolve({f"model.{key}": (1, most + 1, 1)}))


@pytest.mark.parametrize("name", load.shipped())
def test_no_float_of_any_config_may_be_infinite(name):
    """Whatever the key: no default is, and infinity is refused before anything else is looked at."""
    config = load.ConfigFile(name).resolve({})
    floats = [key for key in keys.flatten(config) if keys.type_of(config, key) is float]
    check.numbers(config)
    for key, value in itertools.product(floats, (float("inf"), float("-inf"), float("nan"), 1e39)):
        changed = copy.deepcopy(config)
        keys.assign(changed, key, value)
        with pytest.raises(ConfigError, match="it must be a finite number") as caught:
            check.numbers(changed)
        assert caught.value.key == key
    assert "optimizer.learning_rate" in floats


def test_a_sum_is_structured():
    check.check(load.ConfigFile("lra_listops:vmean+sum").resolve({"densify_at": 10}))
