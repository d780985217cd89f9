"""Plan: the runs of a sweep, each with a name, a workdir, its command and its resolved config."""

import contextlib
import dataclasses
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from efficient_tx.checks import OptionError
from efficient_tx.config.check import check
from efficient_tx.config.errors import ConfigError, at
from efficient_tx.config.flags import concerning, typed_keys, typed_values
from efficient_tx.config.keys import concerns, flatten, section_of
from efficient_tx.config.load import ConfigFile
from efficient_tx.config.names import DEEPEST, parse_mixers, section_name
from efficient_tx.models.pyramid import stage_sizes
from efficient_tx.training.workdir import FREE_KEYS

# Keys of which each run has a value of its own, and what says which.
OWN = {
    "seed": "seeds of a sweep, and 0 elsewhere",
    "mixers": "mixers",
    "linear.mlp.name": "linears",
    "linear.projections.name": "linears",
}
LONGEST_NAME = 150


@dataclasses.dataclass(frozen=True)
class Method:
    """Mixers and structures of a model.

    Attributes:
      mixers: pattern over the layers, "gla*3,softmax".
      linears: "dense", or "monarch+low_rank" with another structure in the projections.
    """

    mixers: str
    linears: str

    @property
    def argument(self) -> str:
        """What follows the colon of a config's path."""
        return f"{self.mixers}+{self.linears}"

    def __str__(self) -> str:
        return self.mixers if self.linears in ("dense", "dense+dense") else self.argument


