"""Trains every combination of mixers, weight structures, settings and seeds, each as a run of its own below --out.

python -m efficient_tx.sweep --config=quickstart --mixers=softmax,skyformer,gla --seeds=3 --out=runs/sweep1
python -m efficient_tx.sweep --config=lra_listops --mixers='softmax;gla*3,softmax' --linears=dense,monarch
    --config.protocol=skyformer --tune optimizer.learning_rate=1e-4,3e-4,1e-3 --seeds=5 --out=runs/sweep2

The same command goes on after a kill: finished runs are skipped, broken ones go on where they stopped. Lists are split
at semicolons if they have any, else at commas. Exit status: 0 all are finished; 1 some failed, the others are finished;
2 refused; 143, 130 or 129 stopped by SIGTERM, Ctrl-C or a closed terminal: the runs have saved their state.
"""

import os

# Set before jax is imported: OpenBLAS's threads collide with XLA's.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from efficient_tx import commands

if __name__ == "__main__":
    commands.leave_quietly()

from efficient_tx.extras import require

require("train", "grain", "matplotlib", "ml_collections", "orbax", "rich")

import argparse
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich.console import Console

from efficient_tx.compare.flags import path, whole
from efficient_tx.config import trust
from efficient_tx.config.flags import OVERRIDE, TRUST, refuse, typed_keys
from efficient_tx.files import write
from efficient_tx.sweep import record, slurm
from efficient_tx.sweep.display import Display
from efficient_tx.sweep.plan import Cell, Grid, Run, check_runs, methods_of, shown
from efficient_tx.sweep.runner import Runner, result_of
from efficient_tx.sweep.tuning import choose, final_runs, tuning_runs
from efficient_tx.training.errors import InUse, NonFinite, RunError


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and --config.KEY=VALUE for all runs; a mistake ends in one line and exit status 2."""

    def values(text: str) -> tuple[str, list[str]]:
        key, _, given = text.partition("=")
        if not (key and commands.listed(given)):
            raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUES, as optimizer.learning_rate=1e-4,3e-4")
        return key, commands.listed(given)

    parser = commands.Parser.of("sweep", __doc__)
    add, key_values = parser.add_argument, {"action": "extend", "nargs": "+", "default": [], "type": values}
    add("--config", required=True, help="the path of a config file, or a shipped config's name")
    add("--config.KEY", metavar="VALUE", dest="constant", help="a value for all runs, as of train.py")
    add("--mixers", type=commands.parts, metavar="A,B", help="token mixers, or patterns: 'gla*3,softmax;softmax'")
    add("--linears", type=commands.parts, metavar="C,D", help="weight structures: dense,monarch,monarch+low_rank")
    add("--seeds", type=whole, default=1, help="runs of each combination, with seeds from 0; default 1")
    add("--set", **key_values, metavar="KEY=V1,V2", dest="settings", help="every value is compared")
    add("--tune", **key_values, metavar="KEY=V1,V2", dest="tuned",
        help="validation chooses a value for each combination; --seeds fresh seeds then run with it")  # fmt: skip
    add("--tune_seeds", type=whole, default=1, help="runs of each value of --tune, with seeds from 0; default 1")
    add("--out", type=path, required=True, help=f"the folder of the runs, of {record.NAME} and of logs/")
    add("--jobs", type=whole, help="runs at once; default 1, of --slurm: as many as there is room for")
    add("--until", type=whole, metavar="STEP",
        help="pause each run after its evaluation at this step, so that all get there before any goes on")  # fmt: skip
    add("--dry_run", action="store_true", help="print the commands of the runs and do nothing")
    add("--slurm", action="store_true", help="write a script for SLURM, and run nothing here")
    add("--trust", action="append", default=[], metavar="MODULE", help=TRUST)
    constants = [argument for argument in argv if OVERRIDE.fullmatch(argument)]
    options = parser.parse_args([argument for argument in argv if argument not in constants])
    if options.dry_run and options.slurm:
        parser.error("--dry_run and --slurm both say what to do in place of training: use one of them")
    if options.until and (options.tuned or options.slurm):
        parser.error("--until is for runs without --tune, which needs finished ones, and without --slurm")
    for flag, given in (("set", options.settings), ("tune", options.tuned)):
        twice = [key for key, _ in given if [other for other, _ in given].count(key) > 1]
        if twice:
            parser.error(f"--{flag} {twice[0]} is given twice: give all its values at once")
    return options, constants


def grid_of(options: argparse.Namespace, constants: Sequence[str]) -> Grid:
    """What is asked for."""
    name, methods = methods_of(options.config, options.mixers, options.linears)
    return Grid(
        name, methods, dict(options.settings), dict(options.tuned), constants, options.out, options.trust
    )  # fmt: skip


class Sweep:
    """The runs of a grid: those of the tuning, and the final ones as far as their settings are chosen.

    Attributes:
      chosen: cell -> its setting and the score that chose it, None where there was no choice.
      lost: the cells whose runs of the tuning have all ended, and which have no setting without a divergence.
    """

    def __init__(self, options: argparse.Namespace, constants: Sequence[str]):
        self.options = options
        record.read(options.out)  # a damaged one is refused before anything starts
        self._grid = grid_of(options, constants)
        self.cells = self._grid.cells()
        self.tuning = tuning_runs(self._grid, self.cells, options.tune_seeds)
        check_runs([*self.tuning, *(run for cell in self.cells for run in self._final(cell, cell.points[0]))])
        self.chosen: dict[Cell, tuple[Mapping[str, str], float | None]] = {
            cell: (cell.points[0], None) for cell in self.cells if len(cell.points) == 1
        }
        self.lost: list[Cell] = []

    def choose(self, results: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Chooses settings, where all that is needed for it is in the results; None is a run that diverged."""
        open_cells = {run.cell for run in self.tuning if run.name not in results}
        for cell in self.cells:
            if cell not in self.chosen and (best := choose(cell, self.tuning, results)):
                self.chosen[cell] = best
        self.lost = [cell for cell in self.cells if cell not in self.chosen and cell not in open_cells]

    @property
    def without(self) -> dict[str, list[str]]:
        """The keys that some methods do not have, and these methods."""
        lacking = {
            key: [str(c.method) for c in self.cells if key not in {*c.settings, *c.points[0], *typed_keys(c.constants)}]
            for key in self._grid.keys
        }
        return {key: list(dict.fromkeys(methods)) for key, methods in lacking.items() if methods}

    @property
    def runs(self) -> list[Run]:
        """All that are known."""
        final = [run for cell in self.cells if cell in self.chosen for run in self._final(cell, self.chosen[cell][0])]
        return [*self.tuning, *final]

    @property
    def later(self) -> dict[Cell, int]:
        """How many runs of a cell follow when its setting is chosen."""
        return {cell: self.options.seeds for cell in self.cells if cell not in self.chosen and cell not in self.lost}

    def _final(self, cell: Cell, point: Mapping[str, str]) -> list[Run]:
        first = self.options.tune_seeds if self.tuning else 0
        return final_runs(self._grid, cell, point, self.options.seeds, first)

    def save(self) -> None:
        """Adds its runs and choices to sweep.json."""
        chosen = {
            str(cell): {"settings": dict(point), "validation": score, "of": [dict(other) for other in cell.points]}
            for cell, (point, score) in self.chosen.items()
            if len(cell.points) > 1
        }
        record.add(self.options.out, self._grid.config, {run.name: run.record() for run in self.runs}, chosen)


