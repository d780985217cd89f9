"""An exported run, used with jax and numpy alone: neither efficient_tx nor flax is imported. Copy this file.

Command:   python run_exported.py classifier.npz "[MAX 4 3 [MIN 2 3 ] 1 ]"
Needs:     `pip install jax flatbuffers` (jax reads the function by flatbuffers, and does not install it), and a file of
           examples/export_run.py
Duration:  seconds on a CPU
"""

import json
import os
import sys
import zipfile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before jax is imported: its CPU solvers and XLA share the cores

import jax
import numpy as np
from jax import export


class Exported:
    """The function in a file of `efficient_tx.export.export_function`, with its weights.

    Attributes:
      about: what the file says of itself: inputs, padding, outputs, task, versions.

    Raises:
      ValueError: one line: the file cannot be read, or not by this version of jax.
    """

    def __init__(self, path: str):
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is no .npz file, or there is none")
        try:
            # A part that differs from its checksum is not read. Nothing in it is run.
            with np.load(path, allow_pickle=False) as archive:
                parts = {name: archive[name] for name in archive.files}
            self.about = json.loads(str(parts.pop("about")))
            function, self.outputs = parts.pop("function").tobytes(), parts.pop("outputs")
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        try:
            self.function = export.deserialize(bytearray(function))
            self.function.mlir_module()  # raises if this jax does not know an operation
        except ImportError:
            raise ValueError("jax.export needs the package flatbuffers: pip install flatbuffers") from None
        except (ValueError, jax.errors.JaxRuntimeError):
            theirs = f"jax {self.about['versions']['jax']} wrote it"
            hint = "take that version, or one up to six months newer"
            raise ValueError(f"{path} cannot be read by jax {jax.__version__}: {theirs}; {hint}") from None
        self.examples, weights = (
            {name.partition("/")[2]: x for name, x in parts.items() if name.startswith(f"{kind}/")}
            for kind in ("inputs", "weights")
        )
        weights = jax.device_put(weights)
        # Every batch size is compiled once.
        self.run = jax.jit(lambda batch: self.function.call(weights, batch))

    def check(self) -> float:
        """The largest difference to the outputs that the exporting machine computed for the examples in the file.

        Raises:
          ValueError: it is more than rounding.
        """
        difference, most = float(np.abs(self.run(self.examples) - self.outputs).max()), self.about["tolerance"]
        if not difference <= most:
            raise ValueError(f"outputs differ from the exporting machine's by {difference:.2g}, more than {most:.2g}")
        return difference

    def __call__(self, examples: list[dict]) -> np.ndarray:
        """The outputs for some examples, `[batch, ...]`; `about["outputs"]` says what they mean.

        Args:
          examples: each with `inputs`, unpadded: the token ids of a text, or the pixels of an image; of a pair of texts
            with `inputs2` too. Its own bool `mask` may say which of its tokens are real; by default all are.
        """
        return np.asarray(self.run(self.batch(examples)))

    def batch(self, examples: list[dict]) -> dict[str, np.ndarray]:
        """The examples, checked, padded and stacked.

        Raises:
          ValueError: one line: there is none, or one is not what the function was trained on.
        """
        if not examples:
            raise ValueError("there is no example")
        rows = [self.padded(example, f"example {number}") for number, example in enumerate(examples)]
        return {name: np.stack([row[name] for row in rows]) for name in self.about["inputs"]}

    def padded(self, example: dict, where: str) -> dict[str, np.ndarray]:
        """One example as the function takes it, without the axis of the batch."""
        row = {"positions": np.arange(self.about["max_len"], dtype=np.int32)}
        for name in ("inputs", "inputs2"):
            if name in self.about["inputs"] and name not in example:
                raise ValueError(f"{where} has no {name}")
            if name in self.about["inputs"] and self.about["kind"] == "image":
                row[name] = self.pixels(example[name], where)
            elif name in self.about["inputs"]:
                mask = name.replace("inputs", "mask")
                row[name], row[mask] = self.tokens(example[name], example.get(mask), f"{where} has {name}")
        return row

    def pixels(self, given, where: str) -> np.ndarray:
        array, wanted = np.asarray(given), self.about["inputs"]["inputs"]
        if list(array.shape) != wanted["shape"] or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise ValueError(
                f"{where} has {array.dtype}{list(array.shape)}: finite numbers {wanted['shape']} are expected"
            )
        return array.astype(wanted["dtype"])

    def tokens(self, given, mask, what: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids, padded, and which of them are real."""
        array, most, vocabulary = np.asarray(given), self.about["max_len"], self.about["vocab_size"]
        if array.ndim != 1 or not 0 < len(array) <= most:
            raise ValueError(f"{what} of shape {list(array.shape)}, not of 1 to {most} tokens")
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= vocabulary:
            raise ValueError(f"{what} that are no whole numbers in [0, {vocabulary})")
        real = np.ones(len(array), bool) if mask is None else np.asarray(mask)
        if real.shape != array.shape or real.dtype != bool:
            raise ValueError(f"{what} with a mask that is not True or False for each token")
        rest = (0, most - len(array))
        return np.pad(array.astype(self.about["inputs"]["inputs"]["dtype"]), rest), np.pad(real, rest)

    def ids(self, text: str) -> list[int]:
        """The token ids of words with spaces between them, by the vocabulary in the file."""
        if not self.about["vocabulary"]:
            raise ValueError("the file has no vocabulary: its task says how a text becomes token ids")
        places = {word: number for number, word in enumerate(self.about["vocabulary"])}
        if unknown := [word for word in text.split() if word not in places]:
            raise ValueError(f"{unknown[0]!r} is no word of the vocabulary: {' '.join(places)}")
        return [places[word] for word in text.split()]


def main(path: str, *texts: str) -> None:
    exported = Exported(path)
    task, device = exported.about["task"], jax.devices()[0]
    print(f"{path}: {task['name']} ({task['source']}), for {', '.join(exported.about['platforms'])}")
    print(f"on {device.platform}, the largest difference to the exporting machine is {exported.check():.1e}")
    for text in texts:
        logits = exported([{"inputs": exported.ids(text)}])[0]
        classes = exported.about["classes"] or range(len(logits))
        print(f"{text} -> {classes[int(logits.argmax())]}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("give a file of examples/export_run.py, and texts if you like")
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(f"{error}")
