"""Compilation cache on disk: the second run of a program starts without compilation."""

import os
import re
import sys
import warnings
from pathlib import Path

import jax


def keep_programs(directory: Path) -> None:
    """Makes jax store and look up compiled programs in `directory`, if it can be written.

    jax writes a cache entry in place, so a killed process may leave an incomplete one. jax then warns about it at every
    start and never replaces it. Here the warning deletes the entry: the program is compiled and stored again.
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
    # Store the dozens of small programs around the step too: together they take seconds at every start.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    show = warnings.showwarning

    def mend(message, *args, **kwargs):
        problem = re.match(r"Error (reading|writing) persistent compilation cache entry for '(\w+)'", str(message))
        if problem is None:
            show(message, *args, **kwargs)
        elif problem[1] == "reading":
            for file in directory.glob(f"{problem[2]}-*"):
                file.unlink(missing_ok=True)
        else:
            print(f"a compiled program is not kept: {directory} cannot be written", file=sys.stderr)

    warnings.showwarning = mend
