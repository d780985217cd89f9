"""The schema: which keys a config has, and where their defaults come from."""

import pytest

from efficient_tx.config import ConfigError, keys, make_config, schema

pytestmark = pytest.mark.quick


def test_top_level_keys_are_those_of_the_design():
    """And `mixers`, which the design's argument and `--set mixers=` name."""
    design = "seed steps batch_size grad_accum eval_every checkpoint_every log_every keep protocol dtype remat"
    densify = ("densify_at", "densify_warmup")  # which the issue of structured weights adds
    assert set(schema.RUN) == {*design.split(), "init_from", "loggers", "debug_nans", "mixers", *densify, "lengths"}


def test_patterns_and_structures_of_the_argument():
    config = make_config("lra.listops", "softmax*2,linformer+monarch+low_rank")
    assert config.mixers == "softmax*2,linformer"
    assert set(config.attention) == {"softmax", "linformer"}
    assert config.linear.to_dict() == {
        "mlp": {"name": "monarch", "blocks": 4, "init": "variance"},
        "projections": {"name": "low_rank", "rank": None},
    }
    plain = make_config("lra.listops")
    assert (plain.mixers, plain.linear.mlp.name, plain.linear.projections.name) == ("softmax", "dense", "dense")


def test_a_setting_with_an_unknown_key_is_refused():
    with pytest.raises(ConfigError, match=r"is no key: the nearest is model\.layers$") as caught:
        make_config("lra.listops", model={"layer": 3})
    assert caught.value.key == "model.layer"
    with pytest.raises(ConfigError, match=r"^config\.model\.name is 'transfomer'.*nearest: 'transformer'") as caught:
        make_config("lra.listops", model={"name": "transfomer"})
    assert caught.value.key == "model.name"


def test_options_are_the_arguments_that_have_defaults():
    def call(given, *, count: int | None = None, rate=0.5, other=1):
        """Nothing."""

    section = schema.options(call, {"other"})
    assert section.to_dict() == {"count": None, "rate": 0.5}
    assert section.get_type("count") is int


def test_other_names_bring_their_sections_and_keep_what_both_have():
    config = make_config("lra.listops", "skyformer+low_rank", linear={"mlp": {"rank": 3}}, model={"dropout": 0.25})
    config.mixers, config.linear.mlp.name = "linformer", "dense"
    changed = schema.complete(config)
    assert set(changed.attention) == {"linformer"} and changed.linear.mlp.to_dict() == {"name": "dense"}
    assert changed.model.dropout == 0.25
    assert set(keys.flatten(config)) - set(keys.flatten(changed)) >= {"linear.mlp.rank"}  # `config` is as it was


def test_the_same_with_dense_weights():
    config = schema.with_dense_weights(make_config("lra.listops", "gla+monarch+low_rank", steps=7))
    assert (config.steps, config.mixers) == (7, "gla")
    assert config.linear.to_dict() == {"mlp": {"name": "dense"}, "projections": {"name": "dense"}}


def test_owners_are_who_takes_the_keys():
    owners = schema.owners(make_config("lra.listops", "gla,softmax+monarch"))
    assert {key: owner.__name__ for key, owner in owners.items()} == {
        "task": "get_task", "model": "Classifier", "optimizer": "make_optimizer", "attention.gla": "GLA",
        "attention.softmax": "Softmax", "linear.mlp": "Monarch", "linear.projections": "Dense",
    }  # fmt: skip
