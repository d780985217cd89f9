"""ListOps: the value, 0 to 9, of a nested expression such as `[MAX 4 3 [MIN 2 3 ] 1 [MED 1 5 8 9 2 ] ]`.

Nangia and Bowman 2018 (arXiv:1804.06028); long version: Long Range Arena, Tay et al. 2020 (arXiv:2011.04006). The
grammar, its probabilities and the length filter are those of the arena's generator. The token ids are constants here.
The original code numbered the tokens anew in every process, so its reloaded checkpoints score like a constant answer.
"""

import contextlib
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from efficient_tx.checks import at_least
from efficient_tx.task import Task, data_directory
from lra import listops_files as files
from lra import parallel, store
from lra.expressions import CLOSER, DIGIT, OPERATOR, VOCABULARY, Expressions, Level, measure, offsets_of

KIND = "tokens"

_MAX_DEPTH = 10  # the root has depth 1; at depth 10 there are only digits
_MAX_ARGS = 10
_P_OPERATOR = 0.25

_GENERATOR = "v1"  # part of the stored data's name: increase it with any change of the generator
_MOST_TOKENS_PER_CHUNK = 2**24  # bounds roots x max_len, and with it a worker's memory (about 150 MB)
_DRAWS_PER_TRIAL = 2**20
_LEAST_GAIN_PER_TRIAL = 0.01


def sizes(*, max_len: int, **_) -> dict[str, int]:
    """The sizes that a model needs to know of the task, from the options of `get_task` alone."""
    return {"num_classes": 10, "vocab_size": len(VOCABULARY), "max_len": max_len}


def split_by(source: str, split: str) -> tuple[str, ...]:
    """Options that may move a training example into `split`; an evaluation must not do that."""
    del split
    return ("train_size", "val_size", "min_len", "max_len", "seed") if source == "generated" else ()


def get_task(
    *,
    data_dir: str | None = None,
    source: str = "generated",
    train_size: int = 96000,
    val_size: int = 2000,
    test_size: int = 2000,
    min_len: int = 500,
    max_len: int = 2000,
    drop_brackets: bool = False,
    bucket: bool = False,
    seed: int = 0,
) -> Task:
    """The ListOps task: expressions with min_len < length < max_len tokens, labelled with their value.

    A token is a digit, an operator with its opening bracket, or a closing bracket. No expression occurs twice, within a
    split or across splits. Batches are padded to `max_len`, so the longest expression leaves one position free.

    Args:
      data_dir: folder of the generated data, default $EFFICIENT_TX_DATA or ~/.cache/efficient_tx.
      source: "generated", or the path of an `lra_release` directory, which holds `listops-1000/basic_train.tsv`,
        `basic_val.tsv` and `basic_test.tsv`. From these the first `train_size`, `val_size` and `test_size` expressions
        within the length bounds are taken, or as many as there are; `Task.source` says how many.
      train_size, val_size, test_size: number of expressions.
      min_len, max_len: bounds of the length, both excluded; brackets always count.
      drop_brackets: leave out the closing brackets; the operators keep their ids. This is the information from the
        arena's tokenizer before 2021-06-10 (alphanumeric runs only: `MAX 4 3 MIN 2 3 1`), which the Skyformer paper's
        pipeline kept using. The expression can no longer be parsed, so these numbers do not compare with others.
      bucket: batches of similar lengths, with little padding.
      seed: of the generator; not used for files.

    Raises:
      ValueError: a setting is out of range, too few expressions fit the length bounds, or a file is damaged.
      FileNotFoundError: `source` is not a directory, or a file in it is missing.
      OSError: generated data cannot be stored.
    """
    counts = {"train": train_size, "val": val_size, "test": test_size}
    at_least(1, train_size=train_size, val_size=val_size, test_size=test_size)
    at_least(0, seed=seed)
    _check_lengths(min_len, max_len)
    if source == "generated":
        folder = f"{train_size}-{val_size}-{test_size}_len{min_len}-{max_len}_seed{seed}_{_GENERATOR}"
        directory = data_directory(data_dir) / "listops" / folder
        total = sum(counts.values())
        form = _form(total, min_len, max_len)
        arrays = store.stored(directory, lambda: _generate(total, min_len, max_len, seed), form)
        everything = Expressions(**arrays)
        ends = np.cumsum(list(counts.values()))
        splits = [everything.part(end - size, end) for size, end in zip(counts.values(), ends)]
        name, described = "listops", f"generated, seed {seed}"
    else:
        directory = files.find(source)
        splits = [
            files.read(directory / f"basic_{split}.tsv", size, min_len, max_len) for split, size in counts.items()
        ]
        found = [len(split) for split in splits]
        described = f"{directory}, the first {'/'.join(map(str, found))} expressions"
        name = "listops" if found == list(counts.values()) else f"listops-{pathlib.Path(source).resolve().name}"
    baselines = _baselines(splits[0], splits[2])
    if drop_brackets:
        splits = [split.without_closers() for split in splits]
    return Task(
        *splits,
        kind=KIND,
        **sizes(max_len=max_len),
        name=name + "-no-brackets" * drop_brackets,
        source=described,
        bucket=bucket,
        baselines=baselines,
        symbols=VOCABULARY,
    )


