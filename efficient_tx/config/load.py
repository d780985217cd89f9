"""Config files: loads the config of a path or a shipped name, with an argument after a colon."""

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from efficient_tx.checks import OptionError, nearest
from efficient_tx.config import trust
from efficient_tx.config.errors import ConfigError, blame
from efficient_tx.config.keys import flatten
from efficient_tx.config.protocols import PROTOCOLS
from efficient_tx.config.resolve import NAMES, departures, resolve
from efficient_tx.files import local_path, visible


class ConfigFile:
    """A config file, executed once.

    Args:
      path: "FILE.py:ARGUMENT", or "NAME:ARGUMENT" for a shipped config.

    Raises:
      OptionError: there is no such file, or it has no `get_config`.
    """

    def __init__(self, path: str):
        name, _, self._argument = path.partition(":")
        self._path, self._module = path, execute(path, find(path, name))

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols that the file allows: its PROTOCOLS, else all."""
        return getattr(self._module, "PROTOCOLS", tuple(PROTOCOLS))

    def config(self, names: Mapping[str, str] | None = None) -> ConfigDict:
        """The file's config. `names` (keys of NAMES) replace mixers and structures of the argument.

        Raises:
          OptionError: the file refuses its argument or a name.
        """
        config = self._get_config(self._argument)
        if not names:
            return config
        plain = flatten(config)
        return self._get_config("+".join(names.get(name, plain[name]) for name in NAMES))

    def resolve(self, typed: Mapping[str, Any]) -> ConfigDict:
        """The file's config with the settings of its protocol, overridden by the typed values.

        Raises:
          OptionError, ConfigError: an unknown name, key or value, or a protocol that the file does not allow.
        """
        config = resolve(self.config({name: typed[name] for name in NAMES if name in typed}), typed)
        if config.protocol not in self.protocols:
            own = ", ".join(self.protocols)
            raise ConfigError("protocol", f"is {config.protocol!r}, but {self._path} is a run of its own: use {own}")
        return config

    def departures(self, config: ConfigDict) -> list[str]:
        """The keys of a resolved config that differ from the protocol that it names."""
        names = {name: value for name, value in flatten(config).items() if name in NAMES}
        return departures(config, self.config(names))

    def _get_config(self, argument: str) -> ConfigDict:
        try:
            return self._module.get_config(argument) if argument else self._module.get_config()
        except ValueError as error:
            raise OptionError("config", self._path, str(error)) from None
        except Exception as error:
            raise OptionError("config", self._path, blame(error)) from None


def load(path: str) -> ConfigDict:
    """The config of a path, before protocol and flags; raises the errors of `ConfigFile`."""
    return ConfigFile(path).config()


def folder() -> Path:
    """The folder of the shipped configs: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def shipped() -> list[str]:
    """The names of the shipped configs."""
    return [path.stem for path in visible(folder(), "*.py") if path.stem != "__init__"]


def find(path: str, name: str) -> Path:
    """The config file: `name` as a path, else as a shipped name."""
    with contextlib.suppress(ValueError):  # a name that no file can have is none of a file
        if name.endswith(".py") and os.path.isfile(file := local_path(name)):
            return file
    if name in shipped():
        return folder() / f"{name}.py"
    beside = [os.path.relpath(folder() / f"{other}.py") for other in shipped()]
    near = nearest(name, beside if name.endswith(".py") else shipped())
    raise OptionError("config", path, f"there is no such config file; the nearest is {near}")


def execute(path: str, file: Path) -> ModuleType:
    """The module of a config file, which may be its own task."""
    trust.allow_file(file)
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise OptionError("config", path, f"it cannot be executed: {blame(error)}") from None
    if not hasattr(module, "get_config"):
        raise OptionError("config", path, f"{file} has no get_config")
    return module
