"""The sections of the page beside the table of kernels: training steps, price of a score, peers, mixers."""

import collections
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, product
from typing import Any

import jax

from efficient_tx.attention import ATTENTION
from efficient_tx.kernels.verify import mixers, peers, price, steps, twins
from efficient_tx.kernels.verify.loops import Loop
from efficient_tx.kernels.verify.plan import GATES
from efficient_tx.kernels.verify.processes import each
from efficient_tx.kernels.verify.report import table
from efficient_tx.kernels.verify.targets import MIB, TARGETS
from efficient_tx.kernels.verify.training import RECIPES

# Of each platform one; the kernels themselves are compiled for all.
TWO = ("v5e", "h100")


def of_all(progress: Callable[[str], Any], *, quick: bool = False, jobs: int = 1) -> tuple[list[str], bool]:
    """Compiles what the sections are about: their lines, and whether nothing in them must not be.

    With `quick` no mixers for TPUs: XLA takes a minute and more for many.
    """
    name = lambda item: " ".join(map(str, item))  # noqa: E731
    run: Any = partial(each, jobs=jobs, progress=progress, name=name)
    compiled = list(run(trained, list(product(RECIPES, TWO)), what="training steps"))
    priced = list(chain(*run(paid, list(product(GATES, twins.SCORES, price.DIMS)), what="prices of a score")))
    compared = [row for target in peers.PEERS for row in peers.compared(target, progress)]
    mixed = list(run(looked_at, list(product(ATTENTION, TWO[1:] if quick else TWO)), what="mixers"))
    lines = [*of_steps(compiled), *of_price(priced), *of_peers(compared), *of_mixers(mixed)]
    failed = [row for row in compiled + mixed if row["faults"]], [pair for pair in priced if pair.faults()]
    return lines, not any(failed)


def trained(of: tuple[str, str]) -> dict[str, Any]:
    name, target = of
    row = {"name": name, "target": target}
    try:
        step = steps.compiled_step(RECIPES[name](), TARGETS[target])
    except jax.errors.JaxRuntimeError as error:
        return row | {"faults": [f"does not compile: {' '.join(str(error).split())[:200]}"]}
    return row | {"step": step, "faults": steps.faults(step)}


def paid(of: tuple[str, str, int]) -> list[price.Pair]:
    target, score, dim = of
    return list(price.pairs(score, dim, TARGETS[target]))


def looked_at(of: tuple[str, str]) -> dict[str, Any]:
    name, target = of
    row = {"name": name, "target": target}
    try:
        found = mixers.program_of(name, TARGETS[target])
    except jax.errors.JaxRuntimeError as error:
        return row | {"faults": [f"does not compile: {' '.join(str(error).split())[:200]}"]}
    return row | {"program": found, "faults": mixers.faults(name, found)}


def of_steps(rows: Sequence[dict[str, Any]]) -> list[str]:
    def cells(step):
        called = ", ".join(f"{name} × {count}" for name, count in step.kernels.items())
        sums = ", ".join(f"{name} × {count}" for name, count in step.collectives.items())
        state = f"{step.written_over} of {step.state}"
        summed = f"{step.reduced - step.parameters} + {step.parameters}"
        return sums, summed, state, len(step.host), called, turns(step.loops), f"{step.temporaries / MIB:.0f}"

    return [
        "## Whole training steps", "",
        f"The step of `jax.pmap`, donated, for {steps.CHIPS} chips, as `efficient_tx.training` makes it: forward, "
        "gradient, AdamW. Summed over the chips: numbers of loss and metrics + of gradients. Written over: arrays of "
        "the state (parameters and optimizer) whose memory the new state takes. Temporaries are of a chip; for TPUs "
        "what stands around the kernels is compiled with the least effort, here and below.", "",
        *table(
            ("model", "target", "collectives", "summed", "written over", "host transfers", "kernels and routines",
             "loops", "temporaries MiB", "faults"),
            [
                (row["name"], f"{steps.CHIPS} {row['target']}", *(cells(row["step"]) if "step" in row else "–" * 7),
                 "; ".join(row["faults"]) or "none")
                for row in rows
            ],
        ), "",
    ]  # fmt: skip