def state(data_dir: str | None = None, source: str = "generated", **_: Any) -> tuple[bool, str]:
    """Whether the data are there or can be generated, and where, or what is missing. Nothing is read."""
    if source == "generated":
        return True, f"generated on first use, {data_directory(data_dir) / 'listops'}"
    try:
        return True, str(files.find(source))
    except FileNotFoundError as error:
        return False, str(error)


def _check_lengths(min_len: int, max_len: int) -> None:
    if min_len < 0 or max_len - min_len < 2:
        raise ValueError(
            f"min_len is {min_len} and max_len {max_len}: no length lies between them (both are excluded); "
            "set 0 <= min_len and max_len >= min_len + 2"
        )


def _form(total: int, min_len: int, max_len: int) -> Callable[[store.Arrays], None]:
    """The check of stored expressions."""
    form = store.Form(
        tokens=store.Array("uint8", (None,), 1, CLOSER),
        offsets=store.Array("int64", (total + 1,), 0, total * max_len),
        labels=store.Array("uint8", (total,), 0, 9),
    )

    def check(arrays: store.Arrays) -> None:
        form(arrays)
        offsets, lengths = arrays["offsets"], np.diff(arrays["offsets"])
        if offsets[0] != 0 or offsets[-1] != len(arrays["tokens"]):
            raise ValueError(f"offsets are from {offsets[0]} to {offsets[-1]}, tokens {len(arrays['tokens'])}")
        if lengths.min() <= min_len or lengths.max() >= max_len:
            raise ValueError(f"offsets give lengths from {lengths.min()} to {lengths.max()}")

    return check


def _baselines(train: Expressions, test: Expressions) -> dict[str, float]:
    """Test accuracy of the best constant answer and of the best answer for each root operator, chosen on train."""
    counts = np.zeros((len(VOCABULARY), 10), np.int64)
    np.add.at(counts, (train.roots(), train.labels), 1)
    constant = counts.sum(0).argmax()
    by_root = np.where(counts.any(1), counts.argmax(1), constant)
    return {
        "constant": float(np.mean(test.labels == constant)),
        "root operator": float(np.mean(test.labels == by_root[test.roots()])),
    }


def _generate(total: int, min_len: int, max_len: int, seed: int) -> dict[str, np.ndarray]:
    """The first `total` distinct expressions of the seed's stream."""
    settings = {"min_len": min_len, "max_len": max_len, "seed": seed}
    seen: set[bytes] = set()
    tokens, lengths, labels = [], [], []
    draws, trial = 0, (0, 0)
    chunks = contextlib.closing(parallel.chunks("lra.listops:sample", settings))
    with parallel.progress("ListOps", total) as advance, chunks as stream:
        for chunk in stream:
            draws += chunk["draws"]
            ends = np.cumsum(chunk["lengths"])
            for end, length, label in zip(ends.tolist(), chunk["lengths"].tolist(), chunk["labels"].tolist()):
                expression = chunk["tokens"][end - length : end]
                known = len(seen)
                seen.add(hashlib.blake2b(expression, digest_size=16).digest())
                if len(seen) == known:
                    continue
                tokens.append(expression)
                lengths.append(length)
                labels.append(label)
                if len(seen) == total:
                    break
            advance(len(seen))
            if len(seen) == total:
                break
            if draws - trial[0] >= _DRAWS_PER_TRIAL:
                if len(seen) - trial[1] < _LEAST_GAIN_PER_TRIAL * (total - len(seen)):
                    raise ValueError(
                        f"min_len is {min_len} and max_len {max_len}: only {len(seen)} of the {total} distinct "
                        f"expressions wanted turned up in {draws} draws; widen the bounds or lower the sizes"
                    )
                trial = (draws, len(seen))
    return {"tokens": np.concatenate(tokens), "offsets": offsets_of(lengths), "labels": np.array(labels, np.uint8)}


