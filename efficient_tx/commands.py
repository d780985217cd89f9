"""What all command lines share: a mistake, Ctrl-C, lost output and too little memory are one line and an exit status.

Imports the standard library only, so that a command can call `leave_quietly` before it imports anything heavy.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

from efficient_tx.checks import nearest


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations. A mistake is one line and exit status 2; an unknown argument names the nearest flag."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any):
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    @classmethod
    def of(cls, command: str, doc: str) -> "Parser":
        """The parser of `python -m efficient_tx.COMMAND`; --help shows `doc`, what follows its first line last."""
        first, _, rest = doc.partition("\n\n")
        shown = {"description": first, "epilog": rest, "formatter_class": argparse.RawDescriptionHelpFormatter}
        return cls(prog=f"python -m efficient_tx.{command}", **shown)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{' '.join(message.split())}\n")

    def parse_args(self, args=None, namespace=None):
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(no_flag(unknown[0], [name for name in self._option_string_actions if name.startswith("--")]))
        return options


def setting(text: str) -> tuple[str, str]:
    """The type of `--set`: key and value of "KEY=VALUE"."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE, as optimizer.learning_rate=1e-4")
    return key, value


def listed(text: str) -> list[str]:
    """The parts of a list: split at semicolons if it has any, else at commas, as a pattern of mixers has commas."""
    return [part.strip() for part in text.split(";" if ";" in text else ",") if part.strip()]


def parts(text: str) -> list[str]:
    """The type of a flag with a list of at least one part."""
    if not listed(text):
        raise argparse.ArgumentTypeError("it is empty")
    return listed(text)


def no_flag(argument: str, known: Collection[str], *, of: str = "") -> str:
    """The line on an argument that is none of the `known` flags (" of COMMAND"): what it may have meant."""
    name, equals, value = argument.partition("=")
    near = nearest(f"--{name.lstrip('-')}", known)
    if argument.startswith("-"):
        return f"{argument} is no flag{of}: the nearest is {near}"
    return f"{argument!r} is no flag{of}: flags begin with two dashes, as {near}{equals}{value}"


def names_of(known: Collection[str], noun: str) -> Callable[[str], list[str]]:
    """The parser of a flag that lists some of the `known` names, each a `noun`. It returns them in the known order."""

    def names(text: str) -> list[str]:
        given = parts(text)
        for name in given:
            if name not in known:
                near = nearest(name, known)
                raise argparse.ArgumentTypeError(
                    f"{name!r} is no {noun}: choose of {', '.join(known)} (nearest: {near!r})"
                )
        return [name for name in known if name in given]

    return names


_own_process = False


def leave_quietly() -> None:
    """Ctrl-C ends the process at once, with 130 and without a word: nothing has begun, or all is done.

    A process that ignores it, as the background of a script does, goes on ignoring it. Such a process is the command's
    own: if it fails, it ends at once, whatever its threads and the other processes of a run still wait for.
    """
    global _own_process
    _own_process = True
    _end_at_interrupt()


def _end_at_interrupt() -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))


def run(main: Callable[[], Any], *, prints: bool = True, smaller: str = "smaller sizes") -> NoReturn:
    """Calls `main` and exits with its status (None is 0).

    Output that nobody reads (`| head`), or that does not fit on the disk, does not stop the command: one line on
    standard error says so. The exit status is then 1, unless the command's results are files.

    Args:
      main: the command.
      prints: whether what it prints on standard output is its result.
      smaller: what needs less memory, said if there is too little.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with _streams() as lost:
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
        except KeyboardInterrupt:
            print("stopped by SIGINT", file=sys.stderr)
            status = 128 + signal.SIGINT
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            print(f"out of memory ({' '.join(str(error).split())[:300]}): use {smaller}", file=sys.stderr)
            status = 2
        sys.stdout.flush()
        if prints and lost and not status:
            status = 1
    if _own_process and isinstance(status, int) and status:
        os._exit(status)
    raise SystemExit(status)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, Python's or that of a device of jax."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


class _Stream(io.FileIO):
    """The file of a standard stream. What cannot be written is dropped; the first time, `say` gets the reason."""

    def __init__(self, file: int, say: Callable[[str], None]):
        super().__init__(file, "w", closefd=False)
        self._lost, self._say = False, say

    def write(self, content: Any) -> int | None:
        try:
            return super().write(content)
        except OSError as error:
            if not self._lost:
                self._lost = True
                self._say(error.strerror or str(error))
            return memoryview(content).nbytes


@contextlib.contextmanager
def _streams() -> Iterator[list[str]]:
    """Standard output and error that never raise, while open; yields a list, of the reason why output was lost.

    Characters that a stream's encoding lacks are escaped. Streams that somebody else replaces, before or meanwhile, are
    left as they are.
    """
    before, lost = (sys.stdout, sys.stderr), []

    def opened(stream: Any, default: Any, say: Callable[[str], None]) -> Any:
        if stream is None:  # closed before the start, as by `>&-`
            return open(os.devnull, "w")
        if stream is not default:
            return stream
        stream.flush()
        return io.TextIOWrapper(
            io.BufferedWriter(_Stream(stream.fileno(), say)),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )

    def say(reason: str) -> None:
        lost.append(reason)
        print(f"standard output: {reason}; what follows is not shown", file=sys.stderr)

    sys.stderr = opened(sys.stderr, sys.__stderr__, lambda reason: None)
    sys.stdout = opened(sys.stdout, sys.__stdout__, say)
    ours = (sys.stdout, sys.stderr)
    try:
        yield lost
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        _end_at_interrupt()
        now = (sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = (old if one is own else one for old, own, one in zip(before, ours, now))