def of_price(pairs: Sequence[price.Pair]) -> list[str]:
    """Derived kernel / kernel by hand."""

    def cell(pair, name):
        if name not in pair.figures():
            return "–"
        ours, theirs = pair.figures()[name]
        return f"{ours} / {theirs}"

    return [
        "## The price of deriving a kernel from its score", "",
        f"Kernel derived from a score / written by hand with the same blocks (`verify/twins.py`), without a mask, "
        f"`[{price.BATCH}, {price.LENGTH}, {price.HEADS}, dims]` in bfloat16; at most {price.MOST} times as much.", "",
        *table(
            ("score", "dims", "target", "kernel", *price.FIGURES, "faults"),
            [
                (pair.score, pair.dim, pair.target, pair.derived.name, *(cell(pair, name) for name in price.FIGURES),
                 "; ".join(pair.faults()) or "none")
                for pair in pairs
            ],
        ), "",
    ]  # fmt: skip


def of_peers(rows: Sequence[dict[str, Any]]) -> list[str]:
    def cells(program):
        def each(form):
            return " / ".join("–" if (x := form(kernel)) is None else str(x) for kernel in program.kernels)

        return (
            f"{program.temporaries / MIB:.1f}",
            each(lambda kernel: kernel.on_chip and round(kernel.on_chip / 1024)),
            each(lambda kernel: kernel.instructions), each(lambda kernel: kernel.spills),
            each(lambda kernel: kernel.matrix_share and f"{kernel.matrix_share:.0%}"),
        )  # fmt: skip

    return [
        "## Beside others' kernels", "",
        f"Softmax attention with gradients, `[{peers.BATCH}, {peers.LENGTH}, {peers.HEADS}, dims]` in bfloat16; "
        "figures of its kernels one after another. Instructions are of the code, not of a run: a kernel with larger "
        "blocks has more of them, and runs them less often.", "",
        *table(
            ("target", "dims", "mask", "kernels of", "temporaries MiB", "on chip KiB", "instructions", "spills",
             "matrix units"),
            [
                (row["target"], row["dim"], row["mask"], row["name"],
                 *(cells(row["program"]) if "program" in row else (row["failed"], *"––––")))
                for row in rows
            ],
        ), "",
    ]  # fmt: skip


def of_mixers(rows: Sequence[dict[str, Any]]) -> list[str]:
    def cells(program):
        share = program.temporaries / (program.arguments + program.outputs)
        names = ", ".join(dict.fromkeys(kernel.name for kernel in program.kernels)) or "none"
        return names, turns(mixers.loops(program.text)), f"{share:.1f}"

    def remark(row):
        serial = "program" in row and mixers.serial_loops(row["program"])
        return "; ".join(row["faults"]) or (ATTENTION[row["name"]].one_by_one if serial else "none")

    return [
        "## Every mixer", "",
        f"Forward and gradient of each mixer with its defaults, {mixers.EXAMPLES} examples of {mixers.TOKENS} tokens, "
        f"{mixers.HEADS} heads, bfloat16. Loops: how often each turns, outside of kernels. Those over blocks of tokens "
        "keep memory linear; one over heads, examples or single tokens is a fault, or its class says why there is one. "
        "Temporaries: as a multiple of arguments and outputs.", "",
        *table(
            ("mixer", "target", "kernels and routines", "loops", "temporaries", "faults"),
            [
                (row["name"], row["target"], *(cells(row["program"]) if "program" in row else "–––"),
                 remark(row))
                for row in rows
            ],
        ), "",
    ]  # fmt: skip


def turns(loops: Sequence[Loop]) -> str:
    """32 × 2, by data: two that turn 32 times, and one that turns as long as its data say."""
    counted = collections.Counter("by data" if loop.trips is None else str(loop.trips) for loop in loops)
    return ", ".join(name if count == 1 else f"{name} × {count}" for name, count in counted.items()) or "none"