def sample(index: int, *, min_len: int, max_len: int, seed: int) -> dict[str, np.ndarray | int]:
    """Chunk `index` of the seed's stream: many draws from the grammar. Those of the right length are kept.

    All trees of the chunk grow together, one level at a time. A tree that can no longer end below `max_len` (each
    pending node is at least one token) stops growing, because any other nodes would not prevent its rejection. So the
    kept trees have exactly the distribution of rejection sampling.

    Returns:
      draws: number of trees drawn; lengths int64 `[n]`, labels uint8 `[n]` and the tokens uint8 of those kept, one
        after the other, in the order drawn.
    """
    rng = np.random.default_rng([seed, index])
    draws = int(np.clip(_MOST_TOKENS_PER_CHUNK // max_len, 2**8, 2**17))
    levels, lengths = _grow(rng, draws, max_len)
    kept = (min_len < lengths) & (lengths < max_len)
    levels = [Level(*(column[kept[level.tree]] for column in level)) for level in levels]
    lengths, labels = measure(levels)
    tokens = _write(levels, lengths)
    return {"draws": draws, "lengths": lengths[0], "labels": labels, "tokens": tokens}


def _grow(rng: np.random.Generator, draws: int, max_len: int) -> tuple[list[Level], np.ndarray]:
    """Levels of `draws` trees and their lengths `[draws]`; those of `max_len` or more may be unfinished."""
    levels = []
    tree = np.arange(draws, dtype=np.int32)
    lengths = np.zeros(draws, np.int64)
    depth = 0
    while len(tree):
        depth += 1
        # Only `random` is drawn: its stream is as stable over NumPy versions as the bit generator's.
        is_operator = rng.random(len(tree)) <= (_P_OPERATOR if depth < _MAX_DEPTH else -1.0)
        choice = rng.random(len(tree))
        token = np.where(is_operator, (4 * choice).astype(np.uint8) + OPERATOR, (10 * choice).astype(np.uint8) + DIGIT)
        args = np.zeros(len(tree), np.uint8)
        args[is_operator] = 2 + (_MAX_ARGS - 1) * rng.random(np.count_nonzero(is_operator))
        lengths += _sum(np.where(is_operator, 2, 1), tree, draws)
        hopeless = lengths + _sum(args, tree, draws) >= max_len
        lengths[hopeless] = max_len
        args[hopeless[tree]] = 0
        levels.append(Level(tree, token.astype(np.uint8), args))
        tree = np.repeat(tree, args)
    return levels, lengths


def _sum(values: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(groups, values, count).astype(np.int64)


def _write(levels: list[Level], lengths: list[np.ndarray]) -> np.ndarray:
    """The tokens of all trees, one after the other, uint8."""
    tokens = np.zeros(lengths[0].sum() if lengths else 0, np.uint8)
    positions = np.cumsum(lengths[0]) - lengths[0]
    for level, length, below in zip(levels, lengths, [*lengths[1:], None]):
        tokens[positions] = level.token
        is_operator = level.args > 0
        if not is_operator.any():
            break
        tokens[(positions + length - 1)[is_operator]] = CLOSER
        args = level.args[is_operator].astype(np.int64)
        starts = np.cumsum(args) - args
        before = np.cumsum(below) - below  # tokens of the level's earlier nodes, to be counted from the first sibling
        positions = before + np.repeat(positions[is_operator] + 1 - before[starts], args)
    return tokens
