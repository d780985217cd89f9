"""Keys: the dotted names of what is in a config, and setting them."""

from typing import Any

from ml_collections import ConfigDict

from efficient_tx.checks import nearest
from efficient_tx.config.errors import ConfigError
from efficient_tx.training import workdir


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Dotted key -> value, over all sections."""
    return workdir.flatten(config.to_dict())


def section_of(config: ConfigDict, key: str) -> ConfigDict:
    """The section that holds the dotted key; ConfigError, with the nearest key, where there is none."""
    flat = flatten(config)
    if key not in flat:
        mixers = f"; the mixers here are {config.mixers}" if key.startswith("attention.") else ""
        raise ConfigError(key, f"is no key: the nearest is {nearest(key, flat)}{mixers}")
    for name in key.split(".")[:-1]:
        config = config[name]
    return config


def type_of(config: ConfigDict, key: str) -> type:
    """The type of the dotted key's values; ConfigError where there is none."""
    return section_of(config, key).get_type(key.rpartition(".")[2])


def assign(config: ConfigDict, key: str, value: Any) -> None:
    """config.key = value, in place; ConfigError where there is no such key, or it holds another type."""
    section, last = section_of(config, key), key.rpartition(".")[2]
    try:
        section[last] = value
    except (TypeError, ValueError):
        raise wrong_type(config, key, value) from None


def parse(config: ConfigDict, key: str, text: str) -> Any:
    """`text` as a value of the type that `config.key` has; ConfigError where there is no such key, or value."""
    kind = type_of(config, key)
    parsers = {bool: {"true": True, "false": False}.__getitem__, tuple: parse_tuple}
    try:
        return parsers.get(kind, kind)(text.lower() if kind is bool else text)
    except (KeyError, ValueError):
        raise wrong_type(config, key, text) from None


def wrong_type(config: ConfigDict, key: str, value: Any) -> ConfigError:
    """The error of a value that the key cannot hold."""
    return ConfigError(key, f"takes a value of type {type_of(config, key).__name__}, not {value!r}")


def parse_tuple(text: str) -> tuple[int | str, ...]:
    """The parts of `text` between commas, as numbers if all of them are."""
    parts = text.split(",")
    try:
        return tuple(map(int, parts))
    except ValueError:
        return tuple(parts)
