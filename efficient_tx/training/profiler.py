"""Traces of a few steps by jax's profiler, for xprof, TensorBoard's profile tab or Perfetto."""

from collections.abc import Callable
from pathlib import Path

import jax

from efficient_tx.training.step import State


class Profiler:
    """Writes one trace of the steps from `start` to `stop`, both included; the first step of a run is 1.

    A run that resumes within them traces the rest. A run that stops within them keeps what was traced.

    Args:
      folder: where the trace goes.
      start, stop: none are traced where `stop` is 0.
    """

    def __init__(self, folder: Path = Path(), start: int = 1, stop: int = 0):
        self._folder, self._start, self._stop, self._open = folder, start, stop, False

    def before(self, step: int, state: State) -> None:
        """Begins, if `step` is the first of this process within the range; what runs on the device is waited for."""
        if not self._open and self._start <= step <= self._stop:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._open = True

    def after(self, step: int, state: State, say: Callable[[str], None]) -> None:
        """Writes the trace behind the last step."""
        if self._open and step == self._stop:
            jax.block_until_ready(state)
            self.close()
            say(f"profile of the steps up to {step}: {self._folder}")

    def close(self) -> None:
        """Ends an open trace."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
