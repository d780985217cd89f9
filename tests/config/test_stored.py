"""config.json of a run, of this version or an older one, comes back as a config."""

import json

import pytest

from efficient_tx.attention import ATTENTION
from efficient_tx.config import check, evaluation, keys, load, make_config, stored
from efficient_tx.linear import LINEAR

pytestmark = pytest.mark.quick

# config.json as the version before the rearrangement wrote it.
OLD = """
{"attention": {"gla": {"clamp_min": null, "conv": 4, "expand_k": 0.5, "gate_normalizer": 16.0, "gate_rank": 16},
"hyper": {"bits": 7, "block": 32, "chunk": 64, "conv": 0, "samples": 32}, "lev": {"attention": "softmax",
"budget": 32, "conv": 0, "p": 2.0, "recent": null, "rescore": true, "ridge": 1.0}}, "batch_size": 8,
"checkpoint_every": 500, "debug_nans": false, "densify_at": null, "densify_warmup": 100, "dtype": "float32",
"eval_every": 10, "grad_accum": 1, "init_from": null, "keep": 2, "linear": {"mlp": {"blocks": 4, "init":
"variance", "name": "monarch"}, "projections": {"name": "low_rank", "rank": null}}, "log_every": 5, "loggers":
["tensorboard"], "mixers": "gla,lev,hyper", "model": {"causal": false, "dropout": 0.1, "features": 64,
"head_dim": null, "heads": 2, "layers": 3, "mlp": "gelu", "mlp_features": 128, "name": "transformer", "norm":
"layer", "pool": "mean", "positions": "learned"}, "optimizer": {"b1": 0.9, "b2": 0.999, "clip": 1.0, "clip_by":
"norm", "eps": 1e-08, "learning_rate": 0.001, "name": "adamw", "schedule": "cosine", "structured_lr": false,
"warmup": 500, "weight_decay": 0.0}, "protocol": "default", "remat": false, "seed": 0, "steps": 20, "task":
{"bucket": false, "data_dir": null, "drop_brackets": false, "max_len": 300, "min_len": 100, "name":
"lra.listops", "seed": 0, "source": "generated", "test_size": 16, "train_size": 400, "val_size": 16}}
"""


def test_a_run_of_the_version_before_goes_on_and_is_evaluated():
    """Its config means the same: nothing is missing, nothing new; train.py's own for the same command is equal."""
    old = json.loads(OLD)
    back = stored.restore(old)
    new = json.loads(json.dumps(stored.to_store(back)))
    assert (new["optimizer"].pop("window"), new["optimizer"].pop("damping")) == (32, 1e-5)  # have come since
    assert new["attention"]["gla"].pop("expand_v") == 1.0  # likewise
    assert new.pop("lengths") == 1  # likewise
    assert new == old
    check.check(back)
    typed = {key: value for key, value in keys.flatten(back).items() if value is not None}
    assert load.ConfigFile("quickstart:gla,lev,hyper+monarch+low_rank").resolve(typed).to_json() == back.to_json()
    changed = evaluation.apply_settings(old, {"mixers": "softmax", "linear.mlp.blocks": "2"})
    assert (changed.mixers, changed.linear.mlp.blocks, changed.linear.projections.name) == ("softmax", 2, "low_rank")


@pytest.mark.parametrize(
    "argument", ["softmax", "gla,softmax+monarch", "skyformer+low_rank+monarch"], ids=["plain", "hybrid", "structures"]
)
def test_a_config_comes_back_as_it_was(argument):
    config = make_config("lra.listops", argument, loggers=("wandb", "tensorboard"), model={"head_dim": 16})
    back = stored.restore(json.loads(config.to_json()))
    assert back.to_json() == config.to_json()
    assert back.loggers == ("wandb", "tensorboard") and back.get_type("init_from") is str
    check.check(back)


def test_keys_that_have_come_since_get_their_defaults():
    """A run of an older version has no model.name, no densify keys, and fewer options of its mixer."""
    config = json.loads(make_config("lra.listops", "skyformer", steps=7).to_json())
    for key in ("densify_at", "densify_warmup"):
        del config[key]
    del config["model"]["name"], config["attention"]["skyformer"]["conv"]
    back = stored.restore(config)
    assert (back.steps, back.model.name, back.densify_at, back.densify_warmup) == (7, "transformer", None, 100)
    assert back.attention.skyformer.conv == 0


# Section, argument of the config, and the option with its former value.
FORMER = [(f"attention.{name}", name, *item) for name, cls in ATTENTION.items() for item in cls.formerly.items()]
FORMER += [
    (f"linear.{place}", f"softmax+{name}+{name}", *item)
    for place in ("mlp", "projections")
    for name, cls in LINEAR.items()
    for item in cls.formerly.items()
]


@pytest.mark.parametrize(("section", "argument", "option", "value"), FORMER)
def test_options_that_have_come_since_keep_what_an_old_run_computed(section, argument, option, value):
    """A new run gets the default, which is another; and the same command goes on in an old folder."""
    new = make_config("lra.listops", argument)
    old = json.loads(new.to_json())
    del old[section.split(".")[0]][section.split(".")[1]][option]
    key = f"{section}.{option}"
    assert keys.flatten(new)[key] != value
    assert keys.flatten(stored.restore(old))[key] == value
    assert keys.flatten(stored.restore(json.loads(new.to_json())))[key] == keys.flatten(new)[key]
    stored.take_former(new, old, typed={key})
    assert keys.flatten(new)[key] != value
    stored.take_former(new, old)
    assert new.to_json() == stored.restore(old).to_json()
    # What an evaluation chooses anew is new.
    name = argument.split("+")[0]
    plain = json.loads(make_config("lra.listops", "vmean").to_json())
    if section.startswith("attention"):
        assert keys.flatten(evaluation.apply_settings(plain, {"mixers": name}))[key] != value


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({}, r"config\.json has no .*damaged"),
        (
            {"task": {"name": "lra.listops"}},
            r"config\.json has no mixers: it is damaged, or of",
        ),
    ],
)
def test_a_damaged_config_is_named(config, fault):
    with pytest.raises(ValueError, match=fault):
        stored.restore(config)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("mixers", "skyfromer", r"^config\.json: config\.mixers is 'skyfromer': choose one of"),
        ("strides", 3, r"^config\.json: config\.strides is no key: the nearest is "),
        ("loggers", [[1]], r"^config\.json loggers holds \[1\]: it is damaged"),
        ("model", [], r"^config\.json: config\.model "),
        ("steps", 10**30, r"^config\.json steps holds 10{30}: it is damaged"),
        ("mixers", 3, r"^config\.json mixers is 3: it is damaged"),
        ("task", None, r"^config\.json has no task\.name: it is damaged"),
        ("steps", "many", r"^config\.json: config\.steps takes a value of type int, not 'many'$"),
    ],
)
def test_what_this_version_does_not_have_is_named(key, value, fault):
    with pytest.raises(ValueError, match=fault):
        stored.restore(json.loads(make_config("lra.listops", "softmax").to_json()) | {key: value})
