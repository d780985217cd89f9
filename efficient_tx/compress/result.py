"""The result of a compression: a workdir, what it records of the compression, and what is printed."""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.table import Table

from efficient_tx.compress.asked import Asked
from efficient_tx.compress.distillation import Distillation
from efficient_tx.compression import Compressed
from efficient_tx.compression.method import Change
from efficient_tx.files import visible
from efficient_tx.linear.replacement import dotted
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.disk import CHECKSUMS, read_checked
from efficient_tx.training.errors import Refused
from efficient_tx.training.workdir import is_there

# What a compression was asked for and did, in its workdir.
RECORD = "compression.json"


class Result:
    """The workdir of a compression: the run that goes on from the compressed model."""

    def __init__(self, asked: Asked):
        self.path, self.asked = asked.out, asked.record()
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.distillation = Distillation(self.path / "distill", asked.distill)

    def stored(self) -> dict[str, Any] | None:
        """What an earlier call recorded here; None if there is nothing.

        Raises:
          Refused: the folder holds something else, or the compression of another call.
        """
        if not is_there(self.path, option="out"):
            return None
        try:
            record = read_checked(self.path / RECORD)
        except FileNotFoundError:
            # What a kill leaves before the record is there.
            if {entry.name for entry in visible(self.path, "*")} <= {"lock", CHECKSUMS}:
                return None
            raise Refused(f"{self.path} holds something else: name a new folder", option="out") from None
        except (OSError, ValueError) as error:
            raise Refused(f"{self.path / RECORD} {error}: use a new folder", option="out") from None
        asked = record.get("asked", {})
        if different := [key for key in self.asked if asked.get(key) != self.asked[key]]:
            there, here = (values.get(different[0]) for values in (asked, self.asked))
            what = f"{different[0]} was {there!r} there and is {here!r} here"
            raise Refused(f"{self.path} has the result of another call: {what}; use a new folder", option="out")
        return record


def record(done: Compressed) -> dict[str, Any]:
    """What compression.json has on a method: costs, and errors by layer."""
    layers = {
        dotted(change.path): {"error": change.error} | ({change.theory[0]: change.theory[1]} if change.theory else {})
        for change in done.changes
    }
    costs = {"before": done.before, "after": done.after, "share": done.after / done.before}
    return {**costs, "layers": layers}


def checksum(model: nnx.Module) -> int:
    """CRC-32 of a model's parameters, by which a compression knows the model that it began with."""
    found = 0
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        found = zlib.crc32(np.asarray(leaf).tobytes(), found)
    return found


def become(before: float, after: float, unit: str) -> str:
    """A cost before and after, in words."""
    digits = 3 if unit == "milliseconds" else 0
    return f"{before:,.{digits}f} {unit} become {after:,.{digits}f} ({after / before:.1%})"


def table(changes: Sequence[Change], before: float, after: float, unit: str) -> Table:
    """Layer, new form and error; the last row the cost of all of them."""
    result = Table(title=f"{len(changes)} layers: {become(before, after, unit)}")
    for name in ("layer", "becomes", "sizes", "error", "theory"):
        result.add_column(name, justify="left" if name in ("layer", "becomes") else "right")
    for change in changes:
        form = change.form
        theory = f"{change.theory[0]} {change.theory[1]:.4f}" if change.theory else ""
        becomes = str(form.form)
        sizes = f"{form.in_features} × {form.out_features}"
        result.add_row(dotted(change.path), becomes, sizes, f"{change.error:.4f}", theory)
    return result
