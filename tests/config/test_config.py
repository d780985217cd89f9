"""Configs: precedence, protocols, one line for every mistake, and no key that nothing reads."""

import hashlib
import json
import subprocess
import sys
from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from efficient_tx.attention import ATTENTION
from efficient_tx.config import build, check, keys, load, make_config, names, protocols, resolve, schema
from efficient_tx.data.batching import evaluation_batches, train_batches
from efficient_tx.linear import LINEAR
from efficient_tx.training.stages import enter
from efficient_tx.training.step import init_state, make_train_step, split_batch
from tests.support import ROOT

SHIPPED = sorted(path.name for path in (ROOT / "configs").glob("*.py") if "\ndef get_config(" in path.read_text())

TINY = {
    "batch_size": 8,
    "steps": 3,
    "task": {"train_size": 64, "val_size": 8, "test_size": 8, "min_len": 3, "max_len": 24},
    "model": {"features": 8, "heads": 2, "mlp_features": 8, "layers": 1},
}


@pytest.fixture(autouse=True)
def data(tmp_path_factory, monkeypatch):
    """One data folder for the whole file, outside the user's own."""
    monkeypatch.setenv("EFFICIENT_TX_DATA", str(tmp_path_factory.getbasetemp() / "data"))
    monkeypatch.chdir(ROOT)


