"""A trained run as one file for others: what it computes, for CPUs, GPUs and TPUs at once, and its weights.

Command:   python train.py --config=configs/quickstart.py --workdir=runs/quickstart
           python examples/export_run.py runs/quickstart classifier.npz
           python examples/run_exported.py classifier.npz "[MAX 4 3 [MIN 2 3 ] 1 ]"
Needs:     `pip install '.[train,data]'`; examples/run_exported.py needs jax, numpy and flatbuffers only
Duration:  half a minute on a CPU
"""

import os
import sys

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before jax is imported: its CPU solvers and XLA share the cores

from efficient_tx.export import export_function, export_weights
from efficient_tx.training.errors import RunError
from lra.expressions import VOCABULARY


def main(workdir: str, path: str) -> None:
    # The words of ListOps, for people who use the file; of a task of your own give others, or leave both out.
    about = export_function(workdir, path, vocabulary=VOCABULARY, classes="0123456789")
    print(f"{path}: {about['task']['name']}, step {about['step']}, for {', '.join(about['platforms'])}")
    for name, array in about["inputs"].items():
        print(f"  {name}: {array['dtype']} [batch, {', '.join(map(str, array['shape']))}], {array['is']}")
    print(f"  outputs: {about['outputs']['is']}")

    weights = path.removesuffix(".npz") + ".safetensors"
    export_weights(workdir, weights)
    print(f"{weights}: the weights by name; --config.init_from={weights} starts a run from them")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("give the workdir of a run, and the name of the file to write: runs/quickstart classifier.npz")
    try:
        main(*sys.argv[1:])
    except RunError as error:
        sys.exit(str(error))
