"""Evaluation's settings: the config of a run, changed in what evaluation reads, on examples that are new to it."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from efficient_tx.config.errors import ConfigError
from efficient_tx.config.keys import assign, parse
from efficient_tx.config.names import task_module
from efficient_tx.config.resolve import NAMES
from efficient_tx.config.schema import complete
from efficient_tx.config.stored import restore

# Between a run's seed and that of generated data for evaluating it where the splits have moved.
FAR = 2**31
# Keys and sections that evaluation reads: what may be changed.
EVALUATED = ("mixers", "attention", "linear", "model", "task", "dtype")


def apply_settings(stored: Mapping[str, Any], settings: Mapping[str, str], split: str = "test") -> ConfigDict:
    """The config of a run's config.json with other settings; names of mixers and structures come first.

    No example of the evaluated split is one that the run was trained on (`hold_out`), but for short ListOps expressions
    and the like, which chance draws again.

    Args:
      stored: config.json.
      settings: dotted key -> value as it is typed.
      split: "train", "validation" or "test".

    Raises:
      ConfigError: an unknown key, a value of another type, or a key that evaluation does not read, or must not change.
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


def hold_out(task: ConfigDict, trained: ConfigDict, split: str, *, typed: bool) -> None:
    """Keeps training examples out of an evaluation whose options may move the splits.

    Generated data come from a seed far away instead.

    Args:
      task: the options to evaluate with; its seed may be changed.
      trained: those that the run was trained with.
      split: "validation" or "test".
      typed: whether the seed is asked for.

    Raises:
      ConfigError: the data are given, so there are no others, or their seed is.
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
    """Whether both are the same name, or the same place in two spellings."""
    if one is None or two is None:
        return one == two
    return Path(one).expanduser().resolve() == Path(two).expanduser().resolve()
