"""Flags: the command line of training becomes one resolved config, and every mistake one line."""

import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from efficient_tx.attention import ATTENTION
from efficient_tx.checks import OptionError
from efficient_tx.commands import no_flag
from efficient_tx.config import trust
from efficient_tx.config.check import check
from efficient_tx.config.describe import describe
from efficient_tx.config.errors import ConfigError
from efficient_tx.config.keys import concerns, flatten, nearest_key, section_of, wrong_type
from efficient_tx.config.load import ConfigFile, shipped
from efficient_tx.config.protocols import PROTOCOLS
from efficient_tx.config.resolve import NAMES
from efficient_tx.linear import LINEAR
from efficient_tx.training.errors import RunError

TRUST = "a module, or a task's file, of another place that configs may name; may be repeated"
OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)=?(.*)")


class Run(NamedTuple):
    """What the command line asks for.

    Attributes:
      config: resolved and checked.
      departures: keys that differ from the protocol that the config names.
      typed: keys that the command line gives a value.
    """

    config: ConfigDict
    departures: list[str]
    typed: Collection[str]


def invoked(command: str) -> list[str]:
    """The words that start `command`, "train" or "eval", in the same way as this process was started."""
    as_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
    return ["python", "-m", f"efficient_tx.{command}"] if as_module else ["python", f"{command}.py"]


def refuse(error: object) -> NoReturn:
    """Prints one line on standard error and exits with 2; an option is written as a flag."""
    text = f"--{error.option}={error.value}: {error.rule}" if isinstance(error, OptionError) else str(error)
    print(" ".join(text.split()), file=sys.stderr)
    raise SystemExit(2)


def answered(work: Callable[[], int | None]) -> int:
    """Calls `work`, whose mistakes are one line each; returns the exit status."""
    try:
        return work() or 0
    except RunError as error:
        print(error.flag, file=sys.stderr)
        return error.status
    except (OSError, ValueError) as error:
        refuse(error)


def parse(argv: Sequence[str], *, usage: str, own: Sequence[str]) -> Run:
    """The `flags_parser` of `absl.app.run`; `main` gets its result. Every mistake ends in one line and exit status 2.

    Args:
      argv: of the process.
      usage: first lines of --help.
      own: the command's flags, which --help lists.
    """
    program, *arguments = argv
    helped = [argument for argument in arguments if re.fullmatch(r"--?(help|helpshort|h|\?)", argument)]
    arguments = [argument for argument in arguments if argument not in helped]
    try:
        arguments = trusting(arguments)
        path, rest = split(arguments)
        if helped and path is None:
            print_help(usage, own)
        if path is None:
            raise ValueError("--config is missing: give a config, as --config=quickstart or --config=configs/mine.py")
        file = ConfigFile(path)
        typed, others = typed_values(file, [program, *rest])
        config = file.resolve(typed)
        if helped:
            print_help(usage, own, path, config)
        _, *words = flags.FLAGS(others)
        if words:
            raise ValueError(no_dashes(words[0], config, own))
        check(config)
        return Run(config, file.departures(config), typed.keys())
    except (ValueError, flags.Error) as error:
        if isinstance(error, ConfigError) and error.key in typed_keys(arguments):
            error = f"--config.{error.key}={typed_keys(arguments)[error.key]}: {error}"
        refuse(error)


def no_dashes(word: str, config: ConfigDict, own: Sequence[str]) -> str:
    """The line on an argument without dashes: the flag or the key that it may have meant, with its dashes."""
    name, equals, _ = word.partition("=")
    if name in (*own, "config", "trust"):
        flag = name
    else:
        flag = f"config.{nearest_key(config, name.removeprefix('config.'))}" if equals else "config.steps=100"
    return no_flag(word, [f"--{flag}"])


def trusting(arguments: Sequence[str]) -> list[str]:
    """Allows the modules that --trust=MODULE names, before any config is executed; returns the other arguments."""
    values = flags.FlagValues()
    flags.DEFINE_multi_string("trust", [], TRUST, flag_values=values)
    values.set_gnu_getopt(True)
    _, *others = values(["", *arguments], known_only=True)
    trust.allow(*values["trust"].value, remedy="--trust={} allows it")
    return others


def split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The path of the config file (None if there is none) and the other arguments."""
    places = [i for i, argument in enumerate(arguments) if re.match(r"--?config(=|$)", argument)]
    if not places:
        return None, list(arguments)
    if len(places) > 1:
        raise ValueError("--config is given twice: give one config file")
    (place,) = places
    end = place + (1 if "=" in arguments[place] else 2)
    path = re.sub(r"^--?config=", "", arguments[end - 1])
    return path, [*arguments[:place], *arguments[end:]]


def typed_keys(arguments: Sequence[str]) -> dict[str, str]:
    """Key -> text of the overrides --config.KEY=TEXT among the arguments."""
    return {match[1]: match[2] for argument in arguments if (match := OVERRIDE.match(argument))}


def concerning(arguments: Sequence[str], keys: Collection[str]) -> list[str]:
    """The arguments without overrides of mixers and structures that a config with these keys does not have."""
    return [argument for argument in arguments if all(concerns(key, keys) for key in typed_keys([argument]))]


def named(file: ConfigFile, typed: Mapping[str, str]) -> ConfigDict:
    """The config, whose sections are those of the mixers and structures that are typed, as in the file's argument."""
    return file.config({name: typed[name] for name in NAMES if name in typed})


def typed_values(file: ConfigFile, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Key -> value of the overrides of a config, and the other arguments.

    Raises:
      ConfigError: an unknown key, or a value of another type.
    """
    keys = typed_keys(argv)
    config = named(file, keys)
    for key in keys:
        section_of(config, key)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=list(argv))
    try:
        others = values(argv, known_only=True)
    except flags.Error as error:
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error))
        raise wrong_type(config, wrong[1], wrong[2]) if wrong else error from None
    return config_flags.get_override_values(values["config"]), others


def print_help(
    usage: str, own: Sequence[str], path: str | None = None, config: ConfigDict | None = None
) -> NoReturn:  # fmt: skip
    """Prints flags and choices, and for a resolved config all keys with values and meanings; exits with 0."""
    print(usage)
    print("\n".join(f"  --{name}: {flags.FLAGS[name].help}" for name in own))
    print(f"  --trust: {TRUST}", end="\n\n")
    print(f"Configs: {', '.join(shipped())}, or the path of a file")
    print(f"Mixers: {', '.join(ATTENTION)}, or module:Class\nWeight structures: {', '.join(LINEAR)}, or module:Class")
    print(f"Protocols: {', '.join(PROTOCOLS)}")
    if config is None:
        print("All keys of a config, with values and meanings: --config=NAME:MIXERS [--config.KEY=VALUE ...] --help")
    else:
        meanings = describe(config)
        print(f"\nKeys of {path}, each set by --config.KEY=VALUE, as this command line resolves them:")
        for key, value in flatten(config).items():
            print(f"  {key} = {value!r}\n      {meanings[key]}")
    raise SystemExit(0)
