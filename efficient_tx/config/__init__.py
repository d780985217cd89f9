"""Configuration: from names, files and flags to one checked config, and from a config to objects."""

from efficient_tx.config.errors import ConfigError
from efficient_tx.config.schema import make_config

__all__ = ["ConfigError", "make_config"]
