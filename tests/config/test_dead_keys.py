"""No key of a config is dead: another value gives another program, other batches or another listed output."""

from functools import cache

import pytest

from efficient_tx.attention import ATTENTION, MultiHead
from efficient_tx.config import keys, make_config, resolve, schema
from efficient_tx.linear import LINEAR
from tests.support.fingerprint import Fingerprint

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
    "attention.tensor.k2_bias": 0.5,
    "attention.soft.norm_epsilon": 0.1,
    "attention.sigmoid.layer_scale": 0.1,
    "attention.custom.score": "soft_cap",
    "attention.custom.mask": "window(3)",
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
    "attention.hgrn.states": 4,
    "attention.hgrn.lower_bound": 0.5,
    "attention.mlgru.states": 4,
    "attention.mlgru.lower_bound": 0.5,
    "attention.s4d.states": 4,
    "attention.mega.chunk": 4,
    "attention.mega.weighting": "laplace",
    "attention.mega.key_dim": 6,
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
    "attention.soft.norm_epsilon": {"attention.soft.bottleneck": "convolution"},
    "attention.skyformer.iterations": {"attention.skyformer.inverse": "iteration"},
    "attention.lev.recent": {"model.causal": True},
    "attention.lev.ridge": {"model.causal": True},
    "attention.lev.rescore": {"model.causal": True},
    "attention.sparse.summary": {"attention.sparse.pattern": "fixed"},
    "model.causal": {"mixers": "softmax"},
    "densify_warmup": {"densify_at": 2},
    "lengths": {"task.max_len": 64},
    "optimizer.window": {"optimizer.name": "mfac"},
    "optimizer.damping": {"optimizer.name": "mfac"},
    # Sequences not longer than the block or, if causal, the chunk are attended to exactly.
    "attention.hyper.samples": {"attention.hyper.block": 4},
    "attention.hyper.bits": {"attention.hyper.block": 4},
    "attention.hyper.chunk": {"attention.hyper.block": 4, "model.causal": True},
}
# The same for the options of weight structures, by structure.
STRUCTURE_OTHER = {
    "low_rank.rank": 1,
    "monarch.init": "published",
    "block_diagonal.order": "inverse",
    "block_tensor_train.rank": 3,
    "blast.rank": 3,
    "hadamard_quotient.rank": 1,
    "low_rank_plus_sparse.rank": 2,
    "low_rank_plus_sparse.pattern": "top",
    "low_rank_plus_sparse.density": 0.5,
    "sparse.density": 0.25,
    "sparse.pattern": "2:4",
    "sum.first": "monarch(blocks=2)",
    "sum.second": "sparse",
    "integer.bits": 4,
    "integer.group": 2,
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


def base_config(argument):
    config = make_config("lra.listops", argument, **TINY)
    if argument.startswith("skyformer"):
        config.attention.skyformer.landmarks = 8
    return config


@cache
def base_fingerprint(argument, context=()):
    return Fingerprint(resolve.resolve(base_config(argument), dict(context)))


KEYS = [key for key in keys.flatten(base_config("skyformer+monarch+low_rank")) if key not in OUTPUTS]


# One is asked at once, all others by the slow tests.
QUICK = ("seed",)


@pytest.mark.parametrize("key", [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in KEYS])
def test_no_key_is_dead(key):
    # To the optimizer a mixer is its parameters: one that is traced in no time will do.
    argument = "vmean+monarch" if key.startswith("optimizer.") else "skyformer+monarch+low_rank"
    value = alternative(key, keys.flatten(base_config(argument))[key])
    context = CONTEXT.get(key, {})
    changed = resolve.resolve(base_config(argument), {**context, key: value})
    assert Fingerprint(changed) != base_fingerprint(argument, tuple(context.items()))


@pytest.mark.slow
def test_the_fingerprint_of_one_config_is_the_same_twice():
    argument = "skyformer+monarch+low_rank"
    assert Fingerprint(base_config(argument)) == base_fingerprint(argument)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION)
def test_no_option_of_a_variant_is_dead(name):
    config = make_config("lra.listops", name, **TINY)
    for option, value in schema.options(ATTENTION[name], schema.GIVEN["mixer"]).items():
        key = f"attention.{name}.{option}"
        # conv is MultiHead's own and looked at in skyformer, but where projections are made otherwise.
        if key not in KEYS and (option != "conv" or ATTENTION[name].mix is not MultiHead.mix):
            context = CONTEXT.get(key, {})
            changed = resolve.resolve(config, {**context, key: alternative(key, value)})
            assert Fingerprint(changed) != variant_fingerprint(name, tuple(context.items())), key


@cache
def variant_fingerprint(name, context=()):
    return Fingerprint(resolve.resolve(make_config("lra.listops", name, **TINY), dict(context)))


@pytest.mark.slow
@pytest.mark.parametrize("name", LINEAR)
def test_no_option_of_a_structure_is_dead(name):
    argument = f"softmax+{name}"
    config = make_config("lra.listops", argument, **TINY)
    for option, value in schema.options(LINEAR[name], schema.GIVEN["linear"]).items():
        context = STRUCTURE_CONTEXT.get(f"{name}.{option}", {})
        other = STRUCTURE_OTHER[f"{name}.{option}"] if f"{name}.{option}" in STRUCTURE_OTHER else alternative("", value)
        changed = resolve.resolve(config, {**context, f"linear.mlp.{option}": other})
        assert Fingerprint(changed) != variant_fingerprint(argument, tuple(context.items())), option
