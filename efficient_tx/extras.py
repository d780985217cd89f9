"""Extras: packages that only some commands need."""

import importlib.util
import sys


def require(extra: str, *packages: str) -> None:
    """Ends the process with one line and exit status 2 if a package of an extra is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        print(f"{', '.join(missing)} not installed: pip install 'efficient-tx[{extra}]'", file=sys.stderr)
        raise SystemExit(2)
