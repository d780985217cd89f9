"""Dense weights to project: from a file, from a run, or trained here. A random matrix is not like a trained one."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficient_tx.checks import OptionError, one_of
from efficient_tx.linear import LINEAR
from efficient_tx.training.checkpoint import Checkpoints, Unusable
from efficient_tx.training.errors import Refused
from efficient_tx.training.workdir import flatten, read_config

# The denoiser: images, their side, disks in each, the side of a patch, hidden width, noise, steps and batch.
IMAGES, SIDE, DISKS, PATCH, WIDTH, NOISE, STEPS, BATCH = 256, 64, 400, 16, 512, 0.5, 1000, 256


class Dense(NamedTuple):
    """A weight `[in, out]` and its description."""

    kernel: jax.Array
    source: str


def from_file(path: Path) -> Dense:
    """The matrix in a .npy file, as float32.

    Raises:
      ValueError, OSError: it cannot be read, or is not a matrix of finite numbers.
    """
    try:
        array = np.load(path)
    except OSError:
        raise
    except Exception as error:  # no library says which ones a damaged file raises
        raise OptionError("weight", str(path), f"it cannot be read: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        raise OptionError("weight", str(path), "it is no matrix of real numbers: save one with numpy.save")
    if not array.size or not np.isfinite(array).all():
        raise OptionError("weight", str(path), "it is empty or not finite")
    return Dense(jnp.asarray(array, jnp.float32), f"the matrix in {path}")


def from_run(workdir: Path, layer: str | None = None) -> Dense:
    """The kernel of a dense layer in the newest checkpoint of a run.

    Args:
      workdir: of the run.
      layer: its dotted path, "encoder.blocks.0.mlp.up"; None is the largest, of equal ones the first.

    Raises:
      ValueError: there is no checkpoint, the newest does not open, its kernels are latent, or there is no such layer.
    """
    checkpoints = Checkpoints(workdir / "checkpoints")
    if not checkpoints.steps():
        raise OptionError("run", str(workdir), "there is no checkpoint: name the workdir of a run")
    try:
        config = flatten(read_config(workdir))
    except Refused as error:
        raise OptionError("run", str(workdir), str(error)) from None
    structures = {config.get("linear.mlp.name"), config.get("linear.projections.name")}
    for name in structures:
        if name in LINEAR and LINEAR[name].latent:
            rule = f"it has {name} layers, whose kernels are latent: name a run with dense ones"
            raise OptionError("run", str(workdir), rule)
    step = checkpoints.steps()[-1]
    try:
        arrays = checkpoints.arrays(step)
    except Unusable as error:
        raise OptionError("run", str(workdir), f"checkpoint {step} {error}") from None
    layers = {
        name.removeprefix("params.").removesuffix(".kernel"): array
        for name, array in arrays.items()
        if name.startswith("params.") and name.endswith(".kernel") and array.ndim == 2
    }
    if "sum" in structures:  # the kernel of a part is no weight of a layer
        layers = {name: array for name, array in layers.items() if not name.endswith((".first", ".second"))}
    if not layers:
        raise OptionError("run", str(workdir), "it has no dense layer")
    if layer is not None:
        one_of(layers, layer=layer)
    layer = layer or max(layers, key=lambda name: layers[name].size)
    return Dense(jnp.asarray(layers[layer], jnp.float32), f"{layer} of the run {workdir} at step {step}")


def trained(progress: Callable[[str], None] = lambda _: None) -> Dense:
    """The middle layer, 512 × 512, of an MLP that learns to denoise patches of images of occluding disks.

    Such images ("dead leaves", Lee, Mumford and Huang 2001) have those statistics of natural images that matter to a
    linear layer: smooth areas, edges, all scales. Patches of 16 × 16 from images of 64 × 64, of variance 1, get normal
    noise of standard deviation 0.5. AdamW minimises the mean squared error to the clean patch. The result is
    deterministic and takes about ten seconds.
    """
    progress("drawing images")
    images = jnp.asarray(disks(np.random.default_rng(0), IMAGES))
    fresh = jnp.asarray(disks(np.random.default_rng(1), IMAGES // 8))
    progress("training a dense layer to project")
    widths = PATCH**2, WIDTH, WIDTH, PATCH**2
    keys = jax.random.split(jax.random.key(0), len(widths) - 1)
    params = [jax.random.normal(key, pair) * pair[0] ** -0.5 for key, pair in zip(keys, itertools.pairwise(widths))]
    # The weight decay leaves e^-1.5 of the random start.
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=1.0)

    def patches(key, images):
        place, noise = jax.random.split(key)
        image, row, column = jax.random.randint(
            place, (3, BATCH), 0, jnp.array([[len(images)], [SIDE - PATCH + 1], [SIDE - PATCH + 1]])
        )
        clean = jax.vmap(lambda i, r, c: jax.lax.dynamic_slice(images, (i, r, c), (1, PATCH, PATCH)))(
            image, row, column
        ).reshape(BATCH, -1)
        return clean, clean + NOISE * jax.random.normal(noise, clean.shape)

    def loss(params, clean, noisy):
        hidden = noisy
        for kernel in params[:-1]:
            hidden = jax.nn.gelu(hidden @ kernel)
        return jnp.mean(jnp.square(hidden @ params[-1] - clean))

    @jax.jit
    def fit(params):
        def step(state, key):
            params, moments = state
            gradient = jax.grad(loss)(params, *patches(key, images))
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), None

        keys = jax.random.split(jax.random.key(1), STEPS)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, loss(params, *patches(jax.random.key(2), fresh))

    params, error = fit(params)
    source = (
        f"the middle layer of an MLP trained here for {STEPS:,} steps to denoise images of disks (mean squared error "
        f"on other images {float(error):.3f}, of the noisy input {NOISE**2:.3f})"
    )
    return Dense(params[1], source)


def disks(rng: np.random.Generator, count: int) -> np.ndarray:
    """`[count, SIDE, SIDE]` float32, of mean 0 and variance 1: disks that hide each other, radii with density r⁻³."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    least, most = 2.0, SIDE
    images = np.zeros((count, SIDE, SIDE), np.float32)
    for image in images:
        radius = (least**-2 - rng.random(DISKS) * (least**-2 - most**-2)) ** -0.5
        middle, grey = rng.uniform(-most / 4, SIDE + most / 4, (2, DISKS)), rng.random(DISKS)
        for r, y, x, value in zip(radius, *middle, grey):
            image[(rows - y) ** 2 + (columns - x) ** 2 < r**2] = value
    return (images - images.mean()) / images.std()


def directions(kernel: jax.Array) -> int:
    """The number of largest singular values of a matrix that hold 99 % of the sum of their squares."""
    held = np.cumsum(np.linalg.svd(np.asarray(kernel), compute_uv=False) ** 2)
    return int(np.searchsorted(held, 0.99 * held[-1])) + 1
