"""Runs: what workdirs hold, read and checked, and grouped into methods and into tasks that may share a table."""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficient_tx.compress.result import RECORD
from efficient_tx.config import protocols
from efficient_tx.config.protocols import HOUSEKEEPING
from efficient_tx.files import visible
from efficient_tx.sweep import record
from efficient_tx.training import summary
from efficient_tx.training.disk import decode, read_checked
from efficient_tx.training.errors import Refused
from efficient_tx.training.history import NAME, History, copies_in
from efficient_tx.training.workdir import diverged, flatten, read_config

PREDICTIONS = "predictions_test_best.npz"


@dataclasses.dataclass(frozen=True)
class Role:
    """What a run is in its sweep; that of a run of no sweep is `Role()`.

    Attributes:
      tuning: whether it only helped to choose a setting.
      tuned: the keys that the sweep chose values of.
      cell: what it repeats or helped to choose a setting of; None if the sweep does not say, as in an older version.
      instead: what tuning chose after this run's setting, which it had chosen before; else empty.
    """

    tuning: bool = False
    tuned: frozenset[str] = frozenset()
    cell: str | None = None
    instead: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One workdir.

    Attributes:
      path: the workdir.
      config: dotted key -> value.
      lines: of metrics.jsonl.
      summary: of a finished run, else None.
      role: its part in its sweep.
    """

    path: Path
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None
    role: Role

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def step(self) -> int:
        """The last step of which there is a line."""
        return max((line["step"] for line in self.lines), default=0)

    def figure(self, name: str) -> Any:
        """An entry of summary.json; None if there is none, as in an older version's."""
        return (self.summary or {}).get(name)

    @property
    def departures(self) -> frozenset[str]:
        """The keys in which it departs from its protocol; before it is finished those that the protocol itself sets."""
        told = self.figure("protocol_departures")
        if told is None:
            wanted = protocols.published(self.config["protocol"], protocols.key(of_task(self.config)))
            return frozenset(k for k, x in wanted.items() if k in self.config and frozen(self.config[k]) != frozen(x))
        return frozenset(told)

    @property
    def diverged(self) -> bool:
        """Whether it ended in numbers that are not finite."""
        return self.summary is None and diverged(self.path) is not None

    @property
    def shortened(self) -> bool:
        """Whether examples are cut to lengths that hold them, and so cost less than full-length ones."""
        return self.config.get("lengths", 1) > 1 or bool(self.config.get("task.bucket"))

    @property
    def compressed(self) -> str:
        """What made it smaller: "svd to 0.5 of bytes"; empty if nothing did."""
        if not any(key.startswith("structure.") for key in self.config):
            return ""
        try:
            asked = read_checked(self.path / RECORD)["asked"]
            budget = "" if asked["budget"] is None else f" to {asked['budget']:g} of {asked['unit']}"
            return f"{asked['method']}{budget}"
        except (OSError, ValueError, KeyError, TypeError):
            return "compressed"

    @property
    def evaluated(self) -> dict[str, Any]:
        """What eval.py wrote of the best checkpoint on the test split, of a run that need not be finished; else {}."""
        try:
            return decode((self.path / "eval_test_best.json").read_bytes())
        except (OSError, ValueError):
            return {}

    def predictions(self) -> dict[str, np.ndarray] | None:
        """What eval.py saved of the best checkpoint on the test split; None if it did not, or another was the best."""
        try:
            with np.load(self.path / PREDICTIONS) as file:
                saved = dict(file)
        except Exception:  # of a damaged archive any kind: what it is compressed and encrypted by stands in it
            return None
        return saved if "step" in saved and saved["step"] == self.figure("best_step") else None


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """Runs that differ in their seeds only.

    Attributes:
      label: mixers, structures, and what else tells it from the other methods of its task.
      runs: one for each seed.
      tuning: how many runs chose its settings.
    """

    label: str
    runs: Sequence[Run]
    tuning: int

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.summary is not None]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.runs[0].config

    @property
    def trained(self) -> str:
        """Mixers and structures, "softmax+monarch"; empty of compressed runs, which no paper trained."""
        return "" if self.runs[0].compressed else base(self.config)

    def scores(self, what: str) -> list[float]:
        """A score of every finished run: `what` is "test", "last_test" or "val"."""
        return [run.summary[f"{what}_{summary.metric(run.summary)}"] for run in self.finished]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A task with its data and a protocol: only methods of one problem are compared.

    Attributes:
      title: task, source and protocol, for people.
      methods: at least one.
    """

    title: str
    methods: Sequence[Method]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.methods[0].config

    @property
    def task(self) -> str:
        """The key of PROTOCOLS."""
        return protocols.key(of_task(self.config))

    @property
    def finished(self) -> list[Run]:
        return [run for method in self.methods for run in method.finished]

    @property
    def metric(self) -> str:
        """The score that ranks checkpoints."""
        for run in self.finished:
            return summary.metric(run.summary)
        names = {key for method in self.methods for run in method.runs for line in run.lines[:1] for key in line}
        return "accuracy" if "accuracy" in names or not names else "loss"

    @property
    def higher_is_better(self) -> bool:
        return all(summary.higher_is_better(run.summary) for run in self.finished) and self.metric != "loss"

    @property
    def baselines(self) -> dict[str, float]:
        """Answers to beat; those of a test split, which all runs share."""
        return {
            name: score
            for method in self.methods
            for run in method.runs
            for name, score in (run.figure("baselines") or run.evaluated.get("baselines") or {}).items()
        }


def find(folders: Iterable[Path], warn: Callable[[str], None]) -> list[Run]:
    """The runs in the folders: workdirs, or folders of workdirs, as of a sweep. One that is damaged gets a line."""
    found = {}
    for folder in folders:
        inside = [folder] if (folder / "config.json").exists() else []
        inside += [file.parent for file in visible(folder, "*/config.json")]
        for path in inside:
            role = role_of(path.absolute())
            if role.instead:
                warn(f"{path}: tuning over more values has chosen {role.instead} since: it is left out")
                continue
            try:
                found[path.resolve()] = load(path, role=role, warn=warn)
            except Refused as error:
                warn(f"{error}; it is left out")
    return list(found.values())


def role_of(path: Path) -> Role:
    """The role of the run in an absolute path in the sweep of the folder above it.

    Raises:
      ValueError: the sweep's record is damaged, so that runs which only chose settings would count as results.
    """
    folder = path.parent
    try:
        sweep = record.read(folder)
        tuned = frozenset(key for cell in sweep["chosen"].values() for key in cell["settings"])
        run = sweep["runs"].get(path.name, {"purpose": "run"})
        tuning, cell = run["purpose"] == "tune", run.get("cell")
        chosen = sweep["chosen"].get(cell, {"settings": {}})["settings"]
        other = {key: value for key, value in chosen.items() if not tuning and run["settings"].get(key) != value}
        instead = ", ".join(f"{key}={value}" for key, value in other.items())
        # Of cells of the same name each folder has its own.
        return Role(tuning, tuned, cell and f"{folder}: {cell}", instead)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        rest = "and which of its runs only chose settings is not known: restore it, or delete it to count them all"
        raise ValueError(f"{folder / record.NAME} is damaged, {rest}") from None


def load(path: Path, *, warn: Callable[[str], None], role: Role = Role()) -> Run:
    """The run in a workdir.

    Raises:
      Refused: there is none, or its config is damaged.
    """
    config = flatten(read_config(path))
    if missing := [key for key in ("seed", "mixers", "task.name", "protocol", "linear.mlp.name") if key not in config]:
        raise Refused(f"{path}/config.json has no {missing[0]}")
    copies = copies_in(path / "checkpoints")  # before metrics.jsonl, which a run that is going on has ahead of them
    history = History(path / NAME, writer=False)
    added = history.complete(copies)
    try:
        result = read_checked(path / "summary.json")
        summary.metric(result)
    except FileNotFoundError:
        result = None
    except (OSError, ValueError, StopIteration) as error:
        warn(f"{path}/summary.json {error}: the run counts as unfinished")
        result = None
    if added:
        warn(f"{path / NAME}: {history.damage}; {len(added)} come from the copies in its checkpoints")
    elif history.damaged:
        warn(f"{path / NAME}: {history.damage}, and left out")
    run = Run(path, config, history.lines, result, role)
    if result is None or not history.checked or run.step >= config["steps"]:
        return run
    # All finished runs are in the tables at equal amounts, which one that seems to end early would cut short.
    warn(f"{path / NAME} ends before step {config['steps']}: the run is in no curve and in no table at equal amounts")
    return dataclasses.replace(run, lines=())


def problems(runs: Sequence[Run], warn: Callable[[str], None]) -> list[Problem]:
    """The problems of the runs, each with its methods, in the order of the runs."""
    grouped: dict[Any, list[Run]] = {}
    for run in runs:
        task = {key: x for key, x in run.config.items() if key.startswith("task.") and key not in HOUSEKEEPING}
        grouped.setdefault((run.config["protocol"], frozen(task)), []).append(run)
    parts = [part for mine in grouped.values() for part in by_source(mine)]
    made = [problem(mine, warn) for mine in parts if not all(run.role.tuning for run in mine)]
    titles = [one.title for one in made]
    if len(set(titles)) == len(titles):
        return made
    # The same task with other options: these tell them apart.
    apart = differing([one.config for one in made], lambda key: key.startswith("task.") and key not in HOUSEKEEPING)
    said = [", ".join(f"{key.removeprefix('task.')} {one.config.get(key)}" for key in apart) for one in made]
    return [dataclasses.replace(one, title=f"{one.title} ({words})") for one, words in zip(made, said)]


def labels_of(problems: Sequence[Problem]) -> list[str]:
    """The labels of all methods, each once."""
    return list(dict.fromkeys(method.label for problem in problems for method in problem.methods))


def by_source(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of one config of the task, apart if their data came from different sources, wherever these lay.

    An unfinished run, which does not say, is with the first ones.
    """
    parts: dict[str, list[Run]] = {}
    unknown = []
    for run in runs:
        source = run.figure("source")
        mine = unknown if source is None else parts.setdefault(re.sub(r"(?<!\S)[~.]*/(\S*/)?", "", str(source)), [])
        mine.append(run)
    first, *others = list(parts.values()) or [[]]
    return [[*first, *unknown], *others]


