"""The state of Long Range Arena's data: python -m lra --check [--data_dir=DIR]

Lists for every task where its data are, or what is missing, where it was searched and how to get it. Nothing is read or
generated. Exit status 0; 2 for a mistake on the command line.
"""

from efficient_tx.commands import Parser, leave_quietly, run

if __name__ == "__main__":
    leave_quietly()

import importlib
from collections.abc import Sequence

from efficient_tx.task import data_directory
from lra.tasks import TASKS


def check(data_dir: str | None = None) -> list[tuple[str, bool, str]]:
    """(name, whether it can be loaded, where it is or what is missing) of every task."""
    found = []
    for name, (module, options) in TASKS.items():
        there, where = importlib.import_module(module).state(data_dir, **options)
        found.append((name, there, where))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser("python -m lra", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", required=True, help="list every task's data")
    parser.add_argument("--data_dir", help="default $EFFICIENT_TX_DATA or ~/.cache/efficient_tx")
    options = parser.parse_args(arguments)
    width = max(map(len, TASKS))
    # One line each, never cut: it holds commands and paths to copy.
    try:
        found = check(options.data_dir)
    except OSError as error:  # a name that is too long
        parser.error(f"--data_dir={options.data_dir:.200}: {error.strerror}")
    print(f"Data in {data_directory(options.data_dir)}; other places: task.source (lra/README.md)")
    for name, there, where in found:
        print(f"{name:{width}}  {'ready  ' if there else 'missing'}  {where}")


if __name__ == "__main__":
    run(main)
