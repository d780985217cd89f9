"""Keys: the dotted names of the values in a config, and functions that set them."""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from efficient_tx.checks import similarity
from efficient_tx.config.errors import ConfigError
from efficient_tx.training import workdir


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Dotted key -> value, over all sections."""
    return workdir.flatten(config.to_dict())


def concerns(key: str, keys: Collection[str]) -> bool:
    """Whether a setting given to several methods is one for the method whose config has `keys`.

    A mixer's or a structure's key is for those that have it, any other for all, be it a key or none.
    """
    return key in keys or not key.startswith(("attention.", "linear."))


# What other programs call these keys. Initials of a key's words need no row: lr, wd, bs.
ALIASES = {
    "steps": "num_steps train_steps max_steps epochs num_epochs",
    "seed": "random_seed rng_seed",
    "batch_size": "batch train_batch_size",
    "grad_accum": "gradient_accumulation_steps microbatches",
    "eval_every": "eval_interval eval_steps validate_every",
    "checkpoint_every": "save_every save_steps save_interval",
    "log_every": "logging_steps log_interval",
    "dtype": "precision compute_dtype",
    "remat": "checkpointing gradient_checkpointing",
    "init_from": "pretrained restore load_from init_checkpoint",
    "mixers": "attention mixer",
    "max_len": "max_length seq_len sequence_length length context",
    "data_dir": "data_path root",
    "features": "dim d_model width hidden hidden_size hidden_dim embed_dim emb_dim",
    "layers": "num_layers n_layers depth num_blocks",
    "heads": "num_heads n_heads",
    "head_dim": "head_size qkv_dim key_size",
    "mlp_features": "mlp_dim d_ff ffn_dim intermediate_size mlp_ratio",
    "dropout": "dropout_rate drop",
    "pool": "pooling classifier",
    "positions": "position_embedding pos_emb",
    "learning_rate": "step_size",
    "schedule": "scheduler lr_schedule",
    "warmup": "warmup_steps num_warmup_steps",
    "clip": "grad_clip clip_norm gradient_clipping max_grad_norm",
    "b1": "beta1 beta_1 momentum",
    "b2": "beta2 beta_2",
    "eps": "epsilon",
}


def nearest_key(config: ConfigDict, key: str) -> str:
    """The key of `config` that people may mean by `key`: of a similar name, initials or alias, in a similar section."""
    section, _, last = key.lower().replace("-", "_").rpartition(".")

    def likeness(known: str) -> float:
        its_section, _, its_last = known.rpartition(".")
        initials = "".join(word[0] for word in its_last.split("_"))
        names = [its_last, *([initials] if len(initials) > 1 else []), *ALIASES.get(its_last, "").split()]
        place = similarity(section, its_section) if section else 0.1 * (not its_section)
        return max(3 * max(similarity(last, name) for name in names) + place, 3 * similarity(key, known))

    return max(flatten(config), key=likeness)


def section_of(config: ConfigDict, key: str) -> ConfigDict:
    """The section that holds the dotted key. Raises ConfigError, with the nearest key, if there is none."""
    flat = flatten(config)
    if key not in flat:
        mixers = f"; the mixers here are {config.mixers}" if key.startswith("attention.") else ""
        raise ConfigError(key, f"is no key: the nearest is {nearest_key(config, key)}{mixers}")
    for name in key.split(".")[:-1]:
        config = config[name]
    return config


def type_of(config: ConfigDict, key: str) -> type:
    """The type of the dotted key's values. Raises ConfigError if there is no such key."""
    return section_of(config, key).get_type(key.rpartition(".")[2])


def assign(config: ConfigDict, key: str, value: Any) -> None:
    """Sets config.key = value in place. Raises ConfigError for an unknown key or a value of another type."""
    section, last = section_of(config, key), key.rpartition(".")[2]
    try:
        section[last] = value
    except (TypeError, ValueError):
        raise wrong_type(config, key, value) from None


def parse(config: ConfigDict, key: str, text: str) -> Any:
    """`text` as a value of the type of `config.key`. Raises ConfigError for an unknown key or another type."""
    kind = type_of(config, key)
    parsers = {bool: {"true": True, "false": False}.__getitem__, tuple: parse_tuple}
    try:
        return parsers.get(kind, kind)(text.lower() if kind is bool else text)
    except (KeyError, ValueError):
        raise wrong_type(config, key, text) from None


def wrong_type(config: ConfigDict, key: str, value: Any) -> ConfigError:
    """The error for a value of a type that the key cannot hold."""
    return ConfigError(key, f"takes a value of type {type_of(config, key).__name__}, not {value!r}")


def parse_tuple(text: str) -> tuple[int | str, ...]:
    """The comma-separated parts of `text`, as integers if all of them are."""
    parts = text.split(",")
    try:
        return tuple(map(int, parts))
    except ValueError:
        return tuple(parts)
