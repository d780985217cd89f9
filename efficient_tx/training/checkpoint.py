"""Checkpoints: trees of arrays on disk, with a CRC-32 of every array and every file. Only this module uses Orbax.

A checkpoint is written under a temporary name, read back, and renamed. So a killed process leaves the older
checkpoints as they were, and every one that has its name opens. Orbax loads a flipped bit without an error; the CRCs
detect it. The CRCs of the arrays prove that the loaded arrays are the saved ones. The CRCs of the files also cover the
copies that Orbax writes but does not read.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from efficient_tx.training.disk import still_there, write_json, writing
from efficient_tx.training.errors import Refused, RunError
from efficient_tx.training.processes import check_equal

# A file of every checkpoint: the CRC-32 of all its other files, by path.
FILES = "crc32.json"


class Unusable(Exception):
    """A checkpoint cannot be used. The message continues a line that begins with the checkpoint's name."""


class Damaged(Unusable):
    """A checkpoint does not open, or an array differs from what was saved."""


class Mismatch(Unusable):
    """A checkpoint is intact, but its arrays do not fit the requested tree."""


class Vanished(Refused):
    """A checkpoint was deleted while it was read."""


class Checkpoints:
    """The checkpoints of a run: `directory/<step>`. A tree that has an array `step` is that of its own step only.

    Args:
      directory: the folder; it need not exist.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self._descriptor = None

    def open(self) -> None:
        """Makes the folder if there is none. It must then stay the same as long as this object saves.

        Raises:
          RunError: it cannot be made.
        """
        if self._descriptor is None:
            with writing(self.directory):
                self.directory.mkdir(exist_ok=True, parents=True)
                self._descriptor = os.open(self.directory, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending. Only `load` detects damage."""
        if not self.directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.directory.iterdir() if re.fullmatch(r"\d+", entry.name))

    def save(self, step: int, tree: Any) -> None:
        """Writes `tree`, reads it back, and replaces a checkpoint of the same step. All processes of a run call this.

        Raises:
          RunError: it cannot be written, what is read back differs, or the processes of the run do not hold the same.
            The other checkpoints stay as they were.
          Gone: the folder was deleted or replaced since the first call.
        """
        arrays = {name: np.asarray(array) for name, array in _named(jax.device_get(tree)).items() if array.size}
        checksums = _array_checksums(arrays)
        check_equal(zlib.crc32(json.dumps(checksums).encode()), f"the parameters of step {step}")
        path = self.directory / str(step)
        part = self.directory / f"{step}.part"
        writer = jax.process_index() == 0
        if writer:
            self.open()
            still_there(self._descriptor, self.directory)
        with writing(path), _quiet():
            try:
                ocp.save(_plain(part), arrays, overwrite=True, custom_metadata={"crc32": checksums})
            except ValueError as error:
                # tensorstore reports the operating system's errors as text.
                number = re.search(r"os_error_code='(\d+)'", str(error))
                if number is None:
                    raise
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            # In all processes, as Orbax counts what they do together; they wait for each other at its end.
            _verify(part, checksums)
            if writer:
                still_there(self._descriptor, self.directory)
                write_json(part / FILES, _file_checksums(part))
                self._delete(step)
                os.replace(part, path)

    def load(self, step: int, like: Any) -> Any:
        """Returns the tree saved at `step`, verified, in the structure of `like` (arrays or `jax.ShapeDtypeStruct`).

        It may have been saved on another number of devices.

        Raises:
          Unusable: see its subclasses.
        """
        return _fit(self.arrays(step), like)

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Returns the verified arrays saved at `step`, by dotted path: "params.blocks.0.norm.scale".

        Raises:
          Damaged: the checkpoint does not open, differs from what was saved, or is that of another step.
        """
        arrays = _read(self.directory / str(step))
        if (own := int(arrays.get("step", step))) != step:
            raise Damaged(f"holds the state of step {own}: its folder was renamed")
        return arrays

    def first_usable(
        self,
        steps: list[int],
        like: Callable[[int], Any],
        warn: Callable[[str], None],
        passing: type[Unusable] = Unusable,
    ) -> tuple[int, Any] | tuple[None, None]:
        """The first of `steps` that loads, and its tree in the structure like(step); (None, None) if `steps` is empty.

        If a checkpoint raises the error `passing`, `warn` gets one line, and the next checkpoint is tried.

        Raises:
          Refused: no checkpoint loads, or one raises another `Unusable` error.
          Vanished: one was deleted meanwhile.
        """
        for step, following in zip(steps, [*steps[1:], None]):
            try:
                return step, self.load(step, like(step))
            except Unusable as error:
                line = f"checkpoint {self.directory / str(step)} {error}"
                if not (self.directory / str(step)).is_dir():
                    raise Vanished(f"checkpoint {self.directory / str(step)} was deleted meanwhile") from None
                if not isinstance(error, passing):
                    raise Refused(line) from None
                if following is None:
                    raise Refused(f"{line}; no other is left") from None
                warn(f"{line}; using {following} instead")
        return None, None

    def prune(self, keep: int, *, newest: int, best: int | None) -> None:
        """Deletes all checkpoints except `best` and the `keep` newest up to step `newest`.

        Checkpoints after `newest` were unusable when the run resumed from an older one.
        """
        steps = self.steps()
        kept = {step for step in steps if step <= newest}
        kept = set(sorted(kept)[-max(keep, 1) :]) | {best}
        for step in steps:
            if step not in kept:
                self._delete(step)
        self.clean()

    def clean(self) -> None:
        """Removes checkpoints that killed processes left half written or half deleted."""
        if self.directory.is_dir():
            for entry in self.directory.iterdir():
                if re.fullmatch(r"\d+\..*", entry.name):
                    shutil.rmtree(entry, ignore_errors=True)

    def _delete(self, step: int) -> None:
        """Removes a checkpoint by one rename; `clean` frees the space."""
        path, deleted = self.directory / str(step), self.directory / f"{step}.deleted"
        if path.exists():
            shutil.rmtree(deleted, ignore_errors=True)
            with writing(path):
                os.replace(path, deleted)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with _quiet():
            files = json.loads((path / FILES).read_text())
            changed = [name for name, checksum in files.items() if zlib.crc32((path / name).read_bytes()) != checksum]
            if changed:
                raise Damaged(f"is damaged: {changed[0]} is not the file that was written (CRC-32 differs)")
            checksums = ocp.metadata(_plain(path)).custom_metadata["crc32"]
            arrays = ocp.load(_plain(path))
    except Damaged:
        raise
    # Damaged files make Orbax and tensorstore raise errors of any type.
    except Exception as error:
        reason = re.split(r"\n|\[tensorstore|https?:", str(error))[0].strip()
        raise Damaged(f"does not open ({type(error).__name__}: {reason[:300]})") from error
    if wrong := _changed(arrays, checksums):
        raise Damaged(f"is damaged: the bytes of {wrong[0]} are not those that were saved (CRC-32 differs)")
    return arrays


def _verify(path: Path, checksums: dict[str, int]) -> None:
    """Reads a checkpoint back. Raises RunError if it differs from what was saved."""
    try:
        wrong = _changed(ocp.load(_plain(path)), checksums)
    except Exception as error:
        raise RunError(f"cannot write {path}: it does not open again ({type(error).__name__})") from error
    if wrong:
        raise RunError(f"cannot write {path}: {wrong[0]} comes back with other bytes than were written")


def _changed(arrays: dict[str, np.ndarray], checksums: dict[str, int]) -> list[str]:
    """Names of the arrays that do not have the checksums."""
    actual = _array_checksums(arrays)
    return [name for name in sorted(checksums.keys() | actual.keys()) if checksums.get(name) != actual.get(name)]


def _plain(path: Path) -> Path:
    """The absolute path, by way of a symbolic link to its folder if it is no plain one.

    Orbax looks for files by patterns that begin with the path, so that it finds none under a folder "run[1]";
    it takes "gs:/run" for an address, and tensorstore turns backslashes into slashes. All processes of a run have to
    give the same path, so the name of the link is a hash of the folder's.
    """
    path = path.absolute()
    if _is_plain(path):
        return path
    temporary = Path(tempfile.gettempdir())
    links = (temporary if _is_plain(temporary) else Path("/tmp")) / f"efficient_tx-{os.getuid()}"
    links.mkdir(mode=0o700, exist_ok=True)
    if links.lstat().st_uid != os.getuid():
        raise PermissionError(errno.EACCES, f"{links} belongs to another user")
    link = links / hashlib.sha256(os.fsencode(path.parent)).hexdigest()
    with contextlib.suppress(FileExistsError):
        link.symlink_to(path.parent)
    return link / path.name


def _is_plain(path: Path) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_./+=,@-]*", str(path)) is not None


def _fit(arrays: dict[str, np.ndarray], like: Any) -> Any:
    """Returns `arrays` in the structure of `like`, or raises Mismatch with the first differences."""
    wanted = {name: leaf for name, leaf in _named(like).items() if leaf.size}
    problems = []
    for name in [*wanted, *(arrays.keys() - wanted.keys())]:
        if name not in arrays:
            problems.append(f"it has no {name}")
        elif name not in wanted:
            problems.append(f"it has {name}, which is not asked for")
        elif (arrays[name].shape, arrays[name].dtype) != (wanted[name].shape, wanted[name].dtype):
            problems.append(f"{name} is {_describe(arrays[name])} in it and {_describe(wanted[name])} here")
    if problems:
        more = f"; and {len(problems) - 3} more" if problems[3:] else ""
        raise Mismatch(f"does not fit: {'; '.join(problems[:3])}{more}")
    leaves = [arrays[name] if leaf.size else np.zeros(leaf.shape, leaf.dtype) for name, leaf in _named(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(leaf) for leaf in leaves])


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted path in the tree, "params.blocks.0.norm.scale"."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in paths
    }
    if len(named) != len(paths):
        raise ValueError("two arrays of the tree have the same dotted path")
    return named


def _describe(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _array_checksums(arrays: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: zlib.crc32(np.ascontiguousarray(array).tobytes()) for name, array in arrays.items()}


def _file_checksums(path: Path) -> dict[str, int]:
    return {str(file.relative_to(path)): zlib.crc32(file.read_bytes()) for file in path.rglob("*") if file.is_file()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the messages of Orbax: the caller reports an error in one line."""
    _ignore_abandoned()
    level = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


@functools.cache
def _ignore_abandoned() -> None:
    """Silences late messages of coroutines and callbacks that a failed Orbax call abandons, for the whole process."""
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def ignore_closed_loops(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = ignore_closed_loops
