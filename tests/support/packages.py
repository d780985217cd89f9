"""Packages that few have: without one a test is skipped, but not in CI, which installs them ($CI is set)."""

import importlib
import os
from types import ModuleType

import pytest


def installed(name: str, *, extra: str = "peers") -> ModuleType:
    """The module, which the extra of this package installs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"needs {name}: pip install -e '.[{extra}]'")
