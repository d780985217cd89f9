"""Draws a sheet of images: python -m lra.pathfinder --preview=FILE.png"""

from efficient_tx.commands import run
from lra.pathfinder.preview import main

if __name__ == "__main__":
    run(main)
