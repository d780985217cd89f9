"""Settings of an evaluation: the config of a run with changes, on examples that the run was not trained on."""

import copy
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from efficient_tx.config.errors import ConfigError
from efficient_tx.config.keys import assign, parse
from efficient_tx.config.names import task_module
from efficient_tx.config.resolve import NAMES
from efficient_tx.config.schema import complete
from efficient_tx.config.stored import restore
from efficient_tx.files import local_path

# Added to the seed of generated data if an evaluation moves the splits.
FAR = 2**31
# Keys and sections that an evaluation uses; only these may be changed.
EVALUATED = ("mixers", "attention", "linear", "model", "task", "dtype")


def apply_settings(stored: Mapping[str, Any], settings: Mapping[str, str], split: str = "test") -> ConfigDict:
    """The config in a run's config.json with other settings. Names of mixers and structures are set first.

    The run was not trained on any example of the evaluated split (`hold_out`). The exception is data that chance draws
    twice, such as short ListOps expressions.

    Args:
      stored: config.json.
      settings: dotted key -> value as typed.
      split: "train", "validation" or "test".

    Raises:
      ConfigError: an unknown key, a value of another type, a key that evaluation does not use, or one that it must not
        change.
    """
    config = restore(stored)
    names = (*NAMES, "model.name")
    trained = copy.deepcopy(config.task)
    for key in sorted(settings, key=lambda key: key not in names):
        value = parse(config, key, settings[key])
        if key.split(".")[0] not in EVALUATED:
            raise ConfigError(key, f"has no part in an evaluation: it depends on {', '.join(EVALUATED)}")
        assign(config, key, value)
        config = complete(config) if key in names else config
    if split != "train":
        hold_out(config.task, trained, split, typed="task.seed" in settings)
    return config


def without_dropout(config: ConfigDict) -> ConfigDict:
    """The same config with nothing random but the draws of mixers."""
    config = copy.deepcopy(config)
    for key in ("dropout", "drop_path"):
        if key in config.model:
            config.model[key] = 0.0
    return config


def hold_out(task: ConfigDict, trained: ConfigDict, split: str, *, typed: bool) -> None:
    """Keeps training examples out of an evaluation whose options may move the splits.

    Generated data get a distant seed instead.

    Args:
      task: the options of the evaluation; its seed may be changed.
      trained: the options of the training run.
      split: "validation" or "test".
      typed: whether the user chose the seed.

    Raises:
      ConfigError: training examples would be in the split, and the data are not generated or the user chose the seed;
        or the validation split of other data is asked for.
    """
    source = trained.get("source")
    if task.name != trained.name or not same_source(task.get("source"), source):
        if split == "validation":
            raise ConfigError("task.source", "names other data, whose test split alone is known to be new: use that")
        return
    split_by = getattr(task_module(task.name), "split_by", lambda source, split: ())
    moved = [option for option in split_by(source, split) if task[option] != trained[option]]
    if not moved or (source == "generated" and task.seed != trained.seed):
        return
    if source != "generated" or typed:
        other = "; or set another task.seed" if source == "generated" else ""
        fault = f"is {task[moved[0]]}: training examples would be in the {split} split, keep {trained[moved[0]]}{other}"
        raise ConfigError(f"task.{moved[0]}", fault)
    task.seed += FAR


def same_source(one: str | None, two: str | None) -> bool:
    """Whether both are the same name, or two spellings of the same path."""
    if one is None or two is None:
        return one == two
    return local_path(one).resolve() == local_path(two).resolve()
