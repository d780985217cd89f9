"""A needle in a haystack, decoded with constant memory: trained on short texts, asked at the end of long ones.

    python benchmarks/needle.py --out=DIR --mixers=gated_delta --stages=4
    python benchmarks/needle.py --out=DIR [--mixers=lev] [--lengths=64,1024,8192,65536] [--seeds=1]

The task: one key and its word somewhere among random words, the key again at the end: which word was it? The model has
2 layers, 64 wide, no positions, short convolutions of size 4; `lev` keeps 32 keys of each head. Every run is `train.py
--config=configs/recall.py:MIXER` in its own workdir below DIR: first with texts of 64 tokens, then on from there with
512 and 4,096 tokens, where it learns not to forget, and with 8,192 if it still forgets (`--stages=4`). A second start
only reads finished runs. Then the model reads new texts of each length in pieces of 1,024 tokens, and the last token by
itself: what it keeps of the tokens before is the decoder's state, whose arrays' bytes are printed.
"""

import argparse
import itertools
import json
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from runs import summary, train

from efficient_tx.attention import ATTENTION, MultiHead
from efficient_tx.commands import Parser, names_of, run
from efficient_tx.compare.flags import whole, wholes
from efficient_tx.compare.timing import machine
from efficient_tx.config.trained import trained_run
from efficient_tx.data.recall import Needle
from efficient_tx.files import local_path
from efficient_tx.models.classifier import TokenClassifier

PIECE, BUDGET = 1024, 32
# Tokens of a text, texts of a batch, steps, texts of an evaluation, and settings that are not the config's. The last is
# for a decay that is nearly 1 and must come eight times closer to it; who has none is thrown off by its rate.
SLOW = {"optimizer.learning_rate": 1e-3, "optimizer.warmup": 10}
FAST = {"optimizer.learning_rate": 3e-3, "optimizer.warmup": 20, "eval_every": 100}
STAGES = ((64, 128, 1000, 256, {}), (512, 32, 300, 256, SLOW), (4096, 4, 150, 256, SLOW), (8192, 2, 400, 64, FAST))
DECODING = [name for name, cls in ATTENTION.items() if cls.can_decode]


def trained(out: Path, mixer: str, seed: int, stages: int) -> TokenClassifier:
    """The model after so many stages; those that are not there are run."""
    options = {f"attention.{mixer}.{name}": value for name, value in ATTENTION[mixer].within(BUDGET).items()}
    options |= {f"attention.{mixer}.conv": 4} if issubclass(ATTENTION[mixer], MultiHead) else {}
    options |= {"task.kind": "needle", "model.positions": "none"}
    before = {}
    for length, batch, steps, held, own in STAGES[:stages]:
        workdir = out / f"{mixer}-{seed}-{length}"
        settings = {"task.max_len": length, "task.val_size": held, "task.test_size": held, "batch_size": batch}
        settings = {"eval_every": 50} | settings | own
        train(workdir, mixer, config="recall", seed=seed, steps=steps, **settings, **options, **before)
        before = {"init_from": workdir.absolute()}
        print(f"{mixer}, seed {seed}: {summary(workdir)['test_accuracy']:.1%} of texts of {length} tokens", flush=True)
    _, _, model, _ = trained_run(workdir, "best")
    return model


def read(model: TokenClassifier, texts: np.ndarray) -> tuple[np.ndarray, list, float]:
    """The logits at the last token of `texts` `[batch, length]`, the state before it, and the seconds of that token."""
    graphdef, params = nnx.split(model)

    @partial(jax.jit, donate_argnums=2)
    def piece(params, ids, state):
        return nnx.merge(graphdef, params).prefill(ids, state=state)[1]

    @jax.jit
    def last(params, ids, state):
        return nnx.merge(graphdef, params).step(ids, state)[0]

    state = jax.jit(lambda params: nnx.merge(graphdef, params).init_state(len(texts)))(params)
    for at in range(0, texts.shape[1] - 1, PIECE):
        state = piece(params, texts[:, at : min(at + PIECE, texts.shape[1] - 1)], state)
    logits = jax.block_until_ready(last(params, texts[:, -1], state))
    began = time.perf_counter()
    jax.block_until_ready(last(params, texts[:, -1], state))
    return np.asarray(logits), state, time.perf_counter() - began


def needles(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts `[count, length]` that no run has seen, and their answers."""
    kind = Needle(max_len=length)
    found = [kind.example(np.random.default_rng((10**6, length, i))) for i in range(count)]
    return np.stack([one["inputs"] for one in found]), np.array([one["label"][-1] for one in found])


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=local_path, required=True, help="where the runs and needle.json go")
    parser.add_argument("--mixers", type=names_of(DECODING, "mixer that decodes"), default=["gated_delta", "lev"],
                        metavar="A,B", help="default: gated_delta,lev")  # fmt: skip
    parser.add_argument("--lengths", type=wholes, default=(64, 1024, 8192, 65536), help="tokens of the texts")
    parser.add_argument("--examples", type=whole, default=64, help="texts of each length")
    parser.add_argument(
        "--stages", type=int, choices=range(1, len(STAGES) + 1), default=3, help="of training; default 3"
    )
    parser.add_argument("--seeds", type=whole, default=1, help="runs of each mixer")
    args = parser.parse_args()
    print(machine())
    rows = []
    for mixer, seed in itertools.product(args.mixers, range(args.seeds)):
        model = trained(args.out, mixer, seed, args.stages)
        for length in args.lengths:
            texts, answers = needles(length, args.examples)
            logits, state, seconds = read(model, texts)
            share = float((logits.argmax(-1) == answers).mean())
            stored = sum(x.nbytes for x in jax.tree.leaves(state)) // args.examples
            rows.append({"mixer": mixer, "seed": seed, "length": length, "accuracy": share, "bytes": stored,
                         "seconds_a_token": seconds / args.examples})  # fmt: skip
            print(f"  {length:9,} tokens  right {share:6.1%}  state {stored:7,} bytes", flush=True)
        (args.out / "needle.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    run(main)
