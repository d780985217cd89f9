"""Stored configs: config.json of a run, of this version or an older one, becomes a config again."""

import contextlib
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from efficient_tx.config.keys import assign
from efficient_tx.config.resolve import NAMES
from efficient_tx.config.schema import make_config, owners
from efficient_tx.config.structure import SECTION, entries, in_config
from efficient_tx.files import local_path
from efficient_tx.models.pretrained.tensors import metadata
from efficient_tx.training import workdir
from efficient_tx.training.disk import decode

# In the metadata of a file of weights: the content of the run's config.json.
CONFIG = "config"


def to_store(config: ConfigDict) -> dict[str, Any]:
    """The content of config.json: `restore` reads it. Only that of a compressed model has a structure."""
    stored = config.to_dict()
    del stored[SECTION]
    return stored | ({SECTION: entries(config)} if config[SECTION] else {})


def restore(stored: Mapping[str, Any]) -> ConfigDict:
    """The config of a run from its config.json, with the types that JSON loses (tuples, and values that may be None).

    New keys get their defaults, and those that change what older runs computed the values of that time.

    Raises:
      ValueError: a required key is missing, this version does not have a key, or a value is of another form.
    """
    flat = workdir.flatten(stored)
    names = ("task.name", *NAMES, *({"model.name"} & set(flat)))  # older runs have no model.name
    for name in names:
        if not isinstance(flat.get(name), str):
            what = f"{name} is {flat[name]!r}" if name in flat else f"has no {name}"
            raise ValueError(f"config.json {what}: it is damaged, or of another version")
    for name, value in flat.items():
        for x in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(x, (bool, int, float, str, type(None))) or (isinstance(x, int) and abs(x) >= 2**63):
                raise ValueError(f"config.json {name} holds {x!r}: it is damaged, or of another version")
    model = {"model": {"name": flat["model.name"]}} if "model.name" in flat else {}
    try:
        config = make_config(flat["task.name"], "+".join(flat[name] for name in NAMES), **model)
        for key, value in flat.items():
            if value is not None and not key.startswith(f"{SECTION}."):
                assign(config, key, tuple(value) if isinstance(value, list) else value)
        take_former(config, stored)
        with config.unlocked():
            config.structure = in_config(stored.get(SECTION, {}))
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None
    return config


def config_of_weights(path: Path) -> dict[str, Any] | None:
    """The content of config.json of the run whose weights a safetensors file has; None if it does not say.

    Raises:
      ValueError: the file or what it says cannot be read.
    """
    said = metadata(path).get(CONFIG)
    try:
        return None if said is None else decode(said.encode())
    except ValueError as error:
        raise ValueError(f"{path} has a config that is damaged ({error})") from None


def take_structure(config: ConfigDict, stored: Mapping[str, Any]) -> None:
    """Takes over, in place, the structure of a stored config if `config` has none."""
    if stored.get(SECTION) and not config[SECTION]:
        with config.unlocked():
            config[SECTION] = in_config(stored[SECTION])


def take_former(config: ConfigDict, stored: Mapping[str, Any], typed: Collection[str] = ()) -> None:
    """Sets options in `config`, in place, that a stored config does not have, to what they were before they existed.

    A class of a mixer or a weight structure says so in `formerly`, if the default of such an option is another. Keys
    that were `typed` keep their values.
    """
    flat = workdir.flatten(stored)
    for section, owner in owners(config).items():
        for option, value in getattr(owner, "formerly", {}).items():
            if (key := f"{section}.{option}") not in flat and key not in typed:
                assign(config, key, value)


def workdir_of(
    path: str | os.PathLike,
    config: ConfigDict,
    *,
    typed: Collection[str] = (),
    writer: bool = True,
    warn: Callable[[str], None] = lambda line: None,
) -> workdir.Workdir:
    """The workdir of a run of `config`, which takes, in place, what a run that is there began with (`take_former`).

    If the run starts from a compressed one, its layers have that one's forms (`take_structure`).

    Raises:
      Refused: no path of this machine.
    """
    # Workdir judges paths and files that are none.
    with contextlib.suppress(OSError, ValueError):
        began = decode((local_path(path) / "config.json").read_bytes())
        take_former(config, began, typed=typed)
        take_structure(config, began)
    if config.init_from:
        # What cannot be read here is no workdir, or the start of the run says so.
        with contextlib.suppress(OSError, ValueError):
            source = local_path(config.init_from)
            began = config_of_weights(source) or decode((source / "config.json").read_bytes())
            take_structure(config, began)

    def complete(stored):
        return to_store(restore(stored))

    return workdir.Workdir(path, to_store(config), writer=writer, complete=complete, warn=warn)
