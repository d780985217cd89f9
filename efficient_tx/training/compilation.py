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
    # Also the dozens of small programs around the step: together they take seconds at every start.
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
