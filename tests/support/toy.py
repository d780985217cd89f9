"""A run small enough for tests: a task in memory, a model of 100 numbers, and the real loop around them.

As a script it is one process of such a run, `python toy.py WORKDIR [KILL NUMBER [STEP]]`, which SIGKILLs itself when
the function KILL of `MOMENTS` is entered for the NUMBER-th time. With STEP its last layer is structured up to there.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.data.batching import evaluation_batches, train_batches
from efficient_tx.linear import Monarch, densify
from efficient_tx.numerics.random import dropout
from efficient_tx.task import Task
from efficient_tx.training import checkpoint, history
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.history import TIMINGS, History
from efficient_tx.training.loop import Loop, Plan
from efficient_tx.training.objective import objective_of
from efficient_tx.training.optimizer import make_optimizer
from efficient_tx.training.report import Report
from efficient_tx.training.stages import Transform, make_stages

PLAN = {"steps": 23, "batch_size": 8, "log_every": 4, "eval_every": 6, "checkpoint_every": 5, "keep": 2}


def split(count: int, seed: int) -> list[dict]:
    """Sequences of 3 to 6 tokens in [1, 5); the label is whether token 1 is more frequent than token 2."""
    generator = np.random.default_rng(seed)
    inputs = [generator.integers(1, 5, generator.integers(3, 7)).astype(np.int32) for _ in range(count)]
    return [{"inputs": tokens, "label": int((tokens == 1).sum() > (tokens == 2).sum())} for tokens in inputs]


TASK = Task(
    train=split(40, 0),
    validation=split(30, 1),
    test=split(30, 2),
    kind="tokens",
    num_classes=2,
    vocab_size=5,
    max_len=6,
    name="toy",
    source="in memory",
    baselines={"constant": 0.6},
)


class Model(nnx.Module):
    """Mean of embeddings, dropout, a linear layer."""

    def __init__(self, rngs: nnx.Rngs, linear: Callable = nnx.Linear, outputs: int = 2):
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (5, 8)))
        self.logits = linear(8, outputs, rngs=rngs)

    def __call__(self, inputs, *, mask, key=None):
        x = jnp.where(mask[..., None], self.embed[inputs], 0).sum(1, keepdims=True)
        return self.logits(dropout(x / mask.sum(1)[:, None, None], 0.25, key)[:, 0])


def make_loop(
    path: Path,
    *,
    task: Task = TASK,
    optimizer: dict | None = None,
    model: nnx.Module | None = None,
    transforms: Sequence[tuple[int, Transform]] = (),
    lengths: int = 1,
    **plan,
):
    """The loop of a run in the folder `path`; `plan` overrides PLAN."""
    path.mkdir(parents=True, exist_ok=True)
    plan = Plan(**{**PLAN, **plan})
    settings = {"steps": plan.steps, "learning_rate": 0.05, "warmup": 3, **(optimizer or {})}
    record, objective = History(path / "metrics.jsonl"), objective_of(task)
    about = {"config": {}, "objective": objective, "baselines": task.baselines}
    return Loop(
        make_stages(
            model or Model(nnx.Rngs(0)),
            transforms,
            lambda _, births: make_optimizer(births=births, **settings)[0],
            objective,
        ),
        make_optimizer(**settings)[1],
        batches=train_batches(task, batch_size=plan.batch_size, seed=0),
        validation=evaluation_batches(task.validation, task, batch_size=plan.batch_size),
        plan=plan,
        checkpoints=Checkpoints(path / "checkpoints"),
        history=record,
        report=Report(path, record, steps=plan.steps, batch_size=plan.batch_size, **about),
        seed=0,
        lengths=lengths,
    )


def densified(step: int) -> dict[str, Any]:
    """Options of `make_loop` for a run whose linear layer is structured up to `step`, and dense afterwards."""
    return {"model": Model(nnx.Rngs(0), linear=Monarch), "transforms": [(step, densify)]}


def lines(path: Path) -> list[dict]:
    """metrics.jsonl without the timings."""
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in history.read_lines(path / "metrics.jsonl")]


def once(owner, name: str, number: int, act) -> None:
    """Makes the `number`-th call of owner.name (from 1) begin with act()."""
    original, calls = getattr(owner, name), iter(range(1, 1_000_000))

    def patched(*args, **kwargs):
        if next(calls) == number:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, patched)


# name -> (owner, function): where a process may be killed.
MOMENTS = {
    "step": (Loop, "_advance"),
    "line": (History, "append"),
    "save": (Checkpoints, "save"),
    "rename": (os, "rename"),  # Orbax has written everything
    "replace": (os, "replace"),  # an atomic file, a checkpoint that is complete, or one on its way out
    "delete": (checkpoint.shutil, "rmtree"),
    "validate": (Loop, "_validate"),
    "enter": (Loop, "_enter"),
}

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    if sys.argv[2:]:
        once(*MOMENTS[sys.argv[2]], int(sys.argv[3]), lambda: os.kill(os.getpid(), signal.SIGKILL))
    make_loop(Path(sys.argv[1]), **(densified(int(sys.argv[4])) if sys.argv[4:] else {})).run()