def ended_before(runs: Sequence[Run]) -> dict[str, dict[str, Any] | None]:
    """The results of runs that are finished, and None for those that diverged.

    Raises:
      Refused: a workdir has a run of another config.
    """
    results: dict[str, dict[str, Any] | None] = {}
    for run in runs:
        try:
            if (result := result_of(run)) is not None:
                results[run.name] = result
        except NonFinite:
            results[run.name] = None
        except InUse:
            continue
    return results


def command_of(run: Run, python: str = "python") -> list[str]:
    return [python, "-m", "efficient_tx.train", *run.arguments]


def dry_run(sweep: Sweep) -> None:
    """Prints the commands."""
    for run in sweep.runs:
        print(shlex.join(command_of(run)))
    for cell, count in sweep.later.items():
        print(f"# {cell}: then {count} with the best of {len(cell.points)} settings on validation")
    say_lost(sweep.lost)


def write_slurm(sweep: Sweep, ended: Mapping[str, Mapping[str, Any] | None]) -> int:
    """Writes the script for the runs that have not ended. Returns the exit status."""
    out, runs = sweep.options.out, [run for run in sweep.runs if run.name not in ended]
    diverged = [run for run in sweep.runs if run.name in ended and ended[run.name] is None]
    for run in diverged:
        print(f"not finite: {run.name}; it is not run again unless {run.workdir} is deleted", file=sys.stderr)
    say_lost(sweep.lost)
    if not runs:
        print(f"{len(sweep.runs) - len(diverged)} of {len(sweep.runs)} runs are finished in {out}, and none is left")
        return 1 if sweep.lost or any(run.purpose == "run" for run in diverged) else 0
    logs, file = out / "logs", out / "sweep.slurm"
    commands = [command_of(run, sys.executable) for run in runs]
    text = slurm.script(commands, file, logs, Path.cwd(), sweep.options.jobs)
    sweep.save()
    logs.mkdir(parents=True, exist_ok=True)
    write(file, text)
    print(f"wrote {file}, an array of {len(runs)} runs: sbatch {shlex.quote(str(file))}")
    if sweep.later:
        print(f"{sum(sweep.later.values())} more runs follow when these are finished: the same command writes them")
    return 0


