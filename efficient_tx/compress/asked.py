"""Asked: what a compression of a run is asked for."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line, or another command, asks for.

    Attributes:
      workdir: the run to compress; it is only read.
      out: workdir of the result.
      method: as of `config.methods`; None: the mixers are swapped only.
      budget: share of the cost that may stay.
      mixers: a pattern of other mixers; None: they stay.
      unit: of the budget.
      where: which layers.
      calibration: training examples for statistics.
      draw: the seed that chooses them.
      distill: steps of learning from the run.
      tune: steps of training afterwards.
      checkpoint: of the run: "best", "last" or a step.
      settings: keys of the result's config, with values as typed.
    """

    workdir: Path
    out: Path
    method: str | None = None
    budget: float | None = None
    mixers: str | None = None
    unit: str = "bytes"
    where: str = "mlp|projections"
    calibration: int = 256
    draw: int = 0
    distill: int = 0
    tune: int = 0
    checkpoint: str = "best"
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As plain values; two calls that ask for the same have the same record."""
        values = dataclasses.asdict(self) | {"workdir": str(self.workdir.absolute())}
        del values["out"]
        return values
