"""Signals: SIGTERM, Ctrl-C and a closed terminal are noted, and the loop asks for them after every step."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """While open, SIGTERM, SIGINT and SIGHUP are noted and end nothing; a second one raises KeyboardInterrupt.

    A SIGHUP that is ignored, as under nohup, stays ignored; and a second one is, as both shell and kernel send it.

    In a run of several processes, jax's preemption service passes a SIGTERM of one process to all of them, so that all
    stop after the same step.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        # With several processes, jax's service listens to SIGTERM itself.
        listened = [signal.SIGINT]
        if jax.process_count() == 1:
            listened += [signal.SIGTERM] + [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)
        self._previous = {number: signal.signal(number, self._note) for number in listened}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def after(self, step: int) -> int | None:
        """The signal that stops the run after `step`, or None; every process gets the same answer."""
        if jax.process_count() > 1:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self.received

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self.received is not None:
            return
        if self.received is not None or jax.process_count() > 1:
            raise KeyboardInterrupt
        self.received = number