def methods_of(
    config: str, mixers: Sequence[str] | None, linears: Sequence[str] | None
) -> tuple[str, list[Method]]:  # fmt: skip
    """The path of a config without its argument, and every combination of the mixers and structures.

    Args:
      mixers, linears: None is those of the config.

    Raises:
      OptionError: they are given, and the path has an argument; or both name structures.
      ConfigError, OSError: it is no config.
    """
    name, colon, _ = config.partition(":")
    if colon and (mixers or linears):
        rule = "what follows the colon is what mixers and linears are for: leave out one of them"
        raise OptionError("config", config, rule)
    for pattern in mixers or ():
        if linears and "+" in pattern:
            raise OptionError(
                "mixers", pattern, "it names structures, which linears does for all: leave out one of them"
            )
    plain = ConfigFile(config).config()
    own = "+".join(plain.linear[part].name for part in ("mlp", "projections"))
    return name, [
        Method(pattern, structures)
        for pattern in mixers or [plain.mixers]
        for structures in linears or [own.removesuffix("+dense")]
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """A method under settings: what runs of several seeds repeat.

    Attributes:
      method: of the models.
      settings: dotted key -> value as typed, of --set.
      points: the settings of --tune among which validation chooses; `[{}]` if there is nothing to choose.
      constants: "--config.KEY=VALUE" for all runs, without keys that the method does not have.
    """

    method: Method
    settings: Mapping[str, str]
    points: Sequence[Mapping[str, str]]
    constants: Sequence[str] = ()

    def __str__(self) -> str:
        return shown(self.method, self.settings)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run of a sweep.

    Attributes:
      name: of its folder; it has no character that a shell or a pattern of paths minds.
      purpose: "tune" for a run that only helps to choose a setting, else "run".
      arguments: of train.py.
      config: resolved.
      typed: the keys that the arguments give a value.
    """

    name: str
    cell: Cell
    settings: Mapping[str, str]
    seed: int
    purpose: str
    workdir: Path
    arguments: Sequence[str]
    config: ConfigDict
    typed: frozenset[str]

    def record(self) -> dict[str, Any]:
        """What sweep.json says of it."""
        about = {"method": str(self.cell.method), "settings": dict(self.settings), "seed": self.seed}
        return {**about, "cell": str(self.cell), "purpose": self.purpose, "arguments": list(self.arguments)}


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a sweep is asked for.

    Attributes:
      config: path of the config file, or its shipped name, without an argument.
      methods: which are compared.
      settings: key -> values of --set: every combination is a cell.
      tuned: key -> values of --tune: of the combinations validation chooses one for each cell.
      constants: "--config.KEY=VALUE" for all runs whose method has the key.
      out: the folder of the sweep.
      trusted: modules that --trust names.
    """

    config: str
    methods: Sequence[Method]
    settings: Mapping[str, Sequence[str]]
    tuned: Mapping[str, Sequence[str]]
    constants: Sequence[str]
    out: Path
    trusted: Sequence[str] = ()

    @property
    def keys(self) -> list[str]:
        """Those that are given values."""
        return [*self.settings, *self.tuned, *typed_keys(self.constants)]

    def cells(self) -> list[Cell]:
        """The cells, method by method.

        Raises:
          ConfigError: a key that no method has, or that something else sets; or a constant that each run has its own
            of.
        """
        cells, used = [], set()
        for key in self.keys:
            if key in OWN:
                raise ConfigError(key, f"is set by --{OWN[key]}: leave it out")
        for key in (*self.settings, *self.tuned):
            self._check_free(key)
        for method in self.methods:
            keys = flatten(self._plain(method))
            mine = {key for key in self.keys if concerns(key, keys)}
            used |= mine
            constants = concerning(self.constants, keys)
            points = combinations({key: values for key, values in self.tuned.items() if key in mine})
            for settings in combinations({key: values for key, values in self.settings.items() if key in mine}):
                cells.append(Cell(method, settings, points, constants))
        for key in self.keys:
            if key not in used:
                section_of(self._plain(self.methods[0]), key)  # names the nearest
        return cells

    def _plain(self, method: Method) -> ConfigDict:
        """The config of a method without settings."""
        return ConfigFile(f"{self.config}:{method.argument}").config()

    def _check_free(self, key: str) -> None:
        if key in self.settings and key in self.tuned:
            raise ConfigError(key, "is set by both --set and --tune: use one of them")
        if key in typed_keys(self.constants):
            raise ConfigError(key, "is given one value for all runs, and others here: leave out one of the two")

    def run(self, cell: Cell, point: Mapping[str, str], seed: int, purpose: str) -> Run:
        """The run of a cell with a point of its grid.

        Raises:
          OptionError, ConfigError: the config cannot be resolved.
        """
        settings = {**cell.settings, **point}
        overrides = [*cell.constants, *(f"--config.{key}={value}" for key, value in settings.items())]
        overrides.append(f"--config.seed={seed}")
        path = f"{self.config}:{cell.method.argument}"
        file = ConfigFile(path)
        with naming(settings):
            typed, _ = typed_values(file, ["sweep", *overrides])
            config = file.resolve(typed)
        name = run_name(cell.method, settings, seed, purpose)
        return Run(
            name=name,
            cell=cell,
            settings=settings,
            seed=seed,
            purpose=purpose,
            workdir=self.out / name,
            arguments=[
                f"--config={path}",
                f"--workdir={self.out / name}",
                *overrides,
                *(f"--trust={module}" for module in self.trusted),
            ],
            config=config,
            typed=frozenset(typed),
        )


def combinations(values: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every combination of a value for each key: {"a": [1, 2]} -> [{"a": 1}, {"a": 2}], and {} -> [{}]."""
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


@contextlib.contextmanager
def naming(settings: Mapping[str, str]) -> Iterator[None]:
    """Puts "KEY=VALUE: " in front of the error of a setting."""
    try:
        yield
    except ConfigError as error:
        if error.key not in settings:
            raise
        raise ValueError(f"{error.key}={settings[error.key]}: {error}") from None


def run_name(method: Method, settings: Mapping[str, str], seed: int, purpose: str) -> str:
    """A name for a folder: "gla.3-softmax+monarch_learning_rate=1e-4_seed0"."""
    last = [key.rpartition(".")[2] for key in settings]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(settings, last)}
    parts = [str(method), *(f"{short[key]}={value}" for key, value in settings.items())]
    text = "_".join([*parts, *["tune"] * (purpose == "tune"), f"seed{seed}"])
    name = re.sub(r"[^\w.+=-]", "-", text.replace("*", "."), flags=re.ASCII)
    if len(name) <= LONGEST_NAME and not name.startswith(("-", ".")):
        return name
    return f"run-{zlib.crc32(text.encode()):08x}_{name.lstrip('.-')[-LONGEST_NAME:]}"


def identity(run: Run) -> tuple[tuple[str, str], ...]:
    """Equal for two runs that would compute the same. The mixers count as the layers have them, not as they are typed.

    Raises:
      ConfigError: the model's stages do not fit together.
    """
    layers = mixers_of(run.config)
    values = {**flatten(run.config), "mixers": layers}
    unused = {section for section in run.config.attention if section not in map(section_name, layers)}
    return tuple(
        (key, repr(x))
        for key, x in sorted(values.items())
        if key not in FREE_KEYS and not (key.startswith("attention.") and key.split(".")[1] in unused)
    )


def mixers_of(config: ConfigDict) -> list[str]:
    """The mixer of every layer, or of every stage of a model with stages: "gla" and "gla*2" on two layers are one."""
    pattern, model = parse_mixers(config.mixers), config.model
    if "layers" in model:
        depth = model.layers
    else:
        with at("model"):
            sizes = stage_sizes(model.size, features=model.features, depths=model.depths, heads=model.heads)
        depth = len(sizes[0])
    # A depth that cannot be is refused by `check`.
    return [pattern[i % len(pattern)] for i in range(min(max(depth, 1), DEEPEST))]


def check_runs(runs: Iterable[Run]) -> None:
    """Checks every config, and that no two runs are the same or share a folder.

    Raises:
      ConfigError: a config that cannot work.
      ValueError: two runs of one config or of one name.
    """
    same, named, checked = {}, {}, set()
    for run in runs:
        mine = shown(run.cell.method.argument, run.settings)
        if (other := same.setdefault(identity(run), mine)) is not mine:
            raise ValueError(f"{other} and {mine} have equal configs, and would be the same run: leave out one of them")
        if (other := named.setdefault(run.name.lower(), mine)) is not mine:
            raise ValueError(f"{other} and {mine} would share the folder {run.workdir}: sweep them in two folders")
        if mine not in checked and not (run.workdir / "config.json").exists():
            with naming(run.settings):
                check(run.config)
            checked.add(mine)


def shown(method: object, settings: Mapping[str, str]) -> str:
    """A method with settings, for people: "skyformer, optimizer.learning_rate=1e-4"."""
    return ", ".join([str(method), *(f"{key}={value}" for key, value in settings.items())])
