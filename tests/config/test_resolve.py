"""One resolved config: base < protocol < argument < what was typed, and what departs from the protocol."""

import itertools

import pytest

from efficient_tx.attention import ATTENTION
from efficient_tx.config import ConfigError, check, keys, load, make_config, protocols, resolve

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("protocol", [name for name in protocols.PROTOCOLS if name != "default"])
def test_typed_values_stand_over_the_protocol_in_any_order(protocol):
    typed = {"protocol": protocol, "model.layers": 7, "mixers": "skyformer"}
    results = [
        load.ConfigFile("lra_listops:linformer").resolve(dict(order)) for order in itertools.permutations(typed.items())
    ]
    assert len({result.to_json() for result in results}) == 1
    flat = keys.flatten(results[0])
    assert (flat["model.layers"], flat["mixers"], flat["protocol"]) == (7, "skyformer", protocol)
    published = protocols.settings(protocol, "lra.listops")
    # Options of mixers that the run does not have are nowhere.
    mine = {key: flat[key] for key in published if key in flat and key != "model.layers"}
    assert mine == {key: published[key] for key in mine}
    others = tuple(f"attention.{name}." for name in ATTENTION if name != "skyformer")
    assert all(key == "model.layers" or key.startswith(others) for key in published if key not in mine)


def test_departures_name_what_differs_from_the_protocol():
    def departures(path, **typed):
        file = load.ConfigFile(path)
        return file.departures(file.resolve({key.replace("__", "."): value for key, value in typed.items()}))

    path = "lra_listops:skyformer"
    assert departures(path) == []
    assert departures(path, optimizer__learning_rate=0.1, seed=3, grad_accum=2) == ["optimizer.learning_rate"]
    # Published protocols are about the original files; ours are other expressions of the same distribution.
    assert departures(path, protocol="lra", model__layers=1) == ["model.layers", "task.source"]
    assert departures(path, protocol="skyformer", task__source="/data/lra_release") == []
    # Another way to name the mixer does not change what the protocol is.
    assert departures("lra_listops", protocol="skyformer", mixers="linformer") == ["task.source"]


def test_another_file_does_not_change_what_the_protocol_is():
    config = load.load("quickstart")
    resolved = resolve.resolve(config, {"protocol": "skyformer"})
    assert resolve.departures(resolved, config) == ["task.source"]


@pytest.mark.parametrize(
    ("typed", "key", "fault"),
    [
        ({"protocol": "lar"}, "protocol", "is 'lar': choose one of default, lra, skyformer"),
        ({"attention.softmax.x": 1}, "attention.softmax.x", "the mixers here are skyformer"),
        ({"model.layers": "many"}, "model.layers", "takes a value of type int, not 'many'"),
        ({"mixers": "skyfromer"}, "mixers", "nearest: 'skyformer'"),
        ({"linear.mlp.name": "monrach"}, "linear.mlp.name", "nearest: 'monarch'"),
        ({"model.name": "vit"}, "model.name", "choose one of transformer"),
    ],
)
def test_what_is_wrong_with_a_typed_value_is_said(typed, key, fault):
    with pytest.raises(ConfigError) as caught:
        resolve.resolve(make_config("lra.listops", "skyformer"), typed)
    assert caught.value.key == key and fault in caught.value.fault


def test_the_given_config_stays_as_it_is():
    config = make_config("lra.listops", "skyformer")
    before = config.to_json()
    changed = resolve.resolve(config, {"mixers": "linformer", "protocol": "lra", "steps": 3})
    assert config.to_json() == before and (changed.mixers, changed.steps) == ("linformer", 3)


def test_the_model_may_be_another_one_that_has_options_of_the_same_names():
    """A ViT has one number of features and heads, a pyramid a tuple of them."""
    vit = load.load("vit_fashion:softmax")
    pyramid = resolve.resolve(vit, {"model.name": "pyramid", "task.image_size": 64})
    assert (pyramid.model.features, pyramid.model.dropout) == (None, vit.model.dropout)
    check.check(pyramid)
