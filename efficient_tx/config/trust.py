"""Trust: which modules and files a config may name. Naming one runs its code, and a config may come from anywhere."""

import importlib.machinery
import importlib.util
import os
import site
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from efficient_tx.files import local_path

# Modules of this project that a config names.
OURS = ("lra", "efficient_tx.data", "efficient_tx.attention", "efficient_tx.linear")

REMEDY = "efficient_tx.config.trust.allow({!r}) permits it"
_trusted: list[str] = []
_remedy = REMEDY


def allow(*names: str, remedy: str = REMEDY) -> None:
    """Lets configs name these modules, those inside them and these files, and no others but those of `refusal`.

    Args:
      *names: "package", "package.module" or the path of a file. They replace those of an earlier call.
      remedy: how a refused name is allowed, with {} for it; it ends the line of the error.
    """
    global _remedy
    _trusted[:] = names
    _remedy = remedy


def allow_file(path: str | os.PathLike) -> None:
    """Lets configs name a file that the user has named, wherever it is."""
    if refusal(name := str(Path(path).absolute())):
        _trusted.append(name)


def allowed() -> tuple[str, ...]:
    """The names of the last call of `allow`."""
    return tuple(_trusted)


def refusal(name: str) -> str | None:
    """Why a config must not name a module or a file; None if it may. Nothing is imported or executed.

    It may name modules of `OURS`; modules in the working directory, and on the parts of sys.path that the user chose
    (PYTHONPATH, the folder of the script); files in or below these; and what `allow` was given. Installed packages and
    Python's own modules are none of these, wherever the working directory is.
    """
    if name.endswith(".py"):
        path = local_path(name).absolute()
        real = os.path.realpath(path)
        permitted = real in [os.path.realpath(local_path(other)) for other in _trusted]
        permitted = permitted or (any(_below(path, folder) for folder in _chosen()) and not _installed(path))
        return None if permitted else _line(name, f"in {path.parent}")
    top = name.partition(".")[0]
    if _inside(name, OURS) or _inside(name, _trusted) or top in ("", "__main__"):
        return None
    try:
        # The top-level package alone: looking for a module inside a package imports the package.
        spec = importlib.util.find_spec(top)
    except ValueError:
        return None  # this process made it itself
    if spec is None:
        return None  # there is none, as importing it will say
    places, chosen = _places(spec), {os.path.realpath(folder) for folder in _chosen()}
    if places and all(os.path.realpath(place) in chosen and not _installed(place) for place in places):
        return None
    return _line(name, f"in {places[0]}" if places else "built into Python")


def _line(name: str, where: str) -> str:
    return (
        f"it is {where}, and a config names modules and files of the working directory, of PYTHONPATH, of lra and of "
        f"efficient_tx.data; {_remedy.format(name)}"
    )


def _inside(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _places(spec: importlib.machinery.ModuleSpec) -> list[str]:
    """The folders in which a top-level module or package lies; none for one that is built into Python."""
    if spec.submodule_search_locations is not None:
        return [os.path.dirname(os.path.abspath(folder)) for folder in spec.submodule_search_locations]
    return [os.path.dirname(os.path.abspath(spec.origin))] if spec.has_location and spec.origin else []


# Python's own modules in one file, which precedes their folder on sys.path whether or not it exists.
_ZIP = f"python{sys.version_info.major}{sys.version_info.minor}.zip"


def _chosen() -> list[str]:
    """The working directory, and the entries of sys.path before those of Python itself: PYTHONPATH and the script's."""
    own = {os.path.realpath(sysconfig.get_path("stdlib")), os.path.realpath(sysconfig.get_path("platstdlib"))}
    before = []
    for entry in sys.path:
        if os.path.realpath(entry) in own or os.path.basename(entry) == _ZIP:
            break
        before.append(entry or os.getcwd())
    return [os.getcwd(), *before]


def _installed(place: str | Path) -> bool:
    """Whether a path is in a folder of installed packages or of Python's own modules."""
    folders = {*site.getsitepackages(), site.getusersitepackages()}
    folders |= {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")}
    return any(_below(place, folder) for folder in folders) or bool(
        {"site-packages", "dist-packages"} & set(Path(os.path.realpath(place)).parts)
    )


def _below(path: str | Path, folder: str) -> bool:
    """Whether `path` is `folder` or inside it, links followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
