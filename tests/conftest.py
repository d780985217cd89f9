"""Set before jax is imported: one OpenBLAS thread (its threads collide with XLA's) and four fake CPU devices."""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax

jax.config.update("jax_num_cpu_devices", 4)
