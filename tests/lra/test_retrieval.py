"""Retrieval: pairs out of the arena's files and out of speeches, cut, split and labelled as said, and what to beat."""

import collections
import hashlib

import numpy as np
import pytest

from lra import ngrams, retrieval
from tests.support.fetched import fetched

pytestmark = pytest.mark.quick


def row(label, one, two):
    return b"\t".join([label, b"P01-1001", b"P02-1002", one, two]) + b"\n"


ROWS = [row(b"1.0", b"one \xc3\xa9 paper", b"another"), row(b"0.0", b"x" * 12000, b'"quoted"'), row(b"1.0", b"", b"y")]


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "lra_release" / "tsv_data"
    folder.mkdir(parents=True)
    for name in retrieval.FILES.values():
        (folder / name).write_bytes(b"".join(ROWS * 4))
    return tmp_path


def bytes_of(ids):
    return bytes((ids - 1).astype(np.uint8))


def test_files_are_read_by_line(files):
    task = retrieval.get_task(source=str(files), data_dir=str(files), val_size=5, max_len=20000)
    assert (len(task.train), len(task.validation), len(task.test)) == (12, 5, 12)
    first, second, third = (task.train[i] for i in (3, 4, 5))
    assert (bytes_of(first["inputs"]), bytes_of(first["inputs2"])) == ("one é paper".encode(), b"another")
    assert (bytes_of(second["inputs"]), bytes_of(second["inputs2"])) == (b"x" * 10000, b'"quoted"')  # the arena's cut
    assert (len(third["inputs"]), bytes_of(third["inputs2"])) == (0, b"y")
    assert [pair["label"] for pair in (first, second, third)] == [1, 0, 1]
    assert task.name == "retrieval-tsv_data" and str(files) in task.source  # never the arena's own column
    assert (task.kind, task.num_classes, task.vocab_size, task.max_len) == ("token_pairs", 2, 257, 20000)
    assert task.baselines["constant"] == pytest.approx(2 / 3)
    assert "".join(task.symbols[i] for i in second["inputs2"]) == '"quoted"'
    short = retrieval.get_task(source=str(files), data_dir=str(files), max_len=7)
    assert bytes_of(short.test[0]["inputs"]) == "one é".encode() + b" "
    with pytest.raises(IndexError):
        task.validation[5]


def test_a_file_without_a_last_newline_and_across_blocks(files, monkeypatch):
    path = files / "lra_release" / "tsv_data" / retrieval.FILES["test"]
    path.write_bytes(b"".join(ROWS).rstrip(b"\n"))
    monkeypatch.setattr(retrieval, "_SCANNED", 100)
    pairs = retrieval.FilePairs(path, 50)
    assert [pairs.texts(i)[1] for i in range(len(pairs))] == [b"another", b'"quoted"', b"y"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "line 1: expected a label"),
        (ROWS[0] + b"two\tP1\tP2\tx\ty\n", "line 2: its label is b'two', expected 0.0 or 1.0"),
        (ROWS[0] * 3000 + b"\tP1\tP2\tx\ty\n", "line 3001: its label is b'', expected 0.0 or 1.0"),
        (ROWS[0] + b"1.0\tP1\tP2\tx\n", "line 2: expected a label, two names and two texts .* found 4 fields"),
        (ROWS[0] * 2 + b"1.0\tP1\tP2\tx\ty\tz", "line 3: expected a label.* found 6 fields"),
        (ROWS[0] + b"1.5\tP1\tP2\tx\ty\n", r"line 2: its label is b'1\.5', expected 0\.0 or 1\.0"),
    ],
)
@pytest.mark.parametrize("block", [5, 2**24])
def test_damaged_files_are_named_with_their_line(files, content, says, block, monkeypatch):
    monkeypatch.setattr(retrieval, "_SCANNED", block)
    (files / "lra_release" / "tsv_data" / retrieval.FILES["train"]).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        retrieval.get_task(source=str(files), data_dir=str(files))


