"""What all processes of a run must have in common: its config, this code, the packages and the data."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efficient_tx.task import Task
from efficient_tx.training import summary
from efficient_tx.training.workdir import FREE_KEYS, flatten

SAMPLES = 16


def identity(config: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Facts by name, JSON values: every key of the config that affects the run, versions, and digests of the rest.

    Args:
      config: nested, plain values.
      task: of each split, the number of examples and the contents of `SAMPLES` of them count.
    """
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    return {
        **{key: value for key, value in flatten(config).items() if key not in FREE_KEYS},
        **{f"the version of {name}": version for name, version in summary.versions().items()},
        "the code of efficient_tx": code(),
        **{f"the {name} data": contents(split) for name, split in splits.items()},
    }


def code() -> str:
    """A digest of the source files of this package, "crc 0123abcd"."""
    package = Path(__file__).parents[1]
    digest = 0
    for file in sorted(package.rglob("*.py")):
        digest = zlib.crc32(str(file.relative_to(package)).encode() + file.read_bytes(), digest)
    return f"crc {digest:08x}"


def contents(split: Any) -> str:
    """A digest of a split, "50000 examples, crc 0123abcd"."""
    digest = 0
    for index in np.unique(np.linspace(0, len(split) - 1, SAMPLES).astype(int)) if len(split) else ():
        for name, part in sorted(split[int(index)].items()):
            array = np.ascontiguousarray(part)
            digest = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes(), digest)
    return f"{len(split)} examples, crc {digest:08x}"