@cache
def parsed(*arguments):
    """The resolved config that train.py would use for these arguments, in a process of its own, or its error."""
    program = (
        "import sys; from absl import app; from ml_collections import config_flags; from configs import resolve\n"
        "config_flags.DEFINE_config_file('config')\n"
        "app.run(lambda _: print(resolve.run_config().to_json()), flags_parser=resolve.parse_flags)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


LISTOPS = "--config=configs/lra_listops.py:skyformer"


@pytest.mark.parametrize("protocol", [name for name in protocols.PROTOCOLS if name != "default"])
def test_protocols_give_the_same_config_in_any_order_of_flags(protocol):
    flag, override = f"--config.protocol={protocol}", "--config.model.layers=7"
    orders = [(LISTOPS, flag, override), (override, flag, LISTOPS), (flag, LISTOPS, override)]
    results = [parsed(*order) for order in orders]
    assert {code for code, _, _ in results} == {0}
    first, *others = (json.loads(out) for _, out, _ in results)
    assert others == [first, first]
    assert first["model"]["layers"] == 7
    assert first["mixers"] == "skyformer"
    flat = keys.flatten(ConfigDict(first))
    published = protocols.settings(protocol, "lra.listops")
    # Options of mixers that the run does not have are nowhere.
    mine = {key: flat[key] for key in published if key in flat and key != "model.layers"}
    assert mine == {key: published[key] for key in mine}
    others = tuple(f"attention.{name}." for name in ATTENTION if name != "skyformer")
    assert all(key == "model.layers" or key.startswith(others) for key in published if key not in mine)


def test_departures_name_what_differs_from_the_protocol():
    path = "configs/lra_listops.py:skyformer"

    def departures(path, **typed):
        typed = {key.replace("__", "."): value for key, value in typed.items()}
        return resolve.departures(resolve.resolve(load.load(path), typed), path)

    assert departures(path) == []
    assert departures(path, optimizer__learning_rate=0.1, seed=3, grad_accum=2) == ["optimizer.learning_rate"]
    # Published protocols are about the original files; ours are other expressions of the same distribution.
    assert departures(path, protocol="lra", model__layers=1) == ["model.layers", "task.source"]
    assert departures(path, protocol="skyformer", task__source="/data/lra_release") == []
    # Another file, or another way to name the mixer, does not change what the protocol is.
    assert departures("configs/quickstart.py", protocol="skyformer") == ["task.source"]
    assert departures("configs/quickstart.py", protocol="skyformer", mixers="linformer") == ["task.source"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/lra_listops.py:skyfromer"], ["'skyfromer'", "nearest: 'skyformer'"]),
        ([], ["--config is missing"]),
        (
            [LISTOPS, "--config.optimizer.learning_rat=1"],
            ["optimizer.learning_rat", "nearest is optimizer.learning_rate"],
        ),
        ([LISTOPS, "--config.steps=abc"], ["steps", "type int", "'abc'"]),
        ([LISTOPS, "--config.model.head_dim=abc"], ["model.head_dim", "type int", "'abc'"]),
        ([LISTOPS, "--config.model.heads=3"], ["config.model.heads is 3", "64 features"]),
        ([LISTOPS, "--confg.steps=1"], ["confg.steps"]),
        (
            ["--config=configs/recall.py:fourier", "--config.attention.fourier.conv=4"],
            ["there is no key attention.fourier.conv", "the mixers here are fourier"],
        ),
        (
            ["--config=configs/recall.py", "--config.task.kind=copy", "--config.task.pairs=4"],
            ["config.task: pairs is 4, an option of kind 'mqar': 'copy' has max_len, vocab_size, tokens"],
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, words):
    code, out, error = parsed(*arguments)
    assert (code, out, error.count("\n")) == (2, "", 1)
    for word in words:
        assert word in error


def test_patterns_and_structures_of_the_argument():
    config = make_config("lra.listops", "softmax*2,linformer+monarch+low_rank")
    assert names.parse_mixers(config.mixers) == ["softmax", "softmax", "linformer"]
    assert set(config.attention) == {"softmax", "linformer"}
    assert config.linear.to_dict() == {
        "mlp": {"name": "monarch", "blocks": 4, "init": "variance"},
        "projections": {"name": "low_rank", "rank": None},
    }
    plain = make_config("lra.listops")
    assert (plain.mixers, plain.linear.mlp.name, plain.linear.projections.name) == ("softmax", "dense", "dense")


def test_typed_names_bring_their_sections():
    code, out, error = parsed(
        "--config.linear.mlp.blocks=2", "--config.linear.mlp.name=monarch", "--config.attention.linformer.rank=8",
        "--config.mixers=linformer", "--config", "configs/quickstart.py",
    )  # fmt: skip
    assert (code, error) == (0, "")
    config = json.loads(out)
    assert config["attention"] == {"linformer": {"rank": 8, "conv": 0}}
    assert config["linear"]["mlp"] == {"name": "monarch", "blocks": 2, "init": "variance"}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_builds_under_each_of_its_protocols(name):
    config = load.load(f"configs/{name}")
    for protocol, tasks in protocols.PROTOCOLS.items():
        if protocol == "default" or protocols.key(config.task) in tasks:
            check.check(resolve.resolve(config, {"protocol": protocol}))
    text = (ROOT / "configs" / name).read_text()
    assert all(word in text for word in ("Command:", "Hardware:", "Expected:"))


# Another value for each key where doubling a number or flipping a switch is none.
OTHER = {
    "mixers": "linformer",
    "dtype": "bfloat16",
    "model.features": 16,
    "model.heads": 4,
    "model.head_dim": 8,
    "model.dropout": 0.5,
    "model.pool": "cls",
    "model.positions": "none",
    "model.norm": "rms",
    "model.mlp": "swiglu",
    "linear.mlp.name": "dense",
    "linear.projections.name": "dense",
    "linear.projections.rank": 1,
    "linear.mlp.init": "published",
    "attention.skyformer.inverse": "iteration",
    "attention.skyformer.landmarks": 4,
    "attention.lev.budget": 4,
    "attention.lev.attention": "polynomial",
    "attention.lev.recent": 4,
    "attention.skyformer.choice": "segments",
    "attention.linformer.rank": 4,
    "attention.performer.random_features": 8,
    "attention.gla.clamp_min": -0.01,
    "attention.hyper.block": 4,
    "attention.hyper.chunk": 8,
    "attention.tensor.window": 4,
    "attention.tensor.window2": 4,
    "attention.sigmoid.layer_scale": 0.1,
    "attention.pool.kind": "max",
    "attention.nystromformer.landmarks": 4,
    "attention.skeinformer.columns": 4,
    "attention.skeinformer.pilots": 4,
    "attention.s3.rows": 2,
    "attention.s3.groups": 4,
    "attention.soft.landmarks": 4,
    "attention.soft.bottleneck": "convolution",
    "attention.soft.inverse": "iteration",
    "attention.soft.value_conv": 3,
    "attention.sparse.pattern": "fixed",
    "optimizer.name": "lion",
    "optimizer.schedule": "rsqrt",
    "optimizer.clip_by": "value",
    "optimizer.b1": 0.5,
    "optimizer.b2": 0.5,
    "optimizer.weight_decay": 0.1,
    "grad_accum": 2,
    "batch_size": 4,
    "densify_at": 2,
}
# Keys that act together with others only.
CONTEXT = {
    "attention.soft.iterations": {"attention.soft.inverse": "iteration"},
    "attention.skyformer.iterations": {"attention.skyformer.inverse": "iteration"},
    "attention.lev.recent": {"model.causal": True},
    "attention.lev.ridge": {"model.causal": True},
    "attention.lev.rescore": {"model.causal": True},
    "attention.sparse.summary": {"attention.sparse.pattern": "fixed"},
    "model.causal": {"mixers": "softmax"},
    "densify_warmup": {"densify_at": 2},
    # Sequences not longer than the block or, if causal, the chunk are attended to exactly.
    "attention.hyper.samples": {"attention.hyper.block": 4},
    "attention.hyper.bits": {"attention.hyper.block": 4},
    "attention.hyper.chunk": {"attention.hyper.block": 4, "model.causal": True},
}
# The same for the options of weight structures, by structure.
STRUCTURE_OTHER = {
    "low_rank.rank": 1,
    "monarch.init": "published",
    "block_tensor_train.rank": 3,
    "blast.rank": 3,
    "low_rank_plus_sparse.rank": 2,
    "low_rank_plus_sparse.pattern": "top",
    "low_rank_plus_sparse.density": 0.5,
    "dense_shift.bits": 2,
}
STRUCTURE_CONTEXT = {"low_rank_plus_sparse.density": {"linear.mlp.pattern": "top"}}
# Keys whose effect is another output, not another step: tests/test_train.py and tests/test_listops.py look at these.
OUTPUTS = {
    "task.name",
    "model.name",  # tokens have one model; tests/test_vision.py looks at images
    "task.source",
    "protocol",
    "eval_every",
    "checkpoint_every",
    "log_every",
    "keep",
    "loggers",
    "debug_nans",
    "init_from",
    "task.data_dir",
}


def alternative(key, value):
    if key in OTHER:
        return OTHER[key]
    return (not value) if isinstance(value, bool) else 2 * value + 1


def fingerprint(config):
    """Of three training steps: the programs, where they start from and what they are fed, the test set included."""
    check.check(config)
    task = build.build_task(config)
    model = build.build_model(config, task)
    stages, _ = build.build_stages(config, model)
    device = jax.local_devices()[:1]
    batches = train_batches(task, batch_size=config.batch_size, seed=config.seed)
    state, seen = init_state(model, stages[0].optimizer), hashlib.sha256()
    for before, stage in zip([stages[0], *stages], stages):
        state = state if stage is before else enter(state, before, stage)
        graphdef = nnx.split(stage.model)[0]
        step = make_train_step(
            graphdef, stage.optimizer, seed=config.seed, grad_accum=config.grad_accum, devices=device
        )
        seen.update(step.lower(state, split_batch(batches[0], device)).as_text().encode())
    tests = evaluation_batches(task.test, task, batch_size=8)
    validations = evaluation_batches(task.validation, task, batch_size=8)
    fed = [batches[i] for i in range(3)] + [split[i] for split in (tests, validations) for i in range(len(split))]
    for leaf in [*jax.tree.leaves(state.params), *jax.tree.leaves(fed)]:
        seen.update(np.asarray(leaf).tobytes())
    return seen.hexdigest()


def base_config(argument):
    config = make_config("lra.listops", argument, **TINY)
    config.attention.skyformer.landmarks = 8
    return config


@cache
def base_fingerprint(argument, context=()):
    return fingerprint(resolve.resolve(base_config(argument), dict(context)))


KEYS = [key for key in keys.flatten(base_config("skyformer+monarch+low_rank")) if key not in OUTPUTS]


# One of each section is asked at once, all others by the slow tests.
QUICK = (
    "batch_size",
    "task.max_len",
    "model.layers",
    "optimizer.warmup",
    "attention.skyformer.landmarks",
    "linear.mlp.blocks",
)


@pytest.mark.parametrize("key", [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in KEYS])
def test_no_key_is_dead(key):
    argument = "skyformer+monarch+low_rank"
    value = alternative(key, keys.flatten(base_config(argument))[key])
    context = CONTEXT.get(key, {})
    changed = resolve.resolve(base_config(argument), {**context, key: value})
    assert fingerprint(changed) != base_fingerprint(argument, tuple(context.items()))


def test_the_fingerprint_of_one_config_is_the_same_twice():
    argument = "skyformer+monarch+low_rank"
    assert fingerprint(base_config(argument)) == base_fingerprint(argument)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION)
def test_no_option_of_a_variant_is_dead(name):
    config = make_config("lra.listops", name, **TINY)
    for option, value in schema.options(ATTENTION[name], schema.GIVEN["mixer"]).items():
        key = f"attention.{name}.{option}"
        # conv is MultiHead's own and looked at in skyformer, but where projections are made otherwise.
        if key not in KEYS and (option != "conv" or name in ("gla", "s3")):
            context = CONTEXT.get(key, {})
            changed = resolve.resolve(config, {**context, key: alternative(key, value)})
            assert fingerprint(changed) != variant_fingerprint(name, tuple(context.items())), key


@cache
def variant_fingerprint(name, context=()):
    return fingerprint(resolve.resolve(make_config("lra.listops", name, **TINY), dict(context)))


@pytest.mark.slow
@pytest.mark.parametrize("name", LINEAR)
def test_no_option_of_a_structure_is_dead(name):
    argument = f"softmax+{name}"
    config = make_config("lra.listops", argument, **TINY)
    for option, value in schema.options(LINEAR[name], schema.GIVEN["linear"]).items():
        context = STRUCTURE_CONTEXT.get(f"{name}.{option}", {})
        other = STRUCTURE_OTHER[f"{name}.{option}"] if f"{name}.{option}" in STRUCTURE_OTHER else alternative("", value)
        changed = resolve.resolve(config, {**context, f"linear.mlp.{option}": other})
        assert fingerprint(changed) != variant_fingerprint(argument, tuple(context.items())), option


def test_top_level_keys_are_those_of_the_design():
    """And `mixers`, which the design's argument and `--set mixers=` name."""
    design = "seed steps batch_size grad_accum eval_every checkpoint_every log_every keep protocol dtype remat"
    densify = ("densify_at", "densify_warmup")  # which the issue of structured weights adds
    assert set(schema.RUN) == {*design.split(), "init_from", "loggers", "debug_nans", "mixers", *densify}


def test_help_names_what_there_is_to_choose():
    code, out, _ = parsed("--help", "--config=configs/quickstart.py")
    assert code == 0
    for words in (
        "configs/lra_listops.py",
        "kernelized, sigmoid, skyformer, soft, nystromformer",
        "monarch",
        "protocol",
        "optimizer.learning_rate = ",
    ):
        assert words in out