def test_missing_data_and_wrong_settings_are_one_line(files, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, words in (("aan", "task.source=sotu"), ("sotu", "fetch sotu"), ("/nowhere", "neither aan nor sotu")):
        with pytest.raises(FileNotFoundError) as error:
            retrieval.get_task(source=source, data_dir=str(tmp_path / "empty"))
        assert words in str(error.value) and "\n" not in str(error.value)
        assert retrieval.state(str(tmp_path / "empty"), source) == (False, str(error.value))
    with pytest.raises(ValueError, match="holds 12/12/12 pairs, not the 147,086/18,090/17,437"):
        retrieval.get_task(data_dir=str(files))
    assert retrieval.state(str(files))[0]
    for wrong in ({"train_size": 0}, {"max_len": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            retrieval.get_task(source=str(files), data_dir=str(files), **wrong)


def addresses(count, pieces=6):
    """Address i consists of pieces "i.0 ", "i.1 ", ..."""
    return [[f"{i}.{j} ".encode() * 9 for j in range(2 + (i + 1) % pieces)] for i in range(count)]


def test_pairs_of_pieces_are_what_their_label_says():
    source = addresses(12)
    pairs = retrieval.PiecePairs(source, 6000, 7, seed=3, split=0)
    seen = collections.Counter()
    for index in range(len(pairs)):
        one, two = (text.split(b" ")[0] for text in pairs.texts(index))
        assert one != two
        assert (one.split(b".")[0] == two.split(b".")[0]) == (pairs[index]["label"] == 1)
        seen.update([(1, one), (2, two)])
    # Balanced: 3,000 of 6,000, standard deviation 39. Uniform in both places, the second a little less exactly.
    assert abs(int(pairs.labels.sum()) - 3000) < 4 * 39
    expected = 6000 / sum(map(len, source))
    for place in (1, 2):
        counts = np.array([seen[place, piece.split(b" ")[0]] for address in source for piece in address])
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    again = retrieval.PiecePairs(source, 9, 7, seed=3, split=0)
    assert [again.draw(i) for i in range(9)] == [pairs.draw(i) for i in range(9)]
    other = retrieval.PiecePairs(source, 9, 7, seed=3, split=1)
    assert [other.draw(i) for i in range(9)] != [pairs.draw(i) for i in range(9)]


def test_speeches_are_split_by_speech(tmp_path):
    folder = tmp_path / "sotu"
    folder.mkdir()
    lines = []
    for i in range(40):
        text = f"{i:04} ".encode() * (1700 + 10 * i)
        (folder / f"{i}.txt").write_bytes(text)
        lines.append(f"{hashlib.sha256(text).hexdigest()}  {i}.txt\n")
    (folder / "SHA256SUMS").write_text("".join(lines))
    task = retrieval.get_task(
        data_dir=str(tmp_path), source="sotu", train_size=300, val_size=100, test_size=100, max_len=500
    )
    found = [
        {
            bytes_of(pair[name]).split(b" ")[1]
            for pair in map(split.__getitem__, range(len(split)))
            for name in ("inputs", "inputs2")
        }
        for split in (task.train, task.validation, task.test)
    ]
    assert [len(speeches) for speeches in found] == [32, 4, 4]
    assert len(set.union(*found)) == 40
    assert task.name == "retrieval-sotu" and "sotu" in task.source
    assert all(len(task.test[i][name]) == 500 for i in range(20) for name in ("inputs", "inputs2"))
    # Every speech is full of its own number: the baseline has to see that.
    assert task.baselines["n-gram similarity"] > 0.95
    (folder / "7.txt").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"7.txt is missing or damaged: python -m efficient_tx.data.fetch sotu"):
        retrieval.get_task(data_dir=str(tmp_path), source="sotu")


def test_similarity_by_hand():
    """Against sets of n-grams and their idf in plain Python."""
    texts = [(b"abcabc", b"bcda"), (b"zzzz", b"abce")]
    known = ngrams.Similarity(texts)

    def grams(text):
        return {text[i : i + n] for n in ngrams.ORDERS for i in range(len(text) - n + 1)}

    everything = [grams(text) for pair in texts for text in pair]

    def square(gram):
        return (np.log(5 / (1 + sum(gram in one for one in everything))) + 1) ** 2

    for one, two in [(b"abcabc", b"abce"), (b"bcda", b"zzzz"), (b"abce", b"abce")]:
        a, b = grams(one), grams(two)
        norm = np.sqrt(sum(map(square, a)) * sum(map(square, b)))
        assert known(one, two) == pytest.approx(sum(map(square, a & b)) / norm)
    assert known(b"", b"abc") == 0.0


@pytest.mark.parametrize("decimals", [9, 0])  # all different, most equal
def test_the_threshold_answers_most_of_its_scores(decimals):
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=50).round(decimals), generator.integers(0, 2, 50)
    found = np.mean((scores > ngrams.threshold(scores, labels)) == labels)
    assert found == max(np.mean((scores > t) == labels) for t in [-9, *scores])


@pytest.mark.slow
def test_the_fetched_addresses():
    data = fetched("sotu")
    task = retrieval.get_task(data_dir=str(data), source="sotu", train_size=50, val_size=50, test_size=200)
    assert [len(task.train[i][name]) for i in range(5) for name in ("inputs", "inputs2")] == [4000] * 10
    assert task.baselines["n-gram similarity"] > task.baselines["constant"]