def problem(runs: Sequence[Run], warn: Callable[[str], None]) -> Problem:
    """The problem that runs of one task and protocol share."""
    grouped: dict[Any, dict[int, Run]] = {}
    for run in runs:
        if run.role.tuning:
            continue
        seeds = grouped.setdefault(frozen({k: x for k, x in run.config.items() if k not in HOUSEKEEPING}), {})
        if run.seed in seeds:
            warn(f"{run.path} has the config and the seed of {seeds[run.seed].path}: it is left out")
        else:
            seeds[run.seed] = run
    groups = [[seeds[seed] for seed in sorted(seeds)] for seeds in grouped.values()]
    labels = labelled([group[0] for group in groups])
    budgets = [sum(run.role.tuning and helped(run, group) for run in runs) for group in groups]
    first = next((run for run in runs if run.summary), runs[0])
    name = first.figure("task") or first.config["task.name"].rpartition(".")[2]
    source = first.figure("source") or str(first.config.get("task.source", "unknown data"))
    title = f"{name}, {source}, protocol {first.config['protocol']}"
    return Problem(title, sorted((Method(*one) for one in zip(labels, groups, budgets)), key=place))


def helped(tuning: Run, group: Sequence[Run]) -> bool:
    """Whether a run of a tuning chose among settings for the runs of a method."""
    if tuning.role.cell is not None:
        return tuning.role.cell in [run.role.cell for run in group]

    def untuned(run: Run) -> str:
        return frozen({k: x for k, x in run.config.items() if k not in HOUSEKEEPING and k not in run.role.tuned})

    return untuned(tuning) == untuned(group[0])


