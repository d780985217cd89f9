"""Long Range Arena tasks (Tay et al. 2020, arXiv:2011.04006): each module has `get_task(...) -> Task`.

Needs numpy, scipy and rich (the progress bar); numba and Pillow for Pathfinder's images, and matplotlib for their
preview; tensorflow_datasets for IMDb and CIFAR-10 as it prepares them. Needs neither jax nor the trainer, so the data
can be used alone.
"""
