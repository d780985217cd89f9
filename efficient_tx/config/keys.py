"""Keys: the dotted names of the values in a config, and functions that set them."""

from typing import Any

from ml_collections import ConfigDict

from efficient_tx.checks import nearest
from efficient_tx.config.errors import ConfigError
from efficient_tx.training import workdir


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Dotted key -> value, over all sections."""
    return workdir.flatten(config.to_dict())


def section_of(config: ConfigDict, key: str) -> ConfigDict:
    """The section that holds the dotted key. Raises ConfigError, with the nearest key, if there is none."""
    flat = flatten(config)
    if key not in flat:
        mixers = f"; the mixers here are {config.mixers}" if key.startswith("attention.") else ""
        raise ConfigError(key, f"is no key: the nearest is {nearest(key, flat)}{mixers}")
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
