"""Draws a sheet of images: python -m lra.pathfinder --preview=FILE.png"""

from lra.pathfinder.preview import main

if __name__ == "__main__":
    main()
