"""Compilation: compiled programs are kept on disk, so that the second run of a program starts at once."""

import os
import re
import sys
import warnings
from pathlib import Path

import jax


def keep_programs(directory: Path) -> None:
    """Makes jax store and look up compiled programs in `directory`; without it where it cannot be written.

    jax writes an entry in place, so a killed process may leave half of one, which jax would then warn of, and never
    replace, at every start: here it is deleted when that is noticed, and compiled and stored anew.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        usable = os.access(directory, os.R_OK | os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if not usable:
        print(f"compiled programs are not kept: {directory} cannot be written", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    show = warnings.showwarning

    def mend(message, *args, **kwargs):
        entry = re.match(r"Error reading persistent compilation cache entry for '(\w+)'", str(message))
        if entry is None:
            return show(message, *args, **kwargs)
        for file in directory.glob(f"{entry[1]}-*"):
            file.unlink(missing_ok=True)

    warnings.showwarning = mend
