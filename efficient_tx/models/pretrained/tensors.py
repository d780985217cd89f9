"""Tensors: the arrays of a checkpoint by name, from an .npz or .safetensors file or from all of its shards."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

INDEX = ".safetensors.index.json"
SUFFIXES = (".npz", ".safetensors", INDEX)
# What `save_pretrained` writes into a folder: one file, or the index of its shards.
IN_FOLDER = ("model.safetensors", f"model{INDEX}")
SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.safetensors")
WEIGHTS = ("float64", "float32", "float16", "bfloat16")
# safetensors has names for floats of 4, 6 and 8 bits; NumPy has none.
TINY = re.compile(r"F(4|6_|8_)")

Tensors = dict[str, np.ndarray]


def weights_file(path: str | Path) -> Path:
    """The file of weights in a folder, as transformers names it; any other path is itself.

    Raises:
      ValueError: one line: the folder has none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if file := next(filter(Path.is_file, map(path.joinpath, IN_FOLDER)), None):
        return file
    raise ValueError(f"{path} has no {' and no '.join(IN_FOLDER)}")


def is_published(path: str | Path) -> bool:
    """Whether a path is that of a published checkpoint: a file by its extension, or a folder with a file of weights."""
    return str(path).endswith(SUFFIXES) or any((Path(path) / name).is_file() for name in IN_FOLDER)


def read(path: Path) -> Tensors:
    """The tensors of a file by name. A shard, or the index that names all shards, stands for the whole checkpoint.

    Raises:
      ValueError: one line: the file is missing, unreadable or empty; a shard is missing, or the index that names it.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix == ".npz":
        tensors = read_npz(path)
    elif index := index_of(path):
        tensors = read_shards(index)
    else:
        tensors = read_safetensors(path)
    if not tensors:
        raise ValueError(f"{path} has no tensors")
    return tensors


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns any error into a ValueError of one line: no library says which ones a damaged file raises."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from None


def read_npz(path: Path) -> Tensors:
    with reading(path), open(path, "rb") as file:  # np.load(path) leaves a file open that is no archive
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is no archive of arrays")
        with archive:
            tensors = dict(archive.items())
        if no_array := next((name for name, x in tensors.items() if not isinstance(x, np.ndarray)), None):
            raise ValueError(f"{no_array} is no array")
    # numpy has no bfloat16 and stores it as two untyped bytes.
    return {name: x.view(jnp.bfloat16) if x.dtype == "V2" else x for name, x in tensors.items()}


def read_safetensors(path: Path) -> Tensors:
    from safetensors import safe_open

    with reading(path), safe_open(path, "numpy") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            if TINY.match(dtype := file.get_slice(name).get_dtype()):
                raise ValueError(f"{name} is {dtype}: weights are {', '.join(WEIGHTS)}")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors; nothing for another file."""
    from safetensors import safe_open

    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    with reading(path), safe_open(path, "numpy") as file:
        return file.metadata() or {}


def index_of(path: Path) -> Path | None:
    """The index of the shards to which a file belongs; None if it is a whole checkpoint."""
    if path.name.endswith(INDEX):
        return path
    shard = SHARD.fullmatch(path.name)
    if not shard or int(shard[2]) == 1:
        return None
    index = path.with_name(shard[1] + INDEX)
    if not index.is_file():
        raise ValueError(f"{path} is one of {int(shard[2])} shards: {index.name}, which names them, is not beside it")
    if path.name not in shards_of(index).values():
        raise ValueError(f"{path} is no shard of {index.name} beside it")
    return index


def shards_of(index: Path) -> dict[str, str]:
    """The file name of each tensor's shard."""
    with reading(index):
        shards = json.loads(index.read_text()).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError("it has no weight_map")
        for shard in shards.values():
            index.with_name(shard)  # raises unless it is a file name
        return shards


def read_shards(index: Path) -> Tensors:
    shards = shards_of(index)
    tensors: Tensors = {}
    for shard in sorted(set(shards.values())):
        path = index.with_name(shard)
        if not path.is_file():
            raise ValueError(f"{index} names {shard}, which is not beside it")
        found = read_safetensors(path)
        if differing := found.keys() ^ {name for name, place in shards.items() if place == shard}:
            raise ValueError(f"{index} and {shard} differ: only one of them has {min(differing)}")
        tensors |= found
    return tensors


def weights(name: str, x: np.ndarray, path: Path) -> np.ndarray:
    """The float32 array of a tensor of weights.

    Raises:
      ValueError: one line: it has another dtype than those of WEIGHTS, no element, or one that is not finite.
    """
    if x.dtype.name not in WEIGHTS:
        raise ValueError(f"{name} is {x.dtype} in {path}: weights are {', '.join(WEIGHTS)}")
    if not x.size:
        raise ValueError(f"{name} is empty in {path}: its shape is {x.shape}")
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if wrong := np.count_nonzero(~np.isfinite(x)):
        raise ValueError(f"{name} has {wrong} of {x.size} numbers in {path} that are not finite in float32")
    return x