def place(method: Method) -> tuple[float, str]:
    """Best test score first, those without one last."""
    if not method.finished:
        return (math.inf, method.label)
    sign = -1 if summary.higher_is_better(method.finished[0].summary) else 1
    return (sign * statistics.fmean(method.scores("test")), method.label)


def base(config: Mapping[str, Any]) -> str:
    """Mixers and structures of a config: "gla", "softmax+monarch"."""
    parts = [config["linear.mlp.name"], config.get("linear.projections.name", "dense")]
    while parts and parts[-1] == "dense":
        parts.pop()
    return "+".join([config["mixers"], *parts])


def labelled(runs: Sequence[Run]) -> list[str]:
    """A label for each run: its base, what compressed it, and the keys in which it differs from others of that base."""
    labels = []
    for run in runs:
        apart = differing([other.config for other in runs if base(other.config) == base(run.config)], counts)
        last = [key.rpartition(".")[2] for key in apart]
        short = [name if last.count(name) == 1 else key for key, name in zip(apart, last)]
        own = [f"{name}={run.config.get(key)}" for key, name in zip(apart, short)]
        labels.append(", ".join([base(run.config), *filter(None, [run.compressed]), *own]))
    # Such as results of one method in other layers.
    return [label if labels.count(label) == 1 else f"{label} ({run.path})" for label, run in zip(labels, runs)]


def counts(key: str) -> bool:
    """Whether a key tells methods apart: not the forms of compressed layers, but what made them, `Run.compressed`."""
    return key not in HOUSEKEEPING and not key.startswith("structure.")


def differing(configs: Sequence[Mapping[str, Any]], counts: Callable[[str], bool] = lambda key: True) -> list[str]:
    """The keys in which configs differ, among those that count."""
    keys = sorted({key for config in configs for key in config if counts(key)})
    return [key for key in keys if len({frozen({key: config.get(key)}) for config in configs}) > 1]


def of_task(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the task."""
    return {key.removeprefix("task."): x for key, x in config.items() if key.startswith("task.")}


def frozen(values: Any) -> str:
    return json.dumps(values, sort_keys=True)
