"""Resolves a config: the config file, the settings of its protocol and the typed values become one.

Precedence: base < protocol < the argument after the colon < typed values. The order of typing does not matter.
"""

import copy
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from efficient_tx.config import protocols
from efficient_tx.config.errors import at
from efficient_tx.config.keys import assign, flatten
from efficient_tx.config.names import absolute_task
from efficient_tx.config.schema import complete

# The keys that the argument after the colon sets.
NAMES = ("mixers", "linear.mlp.name", "linear.projections.name")


def resolve(config: ConfigDict, typed: Mapping[str, Any]) -> ConfigDict:
    """The config with the settings of its protocol, overridden by the typed values.

    Raises:
      ConfigError: an unknown protocol or key, or a value of another type.
    """
    config = copy.deepcopy(config)
    for key in ("protocol", "model.name", "task.resolution", *NAMES):
        if key in typed:
            assign(config, key, typed[key])
    config = complete(config)
    config.task.name = absolute_task(config.task.name)
    for key, value in protocol_settings(config).items():
        assign(config, key, value)
    for key, value in typed.items():
        assign(config, key, value)
    return config


def protocol_settings(config: ConfigDict) -> dict[str, Any]:
    """The protocol's settings for the config's task, without options of mixers that the config does not have."""
    with at():
        settings = protocols.settings(config.protocol, protocols.key(config.task))
    return {
        key: value
        for key, value in settings.items()
        if key.split(".")[0] != "attention" or key.split(".")[1] in config.attention
    }


def departures(config: ConfigDict, plain: ConfigDict) -> list[str]:
    """The keys of a resolved config that differ from the protocol that it names.

    Keys that the protocol leaves open are compared with `plain`, the file's config for the same mixers and structures.
    Generated data, or other data in place of the original data, depart from any published protocol.
    """
    mine, typed = flatten(config), {"protocol": config.protocol}
    if config.protocol != "default" and "task.resolution" in mine:
        typed["task.resolution"] = mine["task.resolution"]
    theirs = flatten(resolve(plain, typed))
    different = {key for key in mine if key not in protocols.HOUSEKEEPING and mine[key] != theirs.get(key)}
    if config.protocol != "default":
        stands_in = {"task.source"} if config.task.get("source") in protocols.STAND_INS else set()
        different = different - {"task.source"} | stands_in
    return sorted(different)
