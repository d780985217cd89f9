"""Says what a training step takes on a chip before there is one: the largest batch that fits, memory, FLOPs, time.

python -m efficient_tx.fit --config=quickstart --mixers=softmax,skyformer,gla --target=cpu
python -m efficient_tx.fit --config=lra_listops --mixers='softmax;gla*3,softmax' --lengths=1k,16k --target=cpu,h100,v5e

The step is compiled ahead of time for one device, with shapes alone: no data are read and nothing is trained. Lists are
split at semicolons if they have any, else at commas. Chips other than the CPU need the extra [aot], and none of them.
Exit status: 0; 1 a program could not be compiled, its line says why; 2 refused.
"""

import os

# Set before jax is imported: OpenBLAS's threads collide with XLA's.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from efficient_tx import commands

if __name__ == "__main__":
    commands.leave_quietly()

from efficient_tx.extras import require

require("train", "ml_collections", "orbax", "rich")

import argparse
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from efficient_tx.compare.attention.report import csv_text
from efficient_tx.compare.flags import path, positive
from efficient_tx.compare.progress import progress
from efficient_tx.config import trust
from efficient_tx.config.check import check
from efficient_tx.config.errors import ConfigError
from efficient_tx.config.flags import OVERRIDE, TRUST, answered, concerning, named, typed_keys, typed_values
from efficient_tx.config.keys import flatten
from efficient_tx.config.load import ConfigFile
from efficient_tx.files import write
from efficient_tx.fit.chips import GIGA, NAMES, TERA, Chip, chip_of, plugins
from efficient_tx.fit.search import MOST, largest
from efficient_tx.fit.step import Recipe, Step
from efficient_tx.kernels.verify.targets import GIB

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def length(text: str) -> int:
    """Tokens: "300", "4k" for 4,096 or "1M" for 1,048,576."""
    found = re.fullmatch(r"([1-9]\d*)([km]?)", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no length, as 300, 4k or 1M")
    return int(found[1]) * UNITS[found[2]]


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and --config.KEY=VALUE; a mistake ends in one line and exit status 2."""

    def each(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: list(dict.fromkeys(map(one, commands.parts(text))))

    parser = commands.Parser.of("fit", __doc__)
    add = parser.add_argument
    add("--config", required=True, help="the path of a config file, or a shipped config's name; NAME:MIXERS+LINEAR")
    add("--config.KEY", metavar="VALUE", dest="constant", help="a value of the config, as of train.py")
    add("--mixers", type=each(str), metavar="A,B", help="token mixers, or patterns; default: the config's")
    add("--lengths", type=each(length), metavar="1k,16k", help="of the sequences, task.max_len; default: the config's")
    add("--target", type=commands.names_of(NAMES, "target"), default=["cpu"], metavar="NAMES",
        help=f"of {', '.join(NAMES)}; default cpu, this machine")  # fmt: skip
    add("--memory", type=positive, metavar="GIB",
        help="what there is for the step; default: that of this machine, or what jax takes of the chip's")  # fmt: skip
    add("--out", type=path, metavar="FILE", help="also write the numbers, as .json or .csv, row by row")
    add("--trust", action="append", default=[], metavar="MODULE", help=TRUST)
    constants = [argument for argument in argv if OVERRIDE.fullmatch(argument)]
    options = parser.parse_args([argument for argument in argv if argument not in constants])
    if options.out and options.out.suffix not in (".json", ".csv"):
        parser.error(f"--out={options.out}: it is written as .json or .csv: end its name so")
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"--out={options.out}: there is no folder {options.out.parent}")
    return options, constants


def configs_of(options: argparse.Namespace, constants: Sequence[str]) -> Iterator[ConfigDict]:
    """The config of each of the mixers and lengths, checked."""
    file = ConfigFile(options.config)
    for key, flag in (("mixers", options.mixers), ("task.max_len", options.lengths)):
        if key in typed_keys(constants) and flag:
            raise ConfigError(key, "is given one value, and a flag lists others: leave out one of the two")
    for typed in values_of(file, options.mixers, constants):
        for tokens in options.lengths or [None]:
            if tokens and "max_len" not in file.config(typed).task:
                rule = f"the examples of {options.config} have sizes of their own, and no max_len to set"
                raise ValueError(f"--lengths={tokens}: {rule}")
            config = file.resolve(typed | ({"task.max_len": tokens} if tokens else {}))
            check(config)
            yield config


def values_of(file: ConfigFile, mixers: Sequence[str] | None, constants: Sequence[str]) -> list[dict[str, Any]]:
    """For each of the mixers: key -> value of the overrides that concern it, `mixers` among them.

    Raises:
      ConfigError: an unknown key, one that none of the mixers has, or a value of another type.
    """
    values = []
    for choice in [[f"--config.mixers={pattern}"] for pattern in mixers or []] or [[]]:
        arguments = [*constants, *choice]
        mine = concerning(arguments, flatten(named(file, typed_keys(arguments))))
        values.append(typed_values(file, ["fit", *mine])[0])
    if not typed_keys(constants).keys() <= set().union(*values):
        typed_values(file, ["fit", *constants])  # names the nearest
    return values


def row(recipe: Recipe, chip: Chip, memory: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The numbers of one line, in bytes, operations and seconds; None is what is not known.

    Raises:
      jax.errors.JaxRuntimeError: the compiler's word, unless it is that memory does not suffice.
    """
    config = recipe.config
    name = f"{config.mixers}, {recipe.task.max_len} tokens, {chip.name}"

    @functools.cache
    def step(micro: int) -> Step:
        say(f"{name}: compiling batches of {micro * config.grad_accum}")
        return recipe.compiled(micro * config.grad_accum, chip)

    start = config.batch_size // config.grad_accum
    most = largest(lambda micro: step(micro).memory, memory, start)
    own = step(start)
    bound = None if None in (own.moved, own.flops) else chip.bound(own.flops, own.moved, config.dtype)
    products = bound is not None and bound * chip.bandwidth > own.moved
    return {
        "target": chip.name,
        "mixers": config.mixers,
        "length": recipe.task.max_len,
        "parameters": recipe.parameters,
        "memory_limit": memory,
        "largest_batch": most * config.grad_accum,
        "batch_size": config.batch_size,
        "grad_accum": config.grad_accum,
        "memory": None if own.memory == math.inf else int(own.memory),
        "flops": own.flops,
        "bytes": own.moved,
        "seconds": bound,
        "bound_by": None if bound is None else "matrix products" if products else "memory",
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table(title="the largest batch that fits on one device, and a training step of the config's batch")
    for name in ("target", "mixers"):
        made.add_column(name, overflow="fold")
    heads = ("length", "parameters", "largest batch", "batch", "memory", "GFLOP", "moved", "at least", "bound by")
    for name in heads:
        made.add_column(name, justify="right")
    for line in rows:
        batch = line["largest_batch"]
        most = "none" if not batch else f"{'≥ ' * (batch == MOST * line['grad_accum'])}{batch:,}"
        flops, seconds = line["flops"], line["seconds"]
        made.add_row(
            line["target"], line["mixers"], f"{line['length']:,}", f"{line['parameters']:,}", most,
            f"{line['batch_size']:,}", size(line["memory"]), "–" if flops is None else f"{flops / GIGA:,.3g}",
            size(line["bytes"]), "–" if seconds is None else f"{1e3 * seconds:.3g} ms", line["bound_by"] or "–",
        )  # fmt: skip
    return made


def size(count: float | None) -> str:
    if count is None:
        return "–"
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"


def text(rows: Sequence[dict[str, Any]], ending: str) -> str:
    if ending == ".json":
        return json.dumps(list(rows), indent=1) + "\n"
    return csv_text(rows) if rows else "\n"


def fit(options: argparse.Namespace, constants: Sequence[str]) -> int:
    recipes = [Recipe(config) for config in configs_of(options, constants)]
    chips = [chip_of(name) for name in options.target]
    if not all(options.memory or chip.memory for chip in chips):
        raise ValueError("--memory is missing: this machine does not tell how much it has")
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    rows, failed = [], 0
    with progress(console) as say:
        for recipe in recipes:
            for chip in chips:
                memory = int(options.memory * GIB) if options.memory else chip.memory
                try:
                    rows.append(row(recipe, chip, memory, say))
                except jax.errors.JaxRuntimeError as error:
                    failed += 1
                    fault = " ".join(str(error).split())[:300]
                    print(f"{chip.name}, {recipe.config.mixers}: it is not compiled: {fault}", file=sys.stderr)
                if options.out:  # each compiles for minutes: a stop loses no other
                    write(options.out, text(rows, options.out.suffix))
    console.print(table(rows))
    for chip in chips:
        memory = options.memory * GIB if options.memory else chip.memory
        peak = ", ".join(f"{dtype} {rate / TERA:.3g}" for dtype, rate in chip.peak.items())
        source = "measured just now, under the load of the moment" if chip.name == "cpu" else "data sheet"
        rates = f"TFLOP/s in matrix products: {peak}; memory: {chip.bandwidth / GIGA:,.0f} GB/s ({source})"
        console.print(f"{chip.name}: {size(memory)} for the step; {rates}", soft_wrap=True)
    if options.out:
        console.print(f"wrote {options.out}", soft_wrap=True)
    return 1 if failed else 0


def main(argv: Sequence[str]) -> int:
    jax.config.update("jax_platforms", "cpu")  # nothing runs on an accelerator
    options, constants = parse(argv)
    trust.allow(*options.trust, remedy="--trust={} allows it")
    for name in options.target:
        require("aot", *plugins(name))
    return answered(lambda: fit(options, constants))


def command() -> None:
    """The command line."""
    sys.path.append(os.getcwd())  # for a task or a mixer of the user's own
    commands.run(lambda: main(sys.argv[1:]), smaller="shorter --lengths")


if __name__ == "__main__":
    command()
