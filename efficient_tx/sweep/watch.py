"""Watch: how far a run has come, from the end of its metrics.jsonl, which it may be writing."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficient_tx.training.history import NAME


def done(seen: Mapping[str, Any]) -> int:
    """The step of what `latest` says."""
    return seen["last"]["step"] if seen else 0


def latest(workdir: Path) -> dict[str, Any]:
    """`last`: the last line of a run's metrics.jsonl; `validation`: its last one of that split; `score`: that in words.

    {} if there is no line.
    """
    try:
        with open(workdir / NAME, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2**14))
            texts = file.read().split(b"\n")
    except OSError:
        return {}
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:  # cut off at the start or, while it is written, at the end
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    (*_, score) = [{}, *(line for line in lines if line.get("split") == "validation")]
    words = [f"{k} {x:.4f}" for k, x in score.items() if k not in ("step", "split", "loss") and x is not None]
    return {"last": lines[-1], "validation": score, "score": " ".join(words)} if lines else {}


def validated(seen: Mapping[str, Any]) -> int:
    """The step of the last evaluation in what `latest` says."""
    return seen["validation"].get("step", 0) if seen else 0
