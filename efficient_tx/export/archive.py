"""Archive: an exported run as one .npz file, which numpy opens and jax runs; nothing of this package is needed for it.

    about           JSON: what the inputs are, how they are padded, what the outputs mean, and where it comes from
    function        the bytes of jax.export: (weights by name, batch by name) -> outputs
    weights/NAME    the arrays of the first argument
    inputs/NAME     the first test examples, as the second argument has them
    outputs         the model's outputs for them, by which another machine can check its own

An .npz is a zip: it has a checksum of every part. examples/run_exported.py reads it.
"""

import inspect
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import export
from ml_collections import ConfigDict

from efficient_tx.checks import OptionError
from efficient_tx.config.names import task_module
from efficient_tx.config.trained import trained_run
from efficient_tx.data.batching import first_examples
from efficient_tx.export.program import program
from efficient_tx.files import local_path
from efficient_tx.models.pretrained.parameters import parameters
from efficient_tx.task import Task, model_inputs
from efficient_tx.training import summary
from efficient_tx.training.disk import write_bytes
from efficient_tx.training.errors import RunError, refusing

SUFFIX = ".npz"
# Test examples that travel with the function.
EXAMPLES = 8
# How far outputs may be from the model's, as a share of the largest one (at least of 1), by the dtype it computes in:
# sums of hundreds of terms in another order, with eight bits in bfloat16.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
MEANINGS = {
    "inputs": {
        "tokens": "token ids in [0, vocab_size), padded on the right with 0 up to max_len",
        "image": "pixels [height, width, channels], scaled as the task says",
    },
    "mask": "True for real tokens, whatever their ids, and False for the padding",
    "positions": "the places of the tokens: 0, 1, ..., max_len - 1",
}


def export_function(
    workdir: str | Path,
    path: str | Path,
    *,
    checkpoint: str = "best",
    precision: str | None = "highest",
    vocabulary: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Writes what a trained run computes as a file that jax and numpy run without this package.

    The batch has any size, the length of a text is `max_len`, up to which it is padded. Before anything is written the
    function is read back and compared with the model on the examples that go with it.

    Args:
      workdir: of the run; it is only read. Its task's test data must be there.
      path: ends in .npz; a file of that name is replaced.
      checkpoint: "best" (on validation), "last", or a step.
      precision: see `program`.
      vocabulary: the word of each token id, for whoever uses the file; None: the task's docstring has to do.
      classes: the name of each class, likewise.

    Returns:
      What the file says about itself.

    Raises:
      Refused: one line: no such run or checkpoint, another ending, a list of another length, a missing package, a model
        that cannot be exported, or a function that does not compute what the model does.
      RunError: the file cannot be written.
    """
    with refusing():
        path = local_path(path)
        if path.suffix != SUFFIX:
            raise ValueError(f"{path} does not end in {SUFFIX}")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no such folder")
        require_flatbuffers()
    config, task, model, step = trained_run(Path(workdir), checkpoint)
    with refusing(str(workdir)):
        words = {"vocabulary": (vocabulary, task.vocab_size), "classes": (classes, task.num_classes)}
        for option, (given, count) in words.items():
            if given is not None and len(given) != count:
                raise OptionError(option, f"{len(given)} words", f"the task has {count}")
        batch = model_inputs(first_examples(task.test, task, EXAMPLES))
        function = program(model, batch, precision=precision)
        outputs = evaluated(model, batch, precision)
        about = facts(config, task, function, outputs)
        about |= {option: given and list(given) for option, (given, _) in words.items()} | {"step": step}
        content = packed(model, function, batch, outputs, about)
    write_bytes(path, content)
    if path.read_bytes() != content:
        raise RunError(f"{path} comes back with other bytes than were written")
    return about


def packed(
    model: nnx.Module,
    function: export.Exported,
    batch: Mapping[str, np.ndarray],
    outputs: np.ndarray,
    about: Mapping[str, Any],
) -> bytes:
    """The bytes of the file. The function in them was read back and gave `outputs`, the model's own for `batch`.

    Raises:
      ValueError: it does not compute what the model does.
    """
    serialized = bytes(function.serialize())
    weights = {name: np.asarray(x[...]) for name, x in parameters(model).items()}
    again = export.deserialize(bytearray(serialized)).call(weights, dict(batch))
    if not (error := float(np.abs(np.asarray(again) - outputs).max())) <= about["tolerance"]:
        raise ValueError(f"what was exported differs from the model by {error:.2g}: nothing is written")
    arrays = {
        "about": np.array(json.dumps(about)),
        "function": np.frombuffer(serialized, np.uint8),
        "outputs": outputs,
        **{f"weights/{name}": x for name, x in weights.items()},
        **{f"inputs/{name}": x for name, x in batch.items()},
    }
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def require_flatbuffers() -> None:
    """Raises ModuleNotFoundError, in one line, without the package in whose format jax writes a function."""
    try:
        import flatbuffers  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError("jax.export needs the package flatbuffers: pip install flatbuffers") from None


def evaluated(model: nnx.Module, batch: Mapping[str, np.ndarray], precision: str | None) -> np.ndarray:
    """The model's own outputs for a batch, called as it is in an evaluation."""
    graphdef, params = nnx.split(model)
    with jax.default_matmul_precision(precision):
        return np.asarray(jax.jit(lambda params, batch: nnx.merge(graphdef, params)(**batch))(params, dict(batch)))


def facts(config: ConfigDict, task: Task, function: export.Exported, outputs: np.ndarray) -> dict[str, Any]:
    """What a person has to know to use the function."""
    _, inputs = jax.tree.unflatten(function.in_tree, function.in_avals)[0]
    meanings = MEANINGS | {"inputs": MEANINGS["inputs"]["image" if task.kind == "image" else "tokens"]}
    return {
        "task": {
            "name": task.name,
            "module": config.task.name,
            "source": task.source,
            "says": inspect.getdoc(task_module(config.task.name)),
        },
        "kind": task.kind,
        "num_classes": task.num_classes,
        "vocab_size": task.vocab_size,
        "max_len": task.max_len,
        "inputs": {
            name: {"shape": list(x.shape[1:]), "dtype": x.dtype.name, "is": meanings[name.removesuffix("2")]}
            for name, x in inputs.items()
        },
        "outputs": {
            "shape": list(outputs.shape[1:]),
            "dtype": outputs.dtype.name,
            "is": "logits: the largest is the answer" if task.objective is None else "what the task's objective scores",
        },
        "tolerance": TOLERANCE[config.dtype] * max(1.0, float(np.abs(outputs).max())),
        "platforms": list(function.platforms),
        "calling_convention": function.calling_convention_version,
        "versions": summary.versions(),
        "mixers": config.mixers,
    }
