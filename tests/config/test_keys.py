"""Dotted keys: finding them, and values of their type."""

import pytest

from efficient_tx.config import ConfigError, keys, make_config

pytestmark = pytest.mark.quick


@pytest.fixture
def config():
    return make_config("lra.listops", "skyformer")


def test_values_are_found_and_set_by_their_dotted_key(config):
    keys.assign(config, "attention.skyformer.landmarks", 7)
    flat = keys.flatten(config)
    assert flat["attention.skyformer.landmarks"] == config.attention.skyformer.landmarks == 7
    assert keys.section_of(config, "model.layers") is config.model
    assert keys.type_of(config, "model.head_dim") is int  # unset, yet of a type


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "7", 7),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("remat", "True", True),
        ("loggers", "tensorboard,wandb", ("tensorboard", "wandb")),
        ("init_from", "5", "5"),
    ],
)
def test_text_becomes_a_value_of_the_keys_type(config, key, text, value):
    assert keys.parse(config, key, text) == value and type(keys.parse(config, key, text)) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "fault"),
    [
        ("steps", "abc", "takes a value of type int, not 'abc'"),
        ("remat", "perhaps", "takes a value of type bool, not 'perhaps'"),
        ("model.head_dim", "abc", "takes a value of type int, not 'abc'"),
        ("optimizer.lr", "1", "is no key: the nearest is optimizer."),
        ("attention.softmax.x", "1", "; the mixers here are skyformer"),
    ],
)
def test_what_is_wrong_is_said_of_its_key(config, key, text, fault):
    with pytest.raises(ConfigError) as caught:
        keys.parse(config, key, text)
    assert caught.value.key == key and fault in caught.value.fault
    assert str(caught.value) == f"config.{key} {caught.value.fault}"


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimizer.learning-rate", "optimizer.learning_rate"),
        ("optimizer.learningRate", "optimizer.learning_rate"),
        ("optimzer.learning_rate", "optimizer.learning_rate"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("optimizer.momentum", "optimizer.b1"),
        ("optimizer.warmup_steps", "optimizer.warmup"),
        ("optimizer.max_grad_norm", "optimizer.clip"),
        ("optimizer.batch_size", "batch_size"),
        ("bs", "batch_size"),
        ("epochs", "steps"),
        ("STEPS", "steps"),
        ("gradient_accumulation_steps", "grad_accum"),
        ("model.d_model", "model.features"),
        ("model.num_layers", "model.layers"),
        ("model.n_head", "model.heads"),
        ("model.max_len", "task.max_len"),
        ("max_len", "task.max_len"),
        ("landmarks", "attention.skyformer.landmarks"),
        ("attention.landmark", "attention.skyformer.landmarks"),
        ("attention.softmax.landmarks", "attention.skyformer.landmarks"),
        ("data.seed", "task.seed"),
    ],
)
def test_the_key_that_was_meant_is_suggested(config, typed, key):
    with pytest.raises(ConfigError, match=rf"is no key: the nearest is {key}(;|$)"):
        keys.section_of(config, typed)


def test_aliases_are_of_keys_and_of_no_two_keys(config):
    known = {key.rpartition(".")[2] for key in keys.flatten(config)}
    aliases = [name for names in keys.ALIASES.values() for name in names.split()]
    assert set(keys.ALIASES) <= known
    assert len(set(aliases)) == len(aliases) and not set(aliases) & known


def test_a_value_of_another_type_is_not_set(config):
    with pytest.raises(ConfigError, match="takes a value of type int, not 'many'") as caught:
        keys.assign(config, "model.layers", "many")
    assert caught.value.key == "model.layers" and config.model.layers != "many"
