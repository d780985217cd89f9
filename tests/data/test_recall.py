"""Recall tasks: a slow reader answers every question from the inputs alone, and nothing else could."""

import collections
import subprocess
import sys
import zlib

import numpy as np
import pytest

from efficient_tx.config import ConfigError, check, make_config, schema
from efficient_tx.data import recall
from efficient_tx.data.batching import evaluation_batches
from efficient_tx.data.recall.draws import distinct, integers, weighted_distinct
from tests.support import ROOT

SMALL = {
    "mqar": {"max_len": 24, "pairs": 3, "vocab_size": 21},
    "copy": {"max_len": 20, "tokens": 4, "vocab_size": 8},
    "needle": {"max_len": 30, "needles": 3, "vocab_size": 21},
    "parity": {"max_len": 12},
    "count": {"max_len": 40, "vocab_size": 4, "modulus": 5},
}
every = pytest.mark.parametrize("kind", recall.KINDS)


def task(kind, **options):
    sizes = {"train_size": 400, "val_size": 50, "test_size": 60}
    return recall.get_task(kind=kind, **{**SMALL[kind], **sizes, **options})


def read_mqar(inputs, size):
    """The pairs are in front; a later key asks. Ids are counted by hand: 21 tokens are 9 keys from 2, 10 values."""
    memory, answers = {}, {}
    for place in range(0, 2 * size["pairs"], 2):
        memory[inputs[place]] = inputs[place + 1] - 11
    for place in range(2 * size["pairs"], len(inputs)):
        if inputs[place] in memory:
            answers[place] = memory[inputs[place]]
    return answers


def read_copy(inputs, size):
    """3 is the first letter, 2 the marker."""
    letters = iter([token - 3 for token in inputs if token > 2])
    return {place: next(letters) for place, token in enumerate(inputs) if token == 2}


def read_needle(inputs, size):
    """The last token is a key; its word followed it before."""
    place = inputs.index(inputs[-1])
    return {len(inputs) - 1: inputs[place + 1] - 11}


def read_parity(inputs, size):
    return {place: sum(token == 3 for token in inputs[: place + 1]) % 2 for place in range(len(inputs))}


def read_count(inputs, size):
    return {place: inputs[:place].count(inputs[place]) % size["modulus"] for place in range(len(inputs))}


READERS = {
    "mqar": read_mqar,
    "copy": read_copy,
    "needle": read_needle,
    "parity": read_parity,
    "count": read_count,
}


def questions(example):
    """place -> answer, where the weight is not 0."""
    return {int(place): int(example["label"][place]) for place in np.flatnonzero(example["weight"])}


@every
def test_a_slow_reader_answers_all_questions_and_finds_no_others(kind):
    made = task(kind)
    for split in (made.train, made.validation, made.test):
        for example in split:
            assert READERS[kind](example["inputs"].tolist(), SMALL[kind]) == questions(example)


@every
def test_examples_are_what_the_task_says(kind):
    made = task(kind)
    labels, tokens = set(), set()
    for example in made.train:
        assert [len(example[name]) for name in ("inputs", "label", "weight")] == [made.max_len] * 3
        assert [example[name].dtype for name in ("inputs", "label", "weight")] == [np.int32, np.int32, np.float32]
        assert set(example["weight"].tolist()) <= {0.0, 1.0}
        labels |= set(questions(example).values())
        tokens |= set(example["inputs"].tolist())
    assert labels == set(range(made.num_classes))  # 400 examples have each of at most 10 answers
    assert min(tokens) >= 1 and max(tokens) == made.vocab_size - 1
    assert recall.sizes(kind=kind, **SMALL[kind]) == {
        "num_classes": made.num_classes,
        "vocab_size": made.vocab_size,
        "max_len": made.max_len,
    }
    batch = evaluation_batches(made.test, made, batch_size=32)[1]
    assert batch["mask"].all() and batch["weight"][28:].sum() == 0 < batch["weight"][:28].sum(1).min()


@every
def test_an_example_is_a_function_of_seed_split_and_number(kind):
    def bytes_of(example):
        return b"".join(example[name].tobytes() for name in ("inputs", "label", "weight"))

    first, again, larger = task(kind), task(kind), task(kind, train_size=1000, test_size=5)
    other = task(kind, seed=1)
    assert [bytes_of(x) for x in first.train] == [bytes_of(x) for x in again.train]
    assert [bytes_of(x) for x in first.train] == [bytes_of(larger.train[i]) for i in range(400)]
    assert bytes_of(first.train[7]) == bytes_of(again.train[7])  # whatever was read before
    streams = [
        bytes_of(split[i])
        for made in (first, other)
        for split in (made.train, made.validation, made.test)
        for i in range(50)
    ]
    assert len(set(streams)) >= len(streams) - 20  # of 4,096 sequences of 12 bits, 300 collide 11 times or so
    for index in (-1, 400):
        with pytest.raises(IndexError):
            first.train[index]