def say_lost(cells: Sequence[Cell]) -> None:
    for cell in cells:
        print(f"nothing was chosen for {cell}, as its tuning failed: it is not run", file=sys.stderr)


def carry_out(sweep: Sweep, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    """Trains. Returns the exit status."""
    jobs = sweep.options.jobs or 1
    console = Console(highlight=False)
    display = Display(console, sweep.runs, sweep.later, jobs, sweep.options.until)
    runner = Runner(jobs, sweep.options.until, sweep.options.out / "logs", environment, display.show, display.say)
    sweep.save()
    try:
        with display:
            runner.carry_out(sweep.tuning)
            diverged = {name: None for name, failure in runner.failures.items() if failure.diverged}
            sweep.choose(runner.results | diverged)
            sweep.save()
            for cell, (point, score) in sweep.chosen.items():
                if score is not None:
                    display.say(f"chosen on validation ({score:.4f}): {shown(cell, point)}")
            display.runs, display.later = sweep.runs, {}
            runner.carry_out([run for run in sweep.runs if run.purpose == "run"])
    except (KeyboardInterrupt, SystemExit) as stop:
        status = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        again = shlex.join(["python", "-m", "efficient_tx.sweep", *argv])
        print(f"stopped by {signal.Signals(status - 128).name}; the same command goes on: {again}", file=sys.stderr)
        return status
    return report(sweep, runner)


def report(sweep: Sweep, runner: Runner) -> int:
    """Says what failed, and why; returns the exit status. That a value of --tune diverges is a result, not a fault."""
    faults = [run for run in runner.failures.values() if not (run.diverged and run.run.purpose == "tune")]
    for failure in runner.failures.values():
        what = "failed" if failure in faults else "out of the tuning"
        log = f"; all it said is in {failure.log}" if failure.log.exists() else ""
        print(f"{what}: {failure.run.name} ({failure.reason}){log}", file=sys.stderr)
        for line in failure.lines if failure in faults else ():
            print(f"    {line}", file=sys.stderr)
    without = [cell for cell in sweep.cells if cell not in sweep.chosen]
    say_lost(without)
    total = len(sweep.runs) + sweep.options.seeds * len(without)
    paused = f", {len(runner.paused)} have come to step {sweep.options.until}" if runner.paused else ""
    print(f"{len(runner.results)} of {total} runs are finished in {sweep.options.out}{paused}")
    return 1 if faults or without else 0


def main(argv: Sequence[str]) -> int:
    environment = dict(os.environ)
    jax.config.update("jax_platforms", "cpu")  # only of this process, which takes no memory of an accelerator
    options, constants = parse(argv)
    trust.allow(*options.trust, remedy="--trust={} allows it")
    try:
        sweep = Sweep(options, constants)
        ended = ended_before(sweep.runs)
        sweep.choose(ended)
        ended |= ended_before([run for run in sweep.runs if run.name not in ended])  # those that were just chosen
        for key, cells in sweep.without.items():
            print(f"{key} is set where it is a key: not in {', '.join(cells)}", file=sys.stderr)
        if options.dry_run:
            dry_run(sweep)
        elif options.slurm:
            return write_slurm(sweep, ended)
        else:
            return carry_out(sweep, environment, argv)
    except RunError as error:
        refuse(error.flag)
    except (OSError, ValueError) as error:
        refuse(error)
    return 0


def stop(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def command() -> None:
    """The command line."""
    sys.path.append(os.getcwd())  # for a task or a mixer of the user's own
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does with SIGHUP
            signal.signal(number, stop)
    # The results are files.
    commands.run(lambda: main(sys.argv[1:]), prints=False, smaller="fewer --jobs")


if __name__ == "__main__":
    command()
