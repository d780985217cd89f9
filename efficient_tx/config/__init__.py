"""Configuration: names, files and flags become one checked config, and a config becomes objects."""

from efficient_tx.config.errors import ConfigError
from efficient_tx.config.schema import make_config

__all__ = ["ConfigError", "make_config"]