@pytest.mark.slow
def test_the_same_in_another_process():
    program = (
        "from efficient_tx.data import recall; import zlib; "
        "print([zlib.crc32(recall.get_task(kind=kind).train[5]['inputs'].tobytes()) for kind in recall.KINDS])"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    here = [zlib.crc32(recall.get_task(kind=kind).train[5]["inputs"].tobytes()) for kind in recall.KINDS]
    assert done.stdout.strip() == str(here)


def test_without_the_pairs_the_inputs_say_nothing_of_the_answers():
    """MQAR's labels are independent of everything behind the pairs, of the key asked and of its neighbours."""
    made = recall.get_task(max_len=24, pairs=2, vocab_size=10, noise=True, train_size=4000)
    counts = np.zeros((3, 10, made.num_classes))
    for example in made.train:
        for place, answer in questions(example).items():
            around = [example["inputs"][(place + shift) % 24] for shift in (0, -1, 1)]
            if place == 4:
                around[1] = around[0]  # there the last value of the pairs stands in front
            counts[np.arange(3), around, answer] += 1
    for table in counts:
        table = table[table.sum(1) > 0]
        expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
        freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
        # Chi-squared: mean `freedom`, standard deviation √(2 freedom).
        assert ((table - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_the_value_never_follows_the_query():
    for example in task("mqar").train:
        after = [example["inputs"][place + 1] for place in questions(example) if place + 1 < 24]
        assert set(after) <= {1}


def test_with_noise_the_value_follows_the_query_by_chance_only():
    made = task("mqar", noise=True, train_size=2000)
    hits = [
        example["inputs"][place + 1] == example["label"][place] + made.vocab_size - made.num_classes
        for example in map(made.train.__getitem__, range(2000))
        for place in questions(example)
        if place + 1 < 24
    ]
    chance = 1 / (made.vocab_size - 2)  # a noise token is any but padding and blank
    assert abs(np.mean(hits) - chance) < 4 * (chance * (1 - chance) / len(hits)) ** 0.5


def test_the_gap_law():
    """The first of the queries drawn is at slot g with probability ∝ (g + 1)^(power − 1)."""
    for power in (0.01, 1.0):
        rng = np.random.default_rng(0)
        slots = np.arange(1, 9) ** (power - 1.0)
        draws = np.array([weighted_distinct(rng, slots, 2) for _ in range(20000)])
        law = slots / slots.sum()
        # Four standard errors.
        np.testing.assert_allclose(np.bincount(draws[:, 0], minlength=8) / 20000, law, atol=4 * 0.5 / 20000**0.5)
        pairs = np.zeros((8, 8))
        np.add.at(pairs, tuple(draws.T), 1 / 20000)
        sequential = law[:, None] * law / (1 - law[:, None]) * ~np.eye(8, dtype=bool)
        np.testing.assert_allclose(pairs, sequential, atol=4 * 0.5 / 20000**0.5)
        made = recall.get_task(max_len=18, pairs=1, vocab_size=8, gap_power=power, train_size=4000)
        gaps = np.bincount([(min(questions(example)) - 2) // 2 for example in made.train], minlength=8)
        np.testing.assert_allclose(gaps / 4000, law, atol=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize("high", [5, 500])
def test_draws_are_different_and_uniform(high):
    rng = np.random.default_rng(0)
    draws = np.array([distinct(rng, 2, high, 3) for _ in range(4000)])
    assert all(len(set(row)) == 3 for row in draws.tolist())
    assert (draws.min(), draws.max()) == (2, high - 1)
    # Mean of the uniform law, four standard errors, at each place.
    spread = (high - 2) / 12**0.5 / 4000**0.5
    np.testing.assert_allclose(draws.mean(0), (high + 1) / 2, atol=4 * spread)
    assert integers(rng, 3, 4, 5).tolist() == [3] * 5


def test_needles_lie_anywhere():
    """Each place of the text is as likely as any other, ends included."""
    made = recall.get_task(kind="needle", max_len=8, needles=1, vocab_size=8, train_size=6000)
    depth = collections.Counter(int(np.flatnonzero(x["inputs"] < 5)[0]) for x in made.train)
    assert sorted(depth) == list(range(6))
    assert max(abs(count - 1000) for count in depth.values()) < 4 * (6000 * 5 / 36) ** 0.5


def test_a_needle_in_a_million():
    made = recall.get_task(kind="needle", max_len=2**20, train_size=1, val_size=1, test_size=1)
    example = made.train[0]
    last = 2**20 - 1
    # 66 tokens: the words begin at 34, those of the reader's 21 at 11.
    assert READERS["needle"](example["inputs"].tolist(), {})[last] - 23 == questions(example)[last]
    assert sum(x.nbytes for x in example.values()) == 12 * 2**20


@every
def test_baselines_are_those_of_the_test_split(kind):
    made = task(kind)
    answers = [answer for example in made.test for answer in questions(example).values()]
    share = max(answers.count(answer) for answer in set(answers)) / len(answers)
    assert made.baselines["constant"] == pytest.approx(share)
    assert made.baselines.get("one of its values") == (1 / 3 if kind == "mqar" else None)


MISTAKES = [
    ({"kind": "mqra"}, "kind is 'mqra': choose one of mqar, copy, needle, parity, count"),
    ({"kind": "copy", "pairs": 3}, "pairs is 3, an option of kind 'mqar': 'copy' has max_len, vocab_size, tokens"),
    ({"kind": "parity", "vocab_size": 9}, "vocab_size is 9, an option of kind .*: 'parity' has max_len"),
    ({"max_len": 24, "pairs": 7}, r"pairs is 7: with max_len=24 it must be in \[1, 6\]"),
    ({"vocab_size": 17}, "vocab_size is 17: 8 different keys and values need at least 18"),
    ({"gap_power": 0.0}, "gap_power is 0.0: it must be above 0"),
    ({"kind": "copy", "tokens": 65}, r"tokens is 65: with max_len=64 it must be in \[1, 32\]"),
    ({"kind": "copy", "vocab_size": 4}, "vocab_size is 4: an alphabet of two needs at least 5"),
    ({"kind": "needle", "needles": 64}, r"needles is 64: with max_len=64 it must be in \[1, 31\]"),
    ({"kind": "needle", "vocab_size": 5}, "vocab_size is 5: 1 different keys and two words or more need at least 6"),
    ({"kind": "parity", "max_len": 0}, "max_len is 0: it must be at least 1"),
    ({"kind": "count", "vocab_size": 2}, "vocab_size is 2: one symbol needs at least 3"),
    ({"kind": "count", "modulus": 1}, "modulus is 1: it must be at least 2"),
    ({"test_size": 0}, "test_size is 0: it must be at least 1"),
    ({"seed": -1}, "seed is -1: it must be at least 0"),
]


@pytest.mark.parametrize(("options", "words"), MISTAKES)
def test_mistakes_are_one_line(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        recall.get_task(**options)
    assert "\n" not in str(caught.value)


def test_no_option_is_dead():
    """Each option, changed under the kind that has it, changes the examples or how many there are."""
    others = {
        "max_len": ("mqar", 32), "vocab_size": ("mqar", 40), "pairs": ("mqar", 2), "gap_power": ("mqar", 1.0),
        "noise": ("mqar", True), "tokens": ("copy", 3), "needles": ("needle", 2), "modulus": ("count", 2),
        "train_size": ("mqar", 7), "val_size": ("mqar", 7), "test_size": ("mqar", 7), "seed": ("mqar", 5),
    }  # fmt: skip
    unread = {"name", "kind", "data_dir"}
    assert set(others) == set(schema.task_options("efficient_tx.data.recall")) - unread

    def contents(made):
        splits = (made.train, made.validation, made.test)
        return [[len(split), *(questions(split[i]) for i in range(5))] for split in splits]

    for option, (kind, value) in others.items():
        same = contents(task(kind)) == contents(task(kind, **{option: value}))
        seen = [x["inputs"].tolist() for x in task(kind, **{option: value}).test]
        assert not same or seen != [x["inputs"].tolist() for x in task(kind).test], option


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.slow)])
@every
def test_a_run_of_each_kind_builds(kind, causal):
    config = make_config(
        "efficient_tx.data.recall", "linear", task={"kind": kind}, model={"causal": causal, "layers": 1}
    )
    config.attention.linear.conv = 4
    check.check(config)


def test_a_wrong_option_is_found_before_anything_is_made():
    config = make_config("efficient_tx.data.recall", "softmax", task={"kind": "copy", "pairs": 3})
    with pytest.raises(
        ConfigError, match=r"^config\.task cannot be used: pairs is 3, an option of kind 'mqar'"
    ) as caught:
        check.check(config)
    assert caught.value.key == "task"
