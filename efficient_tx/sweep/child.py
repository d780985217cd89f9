"""One run of a sweep: `train`, which stops, and saves its state, when the sweep ends in whatever way.

Standard input is a pipe from the sweep. It closes when the sweep's process ends, by kill -9 too.
"""

import os
import signal
import threading


def stop_with_the_sweep() -> None:
    os.read(0, 1)  # nothing is ever written: it returns at the end of the file
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=stop_with_the_sweep, daemon=True).start()

    from efficient_tx.train import command

    command()
