"""Long Range Arena tasks (Tay et al. 2020, arXiv:2011.04006): each module has `get_task(...) -> Task`.

Needs numpy and scipy (rich for the progress bar, numba and Pillow for Pathfinder's images), neither jax nor the
trainer, so the data can be used alone.
"""
