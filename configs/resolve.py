"""From flags to one resolved config, and every mistake to one line.

Precedence: base < protocol < the argument after the colon < what was typed as --config.KEY=VALUE, in any order.
"""

import copy
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from configs import protocols
from configs.base import make_config
from efficient_tx.attention import ATTENTION
from efficient_tx.build import check, complete, task_module
from efficient_tx.linear import LINEAR
from efficient_tx.names import nearest
from efficient_tx.training import workdir

# What the argument after the colon names.
NAMES = ("mixers", "linear.mlp.name", "linear.projections.name")
# Between a run's seed and that of generated data for evaluating it where the splits have moved.
FAR = 2**31
# Keys and sections that evaluation reads: what `--set` may change.
EVALUATED = ("mixers", "attention", "linear", "model", "task", "dtype")


def refuse(message: object) -> NoReturn:
    """Prints one line on standard error and exits with 2."""
    print(" ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def shipped() -> list[str]:
    """The config files beside this one, as paths from the working directory."""
    folder = Path(os.path.relpath(Path(__file__).parent))
    return sorted(str(path) for path in folder.glob("*.py") if "\ndef get_config(" in path.read_text())


def load(path: str) -> ConfigDict:
    """The config of "FILE.py:ARGUMENT", before flags.

    Raises:
      ValueError: no such file, one without get_config, or an argument that it refuses.
    """
    file, _, argument = path.partition(":")
    if not (file.endswith(".py") and Path(file).is_file()):
        raise ValueError(f"--config={path}: there is no config file {file}; the nearest is {nearest(file, shipped())}")
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config={path}: {file} has no get_config")
    try:
        return module.get_config(argument) if argument else module.get_config()
    except ValueError as error:
        raise ValueError(f"--config={path}: {error}") from None


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Dotted key -> value, over all sections."""
    return workdir.flatten(config.to_dict())


def section_of(config: ConfigDict, key: str, origin: str) -> ConfigDict:
    """The section that holds the dotted key.

    Raises:
      ValueError: there is no such key; the nearest is named.
    """
    flat = flatten(config)
    if key not in flat:
        hint = f"the nearest is {nearest(key, flat)}"
        if key.startswith("attention."):
            hint += f"; the mixers here are {config.mixers}, to be chosen as --config=FILE.py:MIXERS"
        raise ValueError(f"{origin}: there is no key {key}; {hint}")
    for name in key.split(".")[:-1]:
        config = config[name]
    return config


def assign(config: ConfigDict, key: str, value: Any, origin: str) -> None:
    """config.key = value, in place.

    Raises:
      ValueError: there is no such key, or it holds another type.
    """
    section, last = section_of(config, key, origin), key.rpartition(".")[2]
    try:
        section[last] = value
    except (TypeError, ValueError):
        kind = section.get_type(last).__name__
        raise ValueError(f"{origin}: {key} takes a value of type {kind}, not {value!r}") from None


def protocol_settings(config: ConfigDict) -> dict[str, Any]:
    """What the config's protocol says about its task, options of mixers that it does not have aside."""
    settings = protocols.settings(config.protocol, protocols.key(config.task))
    return {
        key: x
        for key, x in settings.items()
        if key.split(".")[0] != "attention" or key.split(".")[1] in config.attention
    }


def resolve(config: ConfigDict, typed: Mapping[str, Any]) -> ConfigDict:
    """The config with the protocol's settings under the typed ones.

    Raises:
      ValueError: an unknown protocol or key.
    """
    config = copy.deepcopy(config)
    for key in ("protocol", "model.name", "task.resolution", *NAMES):
        if key in typed:
            assign(config, key, typed[key], f"--config.{key}={typed[key]}")
    config = complete(config)
    for key, value in protocol_settings(config).items():
        assign(config, key, value, f"protocol {config.protocol}")
    for key, value in typed.items():
        assign(config, key, value, f"--config.{key}={value}")
    return config


def restore(stored: Mapping[str, Any]) -> ConfigDict:
    """The config of a run from its config.json, with the types that JSON loses (tuples, and what may be None).

    Raises:
      ValueError: a key is missing, or one that this version does not have.
    """
    flat = flatten(ConfigDict(stored))
    missing = {"task.name", *NAMES} - set(flat)
    if missing:
        raise ValueError(f"config.json has no {min(missing)}: it is damaged, or of another version")
    model = {"model": {"name": flat["model.name"]}} if "model.name" in flat else {}  # older runs have no such key
    config = make_config(flat["task.name"], "+".join(flat[name] for name in NAMES), **model)
    for key, value in flat.items():
        if value is not None:
            assign(config, key, tuple(value) if isinstance(value, list) else value, f"config.json, {key}={value}")
    return config


def parse_value(config: ConfigDict, key: str, text: str, origin: str) -> Any:
    """`text` as a value of the type that `config.key` has.

    Raises:
      ValueError: there is no such key, or `text` is no such value.
    """
    kind = section_of(config, key, origin).get_type(key.rpartition(".")[2])
    parse = {bool: {"true": True, "false": False}.__getitem__, tuple: parse_tuple}.get(kind, kind)
    try:
        return parse(text.lower() if kind is bool else text)
    except (KeyError, ValueError):
        raise ValueError(f"{origin}: {key} takes a value of type {kind.__name__}, not {text!r}") from None


def parse_tuple(text: str) -> tuple[int | str, ...]:
    """The parts of `text` between commas, as numbers if all of them are."""
    parts = text.split(",")
    try:
        return tuple(map(int, parts))
    except ValueError:
        return tuple(parts)


def apply_settings(stored: Mapping[str, Any], settings: Mapping[str, str], split: str = "test") -> ConfigDict:
    """The config of a run's config.json with eval.py's `--set KEY=VALUE`; names of mixers and structures come first.

    No example of the evaluated split is one that the run was trained on (`hold_out`), but for short ListOps expressions
    and the like, which chance draws again.

    Raises:
      ValueError: an unknown key, a value of another type, or a key that evaluation does not read, or must not change.
    """
    config = restore(stored)
    names = (*NAMES, "model.name")
    trained = copy.deepcopy(config.task)
    for key in sorted(settings, key=lambda key: key not in names):
        origin = f"--set {key}={settings[key]}"
        value = parse_value(config, key, settings[key], origin)
        if key.split(".")[0] not in EVALUATED:
            raise ValueError(f"{origin}: evaluation does not depend on {key}; it does on {', '.join(EVALUATED)}")
        assign(config, key, value, origin)
        config = complete(config) if key in names else config
    if split != "train":
        hold_out(config.task, trained, split, typed="task.seed" in settings)
    return config


def hold_out(task: ConfigDict, trained: ConfigDict, split: str, *, typed: bool) -> None:
    """Keeps training examples out of an evaluation whose options may move the splits.

    Generated data come from a seed far away instead.

    Args:
      task: the options to evaluate with; its seed may be changed.
      trained: those that the run was trained with.
      split: "validation" or "test".
      typed: whether the seed is asked for.

    Raises:
      ValueError: the data are given, so there are no others, or their seed is.
    """
    source = trained.get("source")
    if task.name != trained.name or not same_source(task.get("source"), source):
        if split == "validation":
            raise ValueError(
                "--set task.source: of other data only the test split is known to be new; use --split=test"
            )
        return
    split_by = getattr(task_module(task.name), "split_by", lambda source, split: ())
    moved = [option for option in split_by(source, split) if task[option] != trained[option]]
    if not moved or (source == "generated" and task.seed != trained.seed):
        return
    if source != "generated" or typed:
        other = "; or set another task.seed" if source == "generated" else ""
        raise ValueError(
            f"--set task.{moved[0]}={task[moved[0]]}: training examples would be in the {split} split, keep "
            f"{trained[moved[0]]}{other}"
        )
    task.seed += FAR


def same_source(one: str | None, two: str | None) -> bool:
    """Whether both are the same name, or the same place in two spellings."""
    if one is None or two is None:
        return one == two
    return Path(one).expanduser().resolve() == Path(two).expanduser().resolve()


def departures(config: ConfigDict, path: str) -> list[str]:
    """The keys of a resolved config that differ from the protocol it names.

    What a protocol leaves open is compared with the config file at `path`, for the same mixers and structures. Data of
    our own making, or others that stand in for its own, are a departure from any published protocol.
    """
    plain = load(with_names(path, {name: flatten(config)[name] for name in NAMES}))
    mine, typed = flatten(config), {"protocol": config.protocol}
    if config.protocol != "default" and "task.resolution" in mine:
        typed["task.resolution"] = mine["task.resolution"]
    theirs = flatten(resolve(plain, typed))
    different = {key for key in mine if key not in protocols.HOUSEKEEPING and mine[key] != theirs.get(key)}
    if config.protocol != "default":
        stands_in = {"task.source"} if config.task.source in protocols.STAND_INS else set()
        different = different - {"task.source"} | stands_in
    return sorted(different)


def with_names(path: str, names: Mapping[str, str]) -> str:
    """The config path "FILE.py:ARGUMENT" with these mixers and structures in its argument."""
    if not names:
        return path
    plain = flatten(load(path))
    return f"{path.partition(':')[0]}:" + "+".join(names.get(name, plain[name]) for name in NAMES)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """The `flags_parser` of `absl.app.run`: whatever is wrong with the flags ends in one line and exit code 2."""
    argv = list(argv)
    place = next((i for i, arg in enumerate(argv) if re.match(r"--?config(=|$)", arg)), None)
    try:
        if any(re.fullmatch(r"--?(help|helpshort|h|\?)", arg) for arg in argv):
            print_help(argv[place].partition("=")[2] if place else "")
        if place is None:
            raise ValueError("--config is missing: give a config file, as --config=configs/quickstart.py")
        length = 1 if "=" in argv[place] else 2
        head, rest = argv[place : place + length], argv[1:place] + argv[place + length :]
        if any(re.match(r"--?config(=|$)", arg) for arg in rest):
            raise ValueError("--config is given twice: give one config file")
        overrides = [match for arg in rest if (match := re.match(r"--?(?:no)?config\.([^=]+)=?(.*)", arg))]
        typed = {match[1]: match[2] for match in overrides}
        # Typed names of mixers and structures bring their sections, as in the argument. ml_collections reads overrides
        # of a config that it already has, so --config goes first.
        path = re.sub(r"^--?config=", "", head[-1])
        path = with_names(path, {name: typed[name] for name in NAMES if name in typed})
        config = load(path)
        argv = [argv[0], f"--config={path}", *rest]
        for match in overrides:
            section_of(config, match[1], match[0])
        sys.argv = argv
        rest = flags.FLAGS(argv)
        check(run_config())
        return rest
    except flags.Error as error:
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error))
        if not wrong:
            refuse(error)
        kind = section_of(config, wrong[1], "").get_type(wrong[1].rpartition(".")[2]).__name__
        refuse(f"--config.{wrong[1]}={wrong[2]}: {wrong[1]} takes a value of type {kind}, not {wrong[2]!r}")
    except ValueError as error:
        refuse(error)


def print_help(path: str) -> NoReturn:
    """Prints the flags and what there is to choose from; with a config's path, all of its keys; exits with 0."""
    app.usage(writeto_stdout=True, shorthelp=True)
    print(
        f"Config files: {', '.join(shipped())}\nMixers: {', '.join(ATTENTION)}\nWeight structures: {', '.join(LINEAR)}"
    )
    print(f"Protocols: {', '.join(protocols.PROTOCOLS)}")
    if path:
        print(f"\nKeys of {path}, each set by --config.KEY=VALUE:")
        print("\n".join(f"  {key} = {value!r}" for key, value in flatten(load(path)).items()))
    else:
        print("All keys of a config, with their values: --config=FILE.py:MIXERS --help")
    raise SystemExit(0)


def run_config() -> ConfigDict:
    """The resolved config of this process's flags."""
    flag = flags.FLAGS["config"]
    return resolve(load(config_flags.get_config_filename(flag)), config_flags.get_override_values(flag))
