"""Writes a task as npz shards: python -m lra.export TASK --out=DIR [--data_dir=DIR] [--OPTION=VALUE ...]

For users of other frameworks. An OPTION is one of the task's `get_task`: --seed=1, --max_len=1000, --source=...
DIR/TASK then holds these files, which numpy alone can read:

    train-00000-of-00012.npz ...   validation-..., test-...: examples in order, SHARD to a shard
    task.json                      kind, classes, vocabulary, lengths, source, options (the seed too), sizes, baselines
    SHA256SUMS                     checksums of all of these, for `sha256sum -c`

In a shard, "label" is int32 `[n]`. The tokens of example i are inputs[offsets[i]:offsets[i + 1]], and of pairs also
inputs2[offsets2[i]:offsets2[i + 1]]. If a task has its own "mask", it is stored like inputs. Nothing is padded. The
folder appears complete or not at all, and the same options give the same shards.

Exit status: 0 written; 1 the disk is full; 2 any other error, in one line; 130 stopped by Ctrl-C.
"""

import argparse
import errno
import hashlib
import importlib
import inspect
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from efficient_tx.commands import Parser, run
from efficient_tx.files import local_path
from efficient_tx.task import Source, Task
from lra import parallel
from lra.tasks import TASKS

SHARD = 8192
ABOUT = ("name", "source", "kind", "num_classes", "vocab_size", "max_len")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def export(task: Task, folder: pathlib.Path, options: dict[str, Any]) -> None:
    """Writes `task`, made with `options`, into `folder`.

    Raises:
      OSError: it cannot be written; FileExistsError if it is not empty.
    """
    check_empty(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(prefix=".exporting-", dir=folder.parent))
    try:
        sizes = {}
        for split in ("train", "validation", "test"):
            source = getattr(task, split)
            sizes[split] = len(source)
            _write_split(source, split, work)
        about = {name: getattr(task, name) for name in ABOUT}
        about |= {"baselines": dict(task.baselines), "options": options, "sizes": sizes, "shard": SHARD}
        (work / "task.json").write_text(json.dumps(about, indent=2) + "\n")
        sums = [f"{_checksum(path)}  {path.name}\n" for path in sorted(work.iterdir())]
        (work / "SHA256SUMS").write_text("".join(sums))
        work.chmod(0o755)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_empty(folder: pathlib.Path) -> None:
    """Raises an OSError unless `folder` is empty or can be created; FileExistsError if it is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(errno.EEXIST, "is not empty: remove it, or choose another folder", str(folder))
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise PermissionError(errno.EACCES, "no folder can be made there: choose another place", str(above))


def _write_split(source: Source, split: str, folder: pathlib.Path) -> None:
    shards = -(-len(source) // SHARD)
    with parallel.progress(split, len(source)) as advance:
        for shard in range(shards):
            examples = [source[i] for i in range(shard * SHARD, min((shard + 1) * SHARD, len(source)))]
            arrays = {"label": np.array([example["label"] for example in examples], np.int32)}
            for name, offsets in (("inputs", "offsets"), ("inputs2", "offsets2"), ("mask", None)):
                if name in examples[0]:
                    arrays[name] = np.concatenate([example[name] for example in examples])
                    if offsets:
                        lengths = [len(example[name]) for example in examples]
                        arrays[offsets] = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            np.savez(folder / f"{split}-{shard:05}-of-{shards:05}.npz", **arrays)
            advance(min((shard + 1) * SHARD, len(source)))


def _checksum(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parser(name: str | None) -> argparse.ArgumentParser:
    """The parser of the command line, with the options of the task `name`, if it is known."""
    parser = Parser("python -m lra.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--out", required=True, type=local_path, metavar="DIR", help="written to DIR/TASK")
    if name in TASKS:
        module, fixed = TASKS[name]
        for option, parameter in inspect.signature(importlib.import_module(module).get_task).parameters.items():
            if option != "bucket" and option not in fixed:
                default = parameter.default
                parser.add_argument(f"--{option}", type=_type(parameter), default=default, help=f"default {default}")
    return parser


def _type(parameter: inspect.Parameter) -> Any:
    """The function that turns an option's text into its value."""
    kind = next(iter(get_args(parameter.annotation)), parameter.annotation)
    if kind is not bool:
        return kind

    def boolean(text: str) -> bool:
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
        return text.lower() == "true"

    return boolean


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # The task determines the options and may stand anywhere among them. A word after "--OPTION" is its value.
    pairs = zip(["", *arguments], arguments)
    name = next((word for before, word in pairs if word in TASKS and not re.fullmatch(r"--\w+", before)), None)
    options = vars(_parser(name).parse_args(arguments))
    name, out = options.pop("task"), options.pop("out")
    options |= TASKS[name][1]
    try:
        check_empty(out / name)
        task = importlib.import_module(TASKS[name][0]).get_task(**options)
        # Not data_dir: the same data in another folder must give the same files.
        export(task, out / name, {key: value for key, value in options.items() if key != "data_dir"})
    except OSError as error:
        print(error if error.filename is None else f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1 if error.errno in _FULL else 2
    except (ValueError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{out / name}: {task.name} ({task.source})")
    return 0


if __name__ == "__main__":
    run(main)
